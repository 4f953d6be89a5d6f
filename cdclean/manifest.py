"""The manifest: one row per sample of the dataset, in its order, divided into chunks. Written once, read by all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdclean import datasets, schema, storage
from cdclean.datasets import Dataset, Sample

_ROWS = 1 << 16  # rows a row group, and samples in memory at a time
_NAMED = 3  # samples that a message names


@dataclass(frozen=True)
class Index:
    """What indexing found."""

    samples: int
    chunks: int
    classes: tuple[str, ...]
    digest: str  # SHA-256 over key, size and problem of every sample, in order


@dataclass(frozen=True)
class Job:
    """One row of the manifest, as scoring needs it."""

    key: str
    url: str
    offset: int
    size: int
    label: int | None
    class_name: str | None
    problem: str | None


def write(path: Path, dataset: Dataset, chunk_size: int, advance: Callable[[int], object]) -> Index:
    """List `dataset` into `path`, `chunk_size` samples a chunk; memory does not grow with the dataset."""
    classes = tuple(datasets.classes(dataset))
    label = {name: index for index, name in enumerate(classes)}
    digest = _Digest()
    count = 0
    with storage.atomic_write(path) as file, pq.ParquetWriter(file, schema.MANIFEST, compression="zstd") as writer:
        for batch in _batched(datasets.samples(dataset), _ROWS):
            digest.update(batch)
            columns = {
                "key": [sample.key for sample in batch],
                "url": [sample.url for sample in batch],
                "offset": [sample.offset for sample in batch],
                "size": [sample.size for sample in batch],
                "label": [None if s.class_name is None else label.get(s.class_name) for s in batch],
                "class_name": [sample.class_name for sample in batch],
                "problem": [sample.problem for sample in batch],
                "chunk": [(count + row) // chunk_size for row in range(len(batch))],
            }
            writer.write_table(pa.table(columns, schema=schema.MANIFEST))
            count += len(batch)
            advance(len(batch))
    return Index(count, -(-count // chunk_size), classes, digest.hexdigest())


def read_chunk(path: Path, chunk: int) -> list[Job]:
    """The samples of one chunk, in order; only the row groups that hold them are read."""
    columns = list(Job.__dataclass_fields__)
    with path.open("rb") as file:
        table = pq.read_table(file, columns=columns, filters=[("chunk", "=", chunk)])
    return [Job(**row) for row in table.to_pylist()]


def chunk_sizes(path: Path) -> dict[int, int]:
    """Chunk -> its number of samples."""
    with path.open("rb") as file:
        chunks = pq.read_table(file, columns=["chunk"])["chunk"]
    numbers, counts = np.unique(chunks.to_numpy(), return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def changes(path: Path, dataset: Dataset, digest: str) -> list[str]:
    """How `dataset` differs from the manifest at `path`, whose digest is given; empty if it does not.

    Names and sizes are compared; bytes are compared with their hashes when a copy is written.
    """
    now = _Digest()
    for batch in _batched(datasets.samples(dataset), _ROWS):
        now.update(batch)
    if now.hexdigest() == digest:
        return []
    with path.open("rb") as file:
        table = pq.read_table(file, columns=["key", "size", "problem"])
    keys, *rest = (table[name].to_pylist() for name in ("key", "size", "problem"))
    before = dict(zip(keys, zip(*rest, strict=True), strict=True))
    after = {sample.key: (sample.size, sample.problem) for sample in datasets.samples(dataset)}
    found: dict[str, list[str]] = {
        "added": [key for key in after if key not in before],
        "removed": [str(key) for key in before if key not in after],
        "changed": [key for key, value in after.items() if key in before and before[key] != value],
    }
    return [
        f"dataset: {len(keys)} samples {what}: {', '.join(keys[:_NAMED])}{', ...' if len(keys) > _NAMED else ''}"
        for what, keys in found.items()
        if keys
    ] or ["dataset: its samples are the same, in another order"]


class _Digest:
    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, samples: list[Sample]) -> None:
        for sample in samples:
            self._hash.update(f"{sample.key}\0{sample.size}\0{sample.problem or ''}\0".encode())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _batched(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
