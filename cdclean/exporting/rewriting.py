"""A Parquet file again, with some of its rows: the same schema with all its metadata, the same columns, order, codecs.

Row groups have at most as many rows as the largest of the source, and some 64 MB. A batch of the source and what waits
for the next row group are all that is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cdclean.datasets.tables import DAMAGE, batches, because, open_table
from cdclean.errors import InputError
from cdclean.exporting.plan import CHANGED
from cdclean.storage import Location, atomic_write, to_text

_GROUP = 1 << 26  # bytes of a row group in memory

Rows = npt.NDArray[np.int64]


def copy_rows(source: Location, target: Location, rows: Rows, check: Callable[[pa.RecordBatch, Rows], object]) -> int:
    """Write the `rows` (numbers in the file, ascending, at least one) of `source` to `target`, whole or not at all.

    Returns the number of rows that `source` has.

    check: called with each batch of them and their numbers, before the batch is written.

    Raises InputError where the source cannot be read or has not so many rows, OutputError where writing fails.
    """
    with ExitStack() as stack:
        try:
            table = stack.enter_context(open_table(source))
        except DAMAGE as error:
            raise _unreadable(source, error) from error
        schema = table.schema_arrow
        groups = [table.metadata.row_group(group) for group in range(table.num_row_groups)]
        most = max((group.num_rows for group in groups), default=0)
        with atomic_write(target) as file, pq.ParquetWriter(file, schema, **_layout(groups)) as writer:
            waiting: list[pa.RecordBatch] = []
            for batch, numbers in _select(table, rows, source):
                check(batch, numbers)
                if waiting and (
                    sum(each.num_rows for each in waiting) + batch.num_rows > most
                    or sum(each.nbytes for each in waiting) + batch.nbytes > _GROUP
                ):
                    writer.write_table(_joined(waiting, schema))
                    waiting.clear()
                waiting.append(batch)
            writer.write_table(_joined(waiting, schema))
        return int(table.metadata.num_rows)


def _select(table: pq.ParquetFile, rows: Rows, source: Location) -> Iterator[tuple[pa.RecordBatch, Rows]]:
    """The rows in batches, with their numbers. Row groups without any of them are not read."""
    first = done = 0
    for group in range(table.num_row_groups):
        last = first + table.metadata.row_group(group).num_rows
        if done < len(rows) and rows[done] < last:
            for batch in _read(table, group, source):
                stop = int(np.searchsorted(rows, first + batch.num_rows))
                if stop > done:
                    numbers = rows[done:stop]
                    yield batch.take(pa.array(numbers - first, pa.int64())), numbers
                done, first = stop, first + batch.num_rows
        first = last
    if done < len(rows):
        raise InputError(f"{to_text(source)} has changed since the scan: row {rows[done]} is gone", hint=CHANGED)


def _read(table: pq.ParquetFile, group: int, source: Location) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches(table, group)
    except DAMAGE as error:
        raise _unreadable(source, error) from error


def _joined(parts: list[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    joined = pa.Table.from_batches(parts)
    return pa.table(joined.columns, schema=schema)


def _layout(groups: list[Any]) -> dict[str, Any]:
    """How the columns of the source are written: codecs, dictionaries, index of pages."""
    about = [groups[0].column(at) for at in range(groups[0].num_columns)] if groups else []
    codecs = {column.path_in_schema: column.compression for column in about}
    encoded = [column.path_in_schema for column in about if any("DICTIONARY" in each for each in column.encodings)]
    return {
        "compression": {path: "NONE" if codec == "UNCOMPRESSED" else codec for path, codec in codecs.items()},
        "use_dictionary": encoded,
        "write_page_index": any(column.has_offset_index for column in about),
    }


def _unreadable(source: Location, error: Exception) -> InputError:
    return InputError(
        f"cannot read {to_text(source)}: {because(error)}", hint="Make it readable, and run the same command again."
    )


def make_parent(target: Location) -> None:
    """The folder of a file in a copy; remote storage has none."""
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
