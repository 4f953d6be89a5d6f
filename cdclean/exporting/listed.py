"""Filtered copies of a list of paths: the list with the wanted rows, and beside it the files that they name.

Of a list that is text, header and rows are copied byte for byte; of Parquet see `rewriting`. Files named by relative
paths are copied to the same relative paths, so the copy can be read and moved like the original. Absolute paths and
URLs stay in the list as they are: they lead to the originals, which are not copied.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdclean.datasets.listed import header, is_text, rows
from cdclean.datasets.tables import because
from cdclean.errors import InputError, UsageError
from cdclean.exporting import remote
from cdclean.exporting.filled import Filled
from cdclean.exporting.parallel import in_parallel
from cdclean.exporting.places import refuse_collisions, refuse_unsafe
from cdclean.exporting.plan import CHANGED
from cdclean.exporting.rewriting import copy_rows, make_parent
from cdclean.storage import Location, atomic_write, from_text, is_local, locate, read_range, to_text

_ELSEWHERE = r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)"  # keys of samples that are not in the folder of the list
_BLOCK = 1 << 23  # bytes read at once
_BATCH = 1 << 16  # rows of the list in memory


def fill(
    samples: pa.Table,
    wanted: npt.NDArray[np.bool_],
    source: Location,
    target: Location,
    progress: Callable[[int], object],
) -> Filled:
    """Write the `wanted` samples of the list at `source` to the empty folder `target`; see `tables.fill`.

    Where nothing is wanted, nothing is written.
    """
    name = to_text(source.name)
    if not wanted.any():
        return Filled(0, 0, 0, (name,))
    files = _files(samples.filter(pa.array(wanted)), to_text(source))
    names = pa.chunked_array([*files["name"].chunks, pa.array([name])])
    refuse_unsafe(names)
    refuse_collisions(names, target)
    if not is_local(target) and pc.any(pc.equal(names, pa.scalar(remote.SUCCESS))).as_py():
        raise UsageError(f"a file named {remote.SUCCESS} cannot be copied to {to_text(target)}", hint="Rename it.")
    size, unscanned = _copy_list(samples["key"], wanted, source, target / source.name)
    _copy_files(files, target, progress)
    count = int(wanted.sum())
    progress(count - files.num_rows)
    return Filled(count, 1, size + int(files["size"].to_numpy().sum()), unscanned=unscanned)


def copied(samples: pa.Table) -> pa.Table:
    """The samples whose files lie in the folder of the list, of each file one, however many rows name it."""
    inside = samples.filter(pc.invert(pc.match_substring_regex(samples["key"], _ELSEWHERE)))
    codes = inside["url"].combine_chunks().dictionary_encode().indices.to_numpy()
    return inside.take(pa.array(np.sort(np.unique(codes, return_index=True)[1]), pa.int64()))


def _files(samples: pa.Table, source: str) -> pa.Table:
    """What is copied beside the list: name, url, size, content_hash."""
    files = copied(samples)
    names = pc.utf8_slice_codeunits(files["url"], source.rindex("/") + 1)
    return files.select(["key", "url", "size", "content_hash"]).append_column("name", names)


def _copy_list(keys: Any, wanted: npt.NDArray[np.bool_], source: Location, target: Location) -> tuple[int, int]:
    """Write the wanted rows of the list; the number of bytes, where it is text, and of rows that were not scanned.

    Raises InputError where a wanted row is not in the list any more.
    """
    if not is_text(source):
        parts = list(_rows(source, keys, wanted))
        numbers = np.concatenate([part for _, part, _ in parts])
        _check_count(len(numbers), wanted, source)
        copy_rows(source, target, numbers, lambda *_: None)
        return 0, sum(unscanned for _, _, unscanned in parts)
    count = more = 0
    with atomic_write(target) as file:
        size = file.write(header(source))
        for lines, numbers, unscanned in _rows(source, keys, wanted):
            size += file.write(b"".join(lines))
            count, more = count + len(numbers), more + unscanned
        _check_count(count, wanted, source)
    return size, more


def _rows(
    source: Location, keys: Any, wanted: npt.NDArray[np.bool_]
) -> Iterator[tuple[list[bytes], npt.NDArray[np.int64], int]]:
    """Lines and numbers of the wanted rows, in the order of the list; and how many rows have none of the keys."""
    every = rows(source)
    first = 0
    while batch := list(islice(every, _BATCH)):
        found: Any = pc.index_in(pa.array([row.key for row in batch], pa.string()), value_set=keys)
        sample = pc.fill_null(found, -1).to_numpy()
        at = np.flatnonzero((sample >= 0) & wanted[sample])
        yield [batch[row].raw for row in at.tolist()], at + first, int(found.null_count)
        first += len(batch)


def _check_count(count: int, wanted: npt.NDArray[np.bool_], source: Location) -> None:
    gone = int(wanted.sum()) - count
    if gone:
        raise InputError(f"{to_text(source)} has changed since the scan: {gone} of its rows are gone", hint=CHANGED)


def _copy_files(files: pa.Table, target: Location, progress: Callable[[int], object]) -> None:
    every = (file for batch in files.to_batches(max_chunksize=1024) for file in batch.to_pylist())
    for _ in in_parallel(partial(_copy_file, target), every):
        progress(1)


def _copy_file(folder: Location, file: dict[str, Any]) -> None:
    target = folder / from_text(file["name"])
    make_parent(target)
    digest = hashlib.sha256()
    # A local copy becomes visible, and is made durable, with the folder that it is in.
    with target.open("xb") if isinstance(target, Path) else atomic_write(target) as written:
        for block in _blocks(file):
            digest.update(block)
            written.write(block)
        if file["content_hash"] is not None and digest.hexdigest() != file["content_hash"]:
            raise InputError(
                f"{file['key']} has changed since the scan: its bytes are not those that were scored", hint=CHANGED
            )
    origin = locate(from_text(file["url"]))
    if isinstance(target, Path) and isinstance(origin, Path):
        with suppress(PermissionError):  # disks that know no permissions
            shutil.copystat(origin, target)


def _blocks(file: dict[str, Any]) -> Iterator[bytes]:
    for offset in range(0, file["size"], _BLOCK):
        try:
            yield read_range(file["url"], offset, min(_BLOCK, file["size"] - offset))
        except OSError as error:
            raise InputError(
                f"cannot read {file['key']}: {because(error)}",
                hint="Make it readable, and run the same command again.",
            ) from error
