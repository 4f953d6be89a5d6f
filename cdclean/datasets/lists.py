"""A list of images: a CSV, TSV, JSON Lines or Parquet file with a path in every row, and a label if there is one.

The path is in the first of the columns `columns.PATHS` that the list has, the label in the first of `columns.LABELS`.
So a `metadata.csv` or `metadata.jsonl` beside the images, as Hugging Face `datasets` knows it, is such a list. Text is
UTF-8; in paths, bytes that are not are kept as they are, so any file can be named.

A path is relative to the folder of the list, or absolute, or a URL. A relative one that leads out of that folder, by
`..` or by a link, is not followed: who reads the list would not see it. Absolute paths and URLs say what they are,
and are read wherever they lead; but a remote list may not name files of this machine.

The key is the path as written, without `.`, `..` and doubled slashes. Where a path comes again, `#2`, `#3` ... is
added to its key: the row is a sample of its own. A row that names no file has the key `<list>#<row, from 1>`. There
is a sample for every row, also for one that cannot be read; only blank lines are passed over.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import fsspec

from cdclean.datasets.columns import PATHS, first, image_column
from cdclean.datasets.listed import SUFFIXES, Row, columns, is_text, rows, suffix
from cdclean.datasets.sample import Dataset, Sample
from cdclean.datasets.tables import DAMAGE, because, open_table
from cdclean.datasets.walking import modified, special
from cdclean.errors import DatasetError, UsageError
from cdclean.storage import URL, answering, from_text, is_local, locate, to_text

_REQUESTS = 32  # to remote storage at once
_AT_ONCE = (16, 4096)  # rows looked up together: at first, so that the first comes soon, and at most
_OUTSIDE = "its path leads out of the folder of the list by a link; such links are not followed"


def recognises(location: str) -> bool:
    """Whether `location` is a .csv, .tsv or .jsonl file, or a .parquet file without a column of images."""
    path = locate(location)
    if not suffix(path) or not path.is_file():
        return False
    if is_text(path):
        return True
    try:
        with open_table(path) as table:
            return image_column(table.schema_arrow) is None
    except (*DAMAGE, DatasetError):
        return False


def open_list(location: str) -> Dataset:
    """The dataset that the file at `location` lists. Raises DatasetError unless it names an image that is there."""
    path = locate(location)
    shown = to_text(path)
    if not path.is_file():
        raise DatasetError(f"the list {shown} does not exist", hint=f"A list is a file: {', '.join(SUFFIXES)}")
    names = columns(path)
    if first(names, PATHS) is None:
        raise DatasetError(
            f"the list {shown} has no column of paths; its columns are: {', '.join(names[:10]) or 'none'}",
            hint=f"Name the column one of: {', '.join(PATHS)}",
        )
    # Paths are relative to where the list is seen, so a link to a list is not followed.
    root = to_text(path.parent.resolve() / path.name if is_local(path) else path)
    dataset = Dataset(root, "list", to_text(path.name[: -len(suffix(path))]) or "dataset", (root,))
    problem: str | None = None
    for sample in samples(dataset):
        if sample.problem is None:
            return dataset
        problem = problem or f"{sample.key}: {sample.problem}"
    raise DatasetError(
        f"the list {shown} names no image that can be read: {problem or 'it has no rows'}",
        hint="Paths are relative to the folder of the list, or absolute, or URLs.",
    )


def samples(dataset: Dataset) -> Iterator[Sample]:
    """Every row of the list, in its order, with the size that its file has now.

    Raises DatasetError where the list cannot be read to its end.
    """
    find = _Finder(dataset.location)
    waiting = rows(dataset.root)
    size = _AT_ONCE[0]
    with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="list") as pool:
        while batch := list(islice(waiting, size)):
            remote = any(find.is_remote(row.path) for row in batch)
            yield from pool.map(find, batch) if remote else map(find, batch)
            size = min(2 * size, _AT_ONCE[1])


def classes(dataset: Dataset) -> None:
    """None: the classes of a list are those of its rows."""


@dataclass(frozen=True)
class _Found:
    size: int = 0
    problem: str | None = None
    modified: float | None = None


class _Finder:
    """Row -> its sample. May be called on any thread."""

    def __init__(self, location: str) -> None:
        self._list = location
        self._base = location[: location.rindex("/") + 1]
        self._local = is_local(locate(from_text(location)))
        self._folder = os.path.realpath(from_text(self._base)).rstrip("/") + "/" if self._local else ""
        self._real = functools.lru_cache(maxsize=4096)(os.path.realpath)

    def is_remote(self, path: str) -> bool:
        return not self._local or URL.match(path) is not None

    def __call__(self, row: Row) -> Sample:
        url, found = self._list, _Found(problem=row.problem)
        if row.problem is None:
            url, found = self._find(row.path)
        return Sample(row.key, url, 0, found.size, row.label, found.problem, modified=found.modified)

    def _find(self, path: str) -> tuple[str, _Found]:
        absolute = path.startswith("/")
        if not absolute and not URL.match(path):
            url = self._base + to_text(path)
            if url == self._list:
                return url, _Found(problem="the list itself")
            return url, self._below(path) if self._local else _remote(url)
        try:
            place = locate(path)
        except UsageError as error:
            return to_text(path), _Found(problem=error.message)
        if not is_local(place):
            return to_text(path), _remote(to_text(path))
        if not self._local:
            return to_text(path), _Found(problem="a file of this machine, in a list that is remote")
        return to_text(place), _local(str(place))

    def _below(self, relative: str) -> _Found:
        """A file in the folder of the list; links are followed as long as they stay in it."""
        path = self._folder + relative
        try:
            status = os.lstat(path)
            folder = self._real(os.path.dirname(path)) + "/"  # noqa: PTH120  (a string, once a file)
            if not folder.startswith(self._folder):
                return _Found(problem=_OUTSIDE)
            if stat.S_ISLNK(status.st_mode):
                target = os.path.realpath(path, strict=True)
                if not target.startswith(self._folder):
                    return _Found(problem=_OUTSIDE)
                status = os.lstat(target)
        except (OSError, ValueError) as error:
            return _Found(problem=f"cannot be examined: {because(error).lower()}")
        return _regular(status)


def _local(path: str) -> _Found:
    try:
        return _regular(os.stat(path))  # noqa: PTH116
    except (OSError, ValueError) as error:
        return _Found(problem=f"cannot be examined: {because(error).lower()}")


def _regular(status: os.stat_result) -> _Found:
    if stat.S_ISDIR(status.st_mode):
        return _Found(problem="a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        return _Found(problem=f"a {special(status.st_mode)}, not a file")
    return _Found(status.st_size, None, status.st_mtime)


def _remote(url: str) -> _Found:
    try:
        with answering():
            system, name = fsspec.core.url_to_fs(from_text(url))
            about: dict[str, Any] = system.info(name)
    except (OSError, ValueError) as error:
        return _Found(problem=f"cannot be examined: {because(error)}")
    if about.get("type") == "directory":
        return _Found(problem="a folder, not a file")
    size = about.get("size")
    if not isinstance(size, int):
        return _Found(problem="the server does not tell its size")
    return _Found(size, None, modified(about))
