"""Decisions as a table for other tools: CSV, JSON lines or Parquet.

FiftyOne reads the CSV as it is, with the images where they are:
`fiftyone.Dataset.from_dir(dataset_type=fiftyone.types.CSVDataset, labels_path=ABSOLUTE_PATH, media_field="url",
fields={"key": None, "class_name": None, "mask_norm": float, "reason": None})`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from cdclean.errors import UsageError
from cdclean.storage import Location, answering, atomic_write

Format = Literal["csv", "jsonl", "parquet"]

_ROWS = 1 << 14  # as Python objects at a time
_FIRST, _SECOND = "key", "url"  # columns that every list begins with


def write_list(table: pa.Table, place: Location, format: Format) -> None:
    """Write `table`, whose columns hold plain values, to the file `place`, whole or not at all.

    csv: comma-separated UTF-8 with a header and lines that end in LF. Text stands in quotation marks, `true` and
        `false` for booleans, and nothing between the commas for null.
    jsonl: a JSON object a line, UTF-8; null also for numbers that are not finite, which JSON does not have.
    parquet: as it is, zstd.

    Raises UsageError for another format, OutputError where writing fails.
    """
    if format not in ("csv", "jsonl", "parquet"):
        raise UsageError(f"format must be one of csv, jsonl, parquet, not {format!r}")
    with atomic_write(place) as file:
        if format == "csv":
            pa.csv.write_csv(table, file)
        elif format == "parquet":
            pq.write_table(table, file, compression="zstd")
        else:
            file.writelines(_json_lines(table))


def is_list(place: Location) -> bool:
    """Whether the file `place` is a list, in any of the formats, by how it begins, or empty. Raises OSError."""
    with answering(), place.open("rb") as file:
        head = file.read(64)
        if head.startswith(b"PAR1"):
            try:
                return pq.ParquetFile(file).schema_arrow.names[:2] == [_FIRST, _SECOND]
            except pa.ArrowInvalid:
                return False
    return not head or head.startswith((f'"{_FIRST}","{_SECOND}"'.encode(), f'{{"{_FIRST}": '.encode()))


def _json_lines(table: pa.Table) -> Iterator[bytes]:
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    for batch in table.to_batches(max_chunksize=_ROWS):
        columns = [
            _finite(values) if pa.types.is_floating(values.type) else values.to_pylist() for values in batch.columns
        ]
        lines = [encode(dict(zip(table.column_names, row, strict=True))) for row in zip(*columns, strict=True)]
        yield "".join(f"{line}\n" for line in lines).encode()


def _finite(numbers: pa.Array[pa.FloatScalar]) -> list[float | None]:
    return [number if number is not None and math.isfinite(number) else None for number in numbers.to_pylist()]
