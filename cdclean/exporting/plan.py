"""What goes where: one walk of the dataset as it is now, compared with what was scanned. Nothing is opened.

A million files are a few hundred bytes each in Arrow tables, and no Python object each.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cdclean.datasets import Entry, walk
from cdclean.errors import InputError, Status
from cdclean.exporting import remote
from cdclean.exporting.filled import Filled
from cdclean.exporting.places import MARKER
from cdclean.storage import Location, to_text

_ENTRIES = 1 << 14  # entries in memory at a time
_NAMED = 3  # files that a message names
# Images of kinds that are not read, by their names' ends: cameras, phones and the web have more than `walk` knows.
_UNREAD = r"(?i)\.(heic|heif|hif|avif|jxl|jxr|jp2|j2k|jpx|apng|tga|dng|cr2|cr3|nef|nrw|arw|orf|rw2|raf|pef|srw)$"

# What to do about data that are not as they were scored.
CHANGED = "Bring the dataset back to what was scanned, or score what has changed: the same scan with --extend."


class Fate(enum.IntEnum):
    """What becomes of a file. A sidecar has the largest fate among its samples."""

    UNSCANNED = 0  # not in the manifest
    LEFT_OUT = 1  # without a score, and not wanted
    DROPPED = 2
    KEPT = 3


_COLUMNS: list[pa.Field[Any]] = [
    pa.field("key", pa.string()),  # as in the manifest; for other files made in the same way
    pa.field("size", pa.int64()),
    pa.field("content_hash", pa.string()),  # null: whatever the file holds will do
    pa.field("fate", pa.int8()),
    pa.field("sample", pa.bool_()),  # else it is a sidecar, or a file that belongs to no sample
]
FILES = pa.schema(_COLUMNS)


@dataclass(frozen=True)
class Plan:
    root: Location
    files: pa.Table  # FILES, a row for every file of the dataset
    folders: list[str]  # below root, as os functions take them, each after the one that holds it
    emptied: tuple[str, ...]  # classes (text) that had samples, and keep none
    unscanned: int  # images that are not in the manifest
    skipped: int  # things that cannot be copied, and samples among them that were to be kept
    unread: int  # kept files that are images by their names, of kinds that no scan reads
    unread_named: tuple[str, ...]  # some of them

    def part(self, fate: Fate) -> pa.Table:
        """The rows of `files` that have this fate."""
        return self.files.filter(pa.array(self._has(fate)))

    def count(self, fate: Fate) -> Filled:
        """What `part` holds."""
        has = self._has(fate)
        samples = int(self.files["sample"].to_numpy()[has].sum())
        size = int(self.files["size"].to_numpy()[has].sum())
        return Filled(samples, int(has.sum()) - samples, size, self.emptied if fate is Fate.KEPT else ())

    def _has(self, fate: Fate) -> npt.NDArray[np.bool_]:
        has: npt.NDArray[np.bool_] = self.files["fate"].to_numpy() == fate
        return has


def fates(samples: pa.Table) -> npt.NDArray[np.int8]:
    """The fate of each sample, from the columns status, keep and problem."""
    scored = pc.equal(samples["status"], pa.scalar(Status.OK.value)).to_numpy()
    keep = samples["keep"].to_numpy() & samples["problem"].is_null().to_numpy()
    return np.select([keep, scored], [Fate.KEPT, Fate.DROPPED], Fate.LEFT_OUT).astype(np.int8)


def make(root: Location, samples: pa.Table, wanted: Collection[Fate]) -> Plan:
    """Compare the dataset at `root` with `samples`: key, status, content_hash, size, class_name, problem, keep.

    Raises InputError, naming the sample, where one with a wanted fate is gone or has another size.
    """
    images, others, folders, problems = _list(root)
    fate = fates(samples)
    rows = _rows(images["key"], samples["key"])
    known = rows >= 0
    _compare(images, samples, rows, np.isin(fate, list(wanted)))
    image_fate = np.where(known, fate[rows], Fate.UNSCANNED).astype(np.int8)
    hashes = samples["content_hash"]
    if not np.array_equal(rows, np.arange(samples.num_rows)):
        hashes = hashes.take(pa.array(rows, pa.int64(), mask=~known))
    other_fate = _sidecars(others, images, image_fate)
    table = pa.concat_tables(
        [
            _files(images, hashes, image_fate, sample=True),
            _files(others, pa.nulls(others.num_rows, pa.string()), other_fate, sample=False),
        ]
    )
    kept_others = others["key"].filter(pa.array(other_fate == Fate.KEPT))
    unread = kept_others.filter(pc.match_substring_regex(kept_others, _UNREAD))
    kept_problems = int((samples["keep"].to_numpy() & samples["problem"].is_valid().to_numpy()).sum())
    strange = pa.array(problems, pa.string())
    folded = pa.array([f"{key}/" for key in problems], pa.string())  # how the manifest names a folder
    unknown = (_rows(strange, samples["key"]) < 0) & (_rows(folded, samples["key"]) < 0)
    return Plan(
        root=root,
        files=table,
        folders=folders,
        emptied=_emptied(samples["class_name"], fate, {to_text(folder) for folder in folders if "/" not in folder}),
        unscanned=int((~known).sum()),
        skipped=kept_problems + int(unknown.sum()),
        unread=len(unread),
        unread_named=tuple(map(str, unread[:_NAMED].to_pylist())),
    )


def _list(root: Location) -> tuple[pa.Table, pa.Table, list[str], list[str]]:
    """Images and other files (key, size); folders; keys of what must not be opened."""
    layout = pa.schema(_COLUMNS[:2])
    tables: dict[str, list[pa.Table]] = {"image": [layout.empty_table()], "file": [layout.empty_table()]}
    waiting: dict[str, list[Entry]] = {"image": [], "file": []}
    folders, problems = [], []

    def store(kind: str) -> None:
        keys, sizes = [to_text(entry.relative) for entry in waiting[kind]], [entry.size for entry in waiting[kind]]
        tables[kind].append(pa.table([pa.array(keys, pa.string()), pa.array(sizes, pa.int64())], schema=layout))
        waiting[kind].clear()

    for entry in walk(root):
        if entry.problem is not None:
            problems.append(to_text(entry.relative))
        elif entry.kind == "folder":
            folders.append(entry.relative)
        elif entry.relative not in (remote.SUCCESS, MARKER):  # of an earlier export: they say nothing of this one
            waiting[entry.kind].append(entry)
            if len(waiting[entry.kind]) == _ENTRIES:
                store(entry.kind)
    store("image")
    store("file")
    return pa.concat_tables(tables["image"]), pa.concat_tables(tables["file"]), folders, problems


def _rows(keys: Any, among: Any) -> npt.NDArray[np.int64]:
    """Where each of `keys` is in `among`; -1 where it is not."""
    found: Any = pc.index_in(keys, value_set=among)
    rows: npt.NDArray[np.int64] = pc.fill_null(found, -1).to_numpy().astype(np.int64)
    return rows


def _compare(images: pa.Table, samples: pa.Table, rows: npt.NDArray[np.int64], wanted: npt.NDArray[np.bool_]) -> None:
    """Raises InputError unless every wanted sample is among the images, with the size that it had."""
    sizes = np.full(samples.num_rows, -1, dtype=np.int64)
    sizes[rows[rows >= 0]] = images["size"].to_numpy()[rows >= 0]
    expected = samples["size"].to_numpy()
    different = np.flatnonzero(wanted & (sizes != expected))
    if len(different):
        row = int(different[0])
        key = samples["key"][row].as_py()
        more = f", and so are {len(different) - 1} others" if len(different) > 1 else ""
        if sizes[row] < 0:
            hint = f"Is its folder still readable? {CHANGED}"
            raise InputError(f"{key} is gone since the scan{more}", hint=hint)
        raise InputError(
            f"{key} has changed since the scan: {sizes[row]} bytes, not {expected[row]}{more}", hint=CHANGED
        )


def _files(table: pa.Table, hashes: Any, fate: npt.NDArray[np.int8], *, sample: bool) -> pa.Table:
    flags = pa.array(np.full(table.num_rows, sample))
    return pa.table([table["key"], table["size"], hashes, pa.array(fate), flags], schema=FILES)


def _sidecars(others: pa.Table, images: pa.Table, fate: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """The fate of each other file: that of its samples, KEPT where it has none.

    From the name, one ending after the other is taken off until the name or the stem of an image in that folder is
    left: so the longest match decides.
    """
    result = np.full(others.num_rows, Fate.KEPT, dtype=np.int8)
    open_ = np.arange(others.num_rows)
    names: Any = others["key"]
    owners = (images["key"], _shorter(images["key"])) if others.num_rows else ()
    while len(open_):
        shorter = _shorter(names)
        distinct = shorter.unique()  # hash these, of which there may be few, and not the images
        best = np.full(len(distinct), -1, dtype=np.int8)
        for owner in owners:
            rows = _rows(owner, distinct)
            np.maximum.at(best, rows[rows >= 0], fate[rows >= 0])
        found = best[_rows(shorter, distinct)]
        changed = pc.not_equal(shorter, names).to_numpy()
        match = changed & (found >= 0)
        result[open_[match]] = found[match]
        on = changed & ~match
        names, open_ = shorter.filter(pa.array(on)), open_[on]
    return result


def _shorter(keys: Any) -> Any:
    """The keys without their last ending; a name that only begins with a dot has none."""
    return pc.replace_substring_regex(keys, r"([^/])\.[^./]*$", r"\1")


def _emptied(class_names: Any, fate: npt.NDArray[np.int8], folders: set[str]) -> tuple[str, ...]:
    """Classes that have a folder and samples, none of them kept."""
    kept = set(pc.unique(class_names.filter(pa.array(fate == Fate.KEPT))).to_pylist())
    return tuple(sorted(set(pc.unique(class_names).to_pylist()) & folders - kept))
