"""A run takes in what has come into its dataset since: the manifest anew, with unchanged samples where they were.

A sample is unchanged if its size and label are the same and its bytes have the SHA-256 that was recorded. One that is
labelled otherwise is scored again, so that its row and the agreement have the new label. The new manifest replaces the
old one in one rename. Parts that hold rows of samples that have gone or changed then have more rows than the manifest
has samples in their chunk; they are written again, with the scores that they hold for the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdclean import datasets, manifest, records, schema
from cdclean.datasets import Sample
from cdclean.datasets.reading import contents
from cdclean.errors import InputError
from cdclean.manifest import Index
from cdclean.storage import Location

_THREADS = 8


@dataclass(frozen=True)
class Extension:
    """What an extended manifest holds, and what is different."""

    index: Index
    fresh: int  # samples that are new or have changed
    gone: int  # samples that are no longer there, or not as they were


def extend(
    run: Location,
    samples: Iterable[Sample],
    before: list[str],
    listed: list[str] | None,
    chunk_size: int,
    advance: Callable[[int], object],
) -> Extension:
    """Bring manifest.parquet up to `samples`, which list the dataset as it is now; where they are none, leave it.

    Class names `before` keep their labels; those that are new (of `listed`, or in the samples) come after them.
    Fresh samples make chunks of their own, after the others.
    """
    path = run / "manifest.parquet"
    with path.open("rb") as file:
        old = pq.read_table(file, schema=schema.MANIFEST)
    hashes = _recorded_hashes(run, old)
    kept = np.zeros(old.num_rows, np.bool_)
    moved: dict[int, Sample] = {}
    fresh: list[pa.Table] = []
    # Not the number of a part that an extension cut short has left: it would pass for that of other samples.
    numbers = [*np.unique(old["chunk"].to_numpy()).tolist(), *map(records.chunk_of, records.parts(run))]
    first = max(numbers, default=-1) + 1
    count = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for batch in manifest.batched(samples):
            found: Any = pc.index_in(pa.array([sample.key for sample in batch]), value_set=old["key"])
            rows = pc.fill_null(found, -1).to_numpy().astype(np.int64)
            same = _unchanged(batch, old, rows, hashes, pool)
            kept[rows[same]] = True
            moved |= _moved(batch, old, rows, same)
            new = [sample for sample, is_same in zip(batch, same, strict=True) if not is_same]
            fresh.append(manifest.to_table(new, first + (count + np.arange(len(new))) // chunk_size))
            count += len(new)
            advance(len(batch))
    table = pa.concat_tables([_relocated(old, moved).filter(pa.array(kept)), *fresh])
    classes = _classes(before, listed, table)
    gone = int((~kept).sum())
    if table.num_rows and (count or gone or moved):  # a run of nothing is none: what was there stays
        manifest.write_labelled(path, [table], classes)
    digest = manifest.Digest()
    for part in table.to_batches(max_chunksize=1 << 16):
        digest.update(pa.Table.from_batches([part]))
    chunks = int(pc.count_distinct(table["chunk"]).as_py())
    return Extension(Index(table.num_rows, chunks, tuple(classes), digest.hexdigest()), count, gone)


def _recorded_hashes(run: Location, old: pa.Table) -> list[str | None]:
    """The SHA-256 that the part of its chunk holds for each sample of `old`; None where that has none.

    Parts of other chunks may hold the sample as it was before: an extension that was cut short leaves such rows.
    """
    hashes: list[str | None] = [None] * old.num_rows
    order = np.argsort(old["chunk"].to_numpy(), kind="stable")
    chunks = old["chunk"].to_numpy()[order]
    for part in records.parts(run):
        first, last = np.searchsorted(chunks, [records.chunk_of(part), records.chunk_of(part) + 1])
        rows = order[first:last]
        try:
            table = records.read_table(part, ["key", "content_hash"])
        except InputError:  # damaged: as if it were not there
            continue
        places = pc.index_in(old["key"].take(rows), value_set=table["key"])
        for row, found in zip(rows.tolist(), table["content_hash"].take(places).to_pylist(), strict=True):
            hashes[row] = found
    return hashes


def _unchanged(
    batch: list[Sample],
    old: pa.Table,
    rows: npt.NDArray[np.int64],
    hashes: list[str | None],
    pool: ThreadPoolExecutor,
) -> npt.NDArray[np.bool_]:
    """Which of `batch` are in `old`, at `rows`, with the same size, problem, label and bytes."""
    sizes, problems, classes = old["size"].to_numpy(), old["problem"], old["class_name"]
    same = np.zeros(len(batch), np.bool_)
    compare = []
    for place, (sample, row) in enumerate(zip(batch, rows.tolist(), strict=True)):
        if row < 0 or sizes[row] != sample.size or problems[row].as_py() != sample.problem:
            continue
        if classes[row].as_py() != sample.class_name:
            continue
        same[place] = True
        if sample.problem is None and hashes[row] is not None:
            compare.append(place)
    found = pool.map(_hash, contents([batch[place] for place in compare]))
    for place, content_hash in zip(compare, found, strict=True):
        same[place] = content_hash == hashes[int(rows[place])]
    return same


def _hash(content: Callable[[], bytes]) -> str | None:
    try:
        return hashlib.sha256(content()).hexdigest()
    except OSError:
        return None  # it could be read once: scored again, it gets a row that says why it cannot now


def _moved(
    batch: list[Sample], old: pa.Table, rows: npt.NDArray[np.int64], same: npt.NDArray[np.bool_]
) -> dict[int, Sample]:
    """Row of `old` -> the sample, where its bytes now stand elsewhere: in another shard, at another offset."""
    urls, offsets = old["url"], old["offset"].to_numpy()
    return {
        row: sample
        for sample, row, is_same in zip(batch, rows.tolist(), same.tolist(), strict=True)
        if is_same and (offsets[row] != sample.offset or urls[row].as_py() != sample.url)
    }


def _relocated(old: pa.Table, moved: dict[int, Sample]) -> pa.Table:
    if not moved:
        return old
    place = {name: old[name].to_pylist() for name in ("url", "offset", "access")}
    for row, sample in moved.items():
        for name, values in place.items():
            values[row] = getattr(sample, name)
    for name, values in place.items():
        position = schema.MANIFEST.get_field_index(name)
        field = schema.MANIFEST.field(position)
        old = old.set_column(position, field, pa.array(values, field.type))
    return old


def in_order(classes: Iterable[str], listed: list[str] | None) -> list[str]:
    """The classes as a dataset would count them that was always as it is now: of `listed`, else by name."""
    if listed is None or listed == datasets.class_names(set(listed)):
        return datasets.class_names(set(classes))  # also where one of them is gone
    return listed + [name for name in classes if name not in set(listed)]


def _classes(before: list[str], listed: list[str] | None, table: pa.Table) -> list[str]:
    found = {name for name in pc.unique(table["class_name"]).to_pylist() if name is not None} | set(before)
    if listed is None and datasets.class_names(found)[: len(before)] == before:
        return datasets.class_names(found)  # numbers: the row of them is longer now
    return before + [name for name in (listed or sorted(found)) if name not in set(before)]
