"""Which samples of a dataset are taken: by key, by age, by a marker that an upload is complete, at most so many."""

from __future__ import annotations

import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import islice

from cdclean import datasets
from cdclean.config import Intake
from cdclean.datasets.sample import Dataset, Sample
from cdclean.errors import UsageError
from cdclean.storage import from_text, locate


def admitted(dataset: Dataset, intake: Intake) -> Iterator[Sample]:
    """The samples of `dataset` that `intake` lets in, lazily, in their order.

    Raises UsageError at the end where no key is as wanted.
    """
    now = time.time()
    markers = _Markers(dataset, intake.require_marker)
    found = (
        sample
        for sample in _named(dataset, intake)
        # Without a least age no clock is asked: a file's may be ahead of this one.
        if (not intake.min_age or sample.modified is None or now - sample.modified >= intake.min_age)
        and (intake.require_marker is None or markers.has(sample.url))
    )
    return islice(found, intake.limit)


def _named(dataset: Dataset, intake: Intake) -> Iterator[Sample]:
    first: str | None = None
    named = False
    for sample in datasets.samples(dataset):
        first = first or sample.key
        if is_named(sample.key, intake):
            named = True
            yield sample
    if first is not None and not named:
        patterns = [f"--include {each}" for each in intake.include] + [f"--exclude {each}" for each in intake.exclude]
        raise UsageError(
            f"no sample of the dataset is taken with {' '.join(patterns)}",
            hint=f"Patterns are compared with whole keys, such as {first!r}.",
        )


def is_named(key: str, intake: Intake) -> bool:
    """Whether the patterns let a key in."""
    if intake.include and not any(fnmatchcase(key, pattern) for pattern in intake.include):
        return False
    return not any(fnmatchcase(key, pattern) for pattern in intake.exclude)


class _Markers:
    """Whether a marker stands beside a file or in a folder above it; asked once a folder.

    Nothing above the folder that was given is looked at. A list, or Parquet that is one file, stands for its folder;
    shards lie directly in theirs, or were named one by one: their marker stands beside them.
    """

    def __init__(self, dataset: Dataset, name: str | None) -> None:
        is_file = dataset.location in dataset.files
        self._top = dataset.location.rpartition("/")[0] if is_file else dataset.location
        self._climbs = dataset.kind != "webdataset"
        self._name = name
        self._known: dict[str, bool] = {}

    def has(self, url: str) -> bool:
        folder = url.rpartition("/")[0]
        if folder not in self._known:
            above = self._climbs and folder.startswith(self._top + "/") and self.has(folder)
            self._known[folder] = above or (locate(from_text(folder)) / str(self._name)).exists()
        return self._known[folder]
