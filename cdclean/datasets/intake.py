"""Which samples of a dataset are taken: by key, by age, by a marker that an upload is complete, at most so many."""

from __future__ import annotations

import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import islice

from cdclean import datasets
from cdclean.config import Intake
from cdclean.datasets.sample import Dataset, Sample
from cdclean.storage import from_text, locate


def admitted(dataset: Dataset, intake: Intake) -> Iterator[Sample]:
    """The samples of `dataset` that `intake` lets in, lazily, in their order."""
    now = time.time()
    markers = _Markers(dataset, intake.require_marker)
    found = (
        sample
        for sample in datasets.samples(dataset)
        if _is_named(sample.key, intake)
        and (sample.modified is None or now - sample.modified >= intake.min_age)
        and (intake.require_marker is None or markers.has(sample.url))
    )
    return islice(found, intake.limit)


def _is_named(key: str, intake: Intake) -> bool:
    if intake.include and not any(fnmatchcase(key, pattern) for pattern in intake.include):
        return False
    return not any(fnmatchcase(key, pattern) for pattern in intake.exclude)


class _Markers:
    """Whether a marker stands beside a file or in a folder above it, within the dataset; asked once a folder."""

    def __init__(self, dataset: Dataset, name: str | None) -> None:
        # For a dataset that is one file, a list say, the marker stands beside that.
        self._top = dataset.location if dataset.kind == "imagefolder" else dataset.location.rpartition("/")[0]
        self._name = name
        self._known: dict[str, bool] = {}

    def has(self, url: str) -> bool:
        folder = url.rpartition("/")[0]
        if folder not in self._known:
            above = folder != self._top and folder.startswith(self._top + "/") and self.has(folder)
            self._known[folder] = above or (locate(from_text(folder)) / str(self._name)).exists()
        return self._known[folder]
