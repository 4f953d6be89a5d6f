"""Tar shards -> shards of the same names without what was dropped; every member that stays keeps each of its bytes.

Members, their headers (pax and GNU extensions too) and their padding are copied as they are, in their order. A sample's
image, text, labels and masks stay or go together; what belongs together is decided by the code that reads datasets.
Members of no sample (folders, `__metadata__`, files without an ending) stay in their places in the clean copy. Left
out are samples that could not be scanned, links and devices, and members that a damaged shard has cut off. A shard
without a sample is not written.

Member names are copied within the tar and never made into paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdclean.datasets.sample import Dataset, Sample
from cdclean.datasets.tar import Member
from cdclean.datasets.webdataset import grouped, split
from cdclean.errors import InputError, UsageError
from cdclean.exporting.filled import Filled
from cdclean.exporting.places import refuse_bytes, refuse_collisions, refuse_unsafe
from cdclean.exporting.plan import CHANGED
from cdclean.exporting.tarring import LEFT_OUT, LOOSE, Layout, ShardWriter
from cdclean.storage import Location


def fill(
    samples: pa.Table,
    wanted: npt.NDArray[np.bool_],
    files: Sequence[str],
    target: Location,
    progress: Callable[[int], object],
    shard_size: int | None = None,
    *,
    loose: bool = True,
) -> Filled:
    """Write the wanted samples of the shards `files` to the empty folder `target`.

    samples: key, url, offset, size, content_hash; rows with other urls than `files` are not wanted.
    shard_size: write `shard-000000.tar` and so on, of this many samples each, instead of shards of the same names.
    loose: write the members of no sample too.

    Raises InputError where a sample is not what was scanned or a shard cannot be read, UsageError where two names are
    one in `target`, or two samples of the same key would become neighbours and so one sample.
    """
    names = _names(files)
    if shard_size is None:
        _refuse_names(names, files, target)
    emptied = []
    unscanned = 0
    key: str | None = None
    with ShardWriter(target, shard_size, loose, progress) as writer:
        for file, name, rows in zip(files, names, _rows_by_file(samples, wanted, files), strict=True):
            look = _Look(file, rows, None if shard_size is None else key)
            look.read(spread=shard_size is not None)
            look.check(samples)
            unscanned += look.unscanned
            if look.layout.samples:
                writer.add(file, name, look.layout, rows.hashes)
                key = look.key
            else:
                emptied.append(name)
    return Filled(writer.samples, writer.others, writer.bytes, tuple(emptied), unscanned)


@dataclass
class _Rows:
    """The samples of one shard."""

    by_offset: dict[int, int]  # offset of the image -> row
    hashes: dict[int, str | None]  # row -> SHA-256, of those wanted
    sizes: dict[int, int]  # the same


def _rows_by_file(samples: pa.Table, wanted: npt.NDArray[np.bool_], files: Sequence[str]) -> Iterator[_Rows]:
    """For each of `files`, one after another."""
    found: Any = pc.index_in(samples["url"], value_set=pa.array(files, pa.string()))
    number = pc.fill_null(found, -1).to_numpy()
    if (lost := wanted & (number < 0)).any():
        url = samples["url"][int(np.argmax(lost))].as_py()
        raise InputError(f"the run is damaged: {url} is not among the dataset's shards", hint="Scan it again.")
    order = np.argsort(number, kind="stable")
    borders = np.searchsorted(number[order], np.arange(len(files) + 1))
    offsets, sizes = samples["offset"].to_numpy(), samples["size"].to_numpy()
    hashes: Any = samples["content_hash"].combine_chunks()
    for begin, end in pairwise(borders.tolist()):
        rows = order[begin:end]
        rows = np.concatenate([rows[~wanted[rows]], rows[wanted[rows]]])  # of two with one offset the wanted one counts
        mine = rows[wanted[rows]]
        yield _Rows(
            dict(zip(offsets[rows].tolist(), rows.tolist(), strict=True)),
            dict(zip(mine.tolist(), hashes.take(pa.array(mine)).to_pylist(), strict=True)),
            dict(zip(mine.tolist(), sizes[mine].tolist(), strict=True)),
        )


# ---- Names


def _names(files: Sequence[str]) -> list[str]:
    """What the copies are called: the files' names, with their folders where these are not all the same."""
    paths = [file.partition("?")[0] if file.startswith(("http://", "https://")) else file for file in files]
    parts = [path.split("/") for path in paths]
    shared = 0
    for level in zip(*(part[:-1] for part in parts), strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


def _refuse_names(names: Sequence[str], files: Sequence[str], target: Location) -> None:
    seen: dict[str, str] = {}
    for name, file in zip(names, files, strict=True):
        if name in seen:
            raise UsageError(
                f"the copies of {seen[name]} and {file} would have the same name, {name}",
                hint="Give all shards new names with --shard-size.",
            )
        seen[name] = file
    array = pa.array(names, pa.string())
    refuse_unsafe(array)
    refuse_collisions(array, target)
    refuse_bytes(array, target)


# ---- What is in a shard


class _Look:
    """Decides what becomes of each member of a shard; reads headers, and nothing where no sample of it is wanted."""

    def __init__(self, file: str, rows: _Rows, key: str | None) -> None:
        self.layout = Layout()
        self.unscanned = 0
        self.key = key  # of the sample that was kept last
        self._file, self._rows = file, rows
        self._damage = ""

    def read(self, *, spread: bool) -> None:
        """`spread`: two samples of one key may follow one another, for they can be put into different shards."""
        if not self._rows.hashes:
            return
        before: str | None = None  # the key of the sample before this one, kept or not
        for sample, group in grouped(Dataset("", "webdataset", "", (self._file,))):
            if not group:  # this row stands for damage, which begins here
                self._damage = f": {sample.problem}"
                self.layout.cut(sample.offset)
                continue
            parts = split(group[0].name)
            if parts is None:
                self.layout.add(group[0], LOOSE if _is_plain(group[0]) else LEFT_OUT)
                continue
            row = self._rows.by_offset.get(sample.offset)
            if row is None or sample.problem is not None or row not in self._rows.hashes:
                self.unscanned += row is None and sample.problem is None
                for member in group:
                    self.layout.add(member, LEFT_OUT)
            else:
                self._check_size(sample, row)
                again = parts[0] == self.key
                if again and before != self.key and not spread:
                    raise _neighbours(self._file, parts[0])
                self.layout.add_sample(group, sample.offset, row, apart=again and spread)
                self.key = parts[0]
            before = parts[0]

    def check(self, samples: pa.Table) -> None:
        """Raises InputError unless all wanted samples are there."""
        if self.layout.samples == len(self._rows.hashes):
            return
        there = self.layout.rows()
        row = next(row for row in self._rows.hashes if row not in there)
        raise InputError(
            f"{samples['key'][row].as_py()} is not in {self._file} as it was when it was scanned{self._damage}",
            hint=CHANGED,
        )

    def _check_size(self, sample: Sample, row: int) -> None:
        size = self._rows.sizes[row]
        if sample.size != size:
            raise InputError(
                f"{sample.key} in {sample.url} has changed since the scan: {sample.size} bytes, not {size}",
                hint=CHANGED,
            )


def _is_plain(member: Member) -> bool:
    return member.kind == "file" and not member.name.startswith("/") and ".." not in member.name.split("/")


def _neighbours(file: str, key: str) -> UsageError:
    return UsageError(
        f"{file} holds several samples of the key {key!r}; without what lies between them they would become one",
        hint="Let them come into different shards: --shard-size 10000",
    )
