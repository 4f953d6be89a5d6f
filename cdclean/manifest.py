"""The manifest: one row per sample of the dataset, divided into chunks; written when a run begins or is extended."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from tempfile import TemporaryFile, gettempdir
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdclean import datasets, schema, storage
from cdclean.datasets import Access, Sample
from cdclean.errors import OutputError
from cdclean.storage import Location

_ROWS = 1 << 16  # rows a row group, and samples in memory at a time
_NAMED = 3  # samples that a message names


@dataclass(frozen=True)
class Index:
    """What indexing found."""

    samples: int
    chunks: int
    classes: tuple[str, ...]
    digest: str  # over key, size, problem and class of every sample, whatever their order


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
    access: Access


def write(
    path: Location,
    samples: Iterable[Sample],
    classes: list[str] | None,
    chunk_size: int,
    advance: Callable[[int], object],
) -> Index:
    """Write `samples`, `chunk_size` a chunk; memory does not grow with their number.

    `classes` None: they are known when all samples have been seen. Then a draft on the local disk is labelled.
    """
    digest, names, count = Digest(), set[str | None](), 0
    with TemporaryFile() as draft:
        writer = pq.ParquetWriter(draft, schema.MANIFEST, compression="zstd")
        try:
            for batch in batched(samples):
                chunks = (count + np.arange(len(batch))) // chunk_size
                table = to_table(batch, chunks)
                digest.update(table)
                names |= set(pc.unique(table["class_name"]).to_pylist())
                with _drafting():
                    writer.write_table(table)
                count += len(batch)
                advance(len(batch))
            with _drafting():
                writer.close()
        except BaseException:
            with suppress(OSError):
                writer.close()  # or it would write into the closed draft when it is collected
            raise
        named = classes if classes is not None else datasets.class_names({name for name in names if name is not None})
        write_labelled(path, _tables(draft), named)
    return Index(count, -(-count // chunk_size), tuple(named), digest.hexdigest())


@contextmanager
def _drafting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write to the temporary folder {gettempdir()}: {error.strerror or error}",
            hint="Free space there, or name another: TMPDIR=/large/disk cdclean scan ...",
        ) from error


def to_table(batch: list[Sample], chunks: npt.NDArray[np.int64]) -> pa.Table:
    """Samples as rows of the manifest, not labelled yet."""
    columns: dict[str, Any] = {
        name: [getattr(sample, name) for sample in batch]
        for name in ("key", "url", "offset", "size", "class_name", "problem", "access")
    }
    columns |= {"label": pa.nulls(len(batch), pa.int64()), "chunk": chunks.astype(np.int32)}
    return pa.table({name: columns[name] for name in schema.MANIFEST.names}, schema=schema.MANIFEST)


def write_labelled(path: Location, tables: Iterable[pa.Table], classes: list[str]) -> None:
    """Write rows of the manifest, each with the index of its class among `classes`."""
    names = pa.array(classes, pa.string())
    with storage.atomic_write(path) as file, pq.ParquetWriter(file, schema.MANIFEST, compression="zstd") as writer:
        for table in tables:
            # A null would be found among the names only if there were a null in them.
            labels = pc.cast(pc.index_in(table["class_name"], value_set=names), pa.int64())
            position = schema.MANIFEST.get_field_index("label")
            writer.write_table(
                table.set_column(position, schema.MANIFEST.field(position), labels), row_group_size=_ROWS
            )


def _tables(draft: IO[bytes]) -> Iterator[pa.Table]:
    draft.seek(0)
    with pq.ParquetFile(draft) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def read_chunk(path: Location, chunk: int) -> list[Job]:
    """The samples of one chunk, in order; only the row groups that hold them are read."""
    return _jobs(path, pc.field("chunk") == chunk)


def find(path: Location, key: str) -> Job | None:
    """The sample of that key, if there is one."""
    return next(iter(_jobs(path, pc.field("key") == key)), None)


def _jobs(path: Location, where: pc.Expression) -> list[Job]:
    with path.open("rb") as file:
        table = pq.read_table(file, columns=list(Job.__dataclass_fields__), filters=where)
    return [Job(**row) for row in table.to_pylist()]


def damaged(path: Location) -> list[str]:
    """A sentence for every file of which something is missing: a cut shard, a table that cannot be read."""
    jobs = _jobs(path, ~pc.field("problem").is_null())
    return [_missing(job) for job in jobs if datasets.is_remainder(job.key, job.url)]


def _missing(job: Job) -> str:
    name, problem = job.url.rpartition("/")[2], str(job.problem)
    where = problem.partition(",")[0]  # "damaged at byte 512"
    if where.startswith("damaged at byte "):
        return f"{name} is {where}: what is behind it is missing from the run"
    return f"{name}: {problem}: what is in it is missing from the run"


def chunk_sizes(path: Location) -> dict[int, int]:
    """Chunk -> its number of samples."""
    with path.open("rb") as file:
        chunks = pq.read_table(file, columns=["chunk"])["chunk"]
    numbers, counts = np.unique(chunks.to_numpy(), return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def changes(path: Location, samples: Callable[[], Iterable[Sample]], digest: str, *, added: bool = True) -> list[str]:
    """How a dataset differs from the manifest at `path`, whose digest is given; empty if it does not.

    `samples` lists the dataset; what came into it counts only if `added`. Names, sizes and labels are compared; bytes
    are compared with their hashes when a copy is written. A digest of an older kind says nothing: the rows do.
    """
    now = Digest()
    for batch in batched(samples()):
        now.update(to_table(batch, np.zeros(len(batch), np.int64)))
    if now.hexdigest() == digest:
        return []
    with path.open("rb") as file:
        table = pq.read_table(file, columns=["key", "size", "problem", "class_name"])
    keys, sizes, problems, names = (table[name].to_pylist() for name in ("key", "size", "problem", "class_name"))
    before = dict(zip(keys, zip(sizes, problems, strict=True), strict=True))
    classes = dict(zip(keys, names, strict=True))
    after, labels = {}, {}
    for sample in samples():
        after[sample.key], labels[sample.key] = (sample.size, sample.problem), sample.class_name
    found: dict[str, list[str]] = {
        "added": [key for key in after if key not in before] if added else [],
        "removed": [str(key) for key in before if key not in after],
        "changed": [key for key, value in after.items() if key in before and before[key] != value],
        "labelled otherwise": [key for key, name in labels.items() if key in classes and classes[key] != name],
    }
    return [
        f"dataset: {len(keys)} samples {what}: {', '.join(keys[:_NAMED])}{', ...' if len(keys) > _NAMED else ''}"
        for what, keys in found.items()
        if keys
    ]


class Digest:
    """Over key, size, problem and class of samples: the sum of their SHA-256, so that no order is in it."""

    def __init__(self) -> None:
        self._sum = 0

    def update(self, table: pa.Table) -> None:
        columns = (table[name].to_pylist() for name in ("key", "size", "problem", "class_name"))
        for key, size, problem, class_name in zip(*columns, strict=True):
            label = "" if class_name is None else f"{class_name}\0"
            each = hashlib.sha256(f"{key}\0{size}\0{problem or ''}\0{label}".encode())
            self._sum += int.from_bytes(each.digest(), "big")

    def hexdigest(self) -> str:
        return f"{self._sum % 2**256:064x}"


def batched(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Samples, so many at a time as stand in memory."""
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == _ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
