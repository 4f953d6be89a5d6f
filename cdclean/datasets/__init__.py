"""Datasets: a location -> its samples, each with the place of its bytes. Nothing here decodes, or imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from cdclean import storage
from cdclean.datasets import imagefolder, lists, tables, webdataset
from cdclean.datasets.sample import Access, Dataset, Kind, Sample
from cdclean.datasets.walking import IMAGE_EXTENSIONS, Entry, unreadable, walk
from cdclean.errors import UsageError

__all__ = [
    "IMAGE_EXTENSIONS",
    "Access",
    "Dataset",
    "Entry",
    "Sample",
    "class_names",
    "classes",
    "is_remainder",
    "open_dataset",
    "samples",
    "walk",
]

_MOST_CLASSES = 100_000  # a larger number is an identifier, not a label
_ROOMS: dict[Kind, ModuleType] = {
    "imagefolder": imagefolder,
    "webdataset": webdataset,
    "parquet": tables,
    "list": lists,
}


def open_dataset(*locations: str) -> Dataset:
    """The dataset at a location: a folder of images, a list, Parquet with images, or tar shards (also several).

    Raises DatasetError unless it holds an image, UsageError for a place that cannot be read from.
    """
    if not locations:
        raise UsageError("no dataset is given", hint="Give a folder, a list, or tar shards.")
    try:
        with storage.answering():
            return _recognised(locations)
    except OSError as error:
        raise unreadable(storage.locate(locations[0]), error) from error


def _recognised(locations: tuple[str, ...]) -> Dataset:
    first = locations[0]
    if len(locations) > 1 or webdataset.recognises(first):
        return webdataset.open_webdataset(locations)
    if lists.recognises(first):
        return lists.open_list(first)
    if tables.recognises(first):
        return tables.open_tables(first)
    return imagefolder.open_folder(first)


def samples(dataset: Dataset) -> Iterator[Sample]:
    """Every sample of `dataset`, lazily, in its own order; what images may hide behind is one too, with its problem.

    Raises DatasetError where the dataset is not there any more.
    """
    found: Iterator[Sample] = _ROOMS[dataset.kind].samples(dataset)
    return found


def classes(dataset: Dataset) -> list[str] | None:
    """The class names, where they are known before the samples: a label is an index into them."""
    names: list[str] | None = _ROOMS[dataset.kind].classes(dataset)
    return names


def is_remainder(key: str, url: str) -> bool:
    """Whether a row stands for what is missing of a file: of a damaged shard, or of a table that cannot be read."""
    name = url.rpartition("/")[2]
    return bool(name) and (f"/{key}".endswith(f"/{name}/") or key.startswith(f"{name}/@{name}:"))


def is_there(dataset: str) -> bool:
    """Whether a dataset's location can still be read: a disk that was unmounted leaves an empty folder."""
    place = storage.locate(storage.from_text(dataset))
    try:
        with storage.answering():
            return place.exists() and (not place.is_dir() or any(True for _ in place.iterdir()))
    except OSError:
        return False


def class_names(found: set[str]) -> list[str]:
    """The class names of a dataset that does not list them: numbers stand for themselves, other names are sorted."""
    numbers = [int(name) for name in found if name.isascii() and name.isdecimal() and name == str(int(name))]
    if found and len(numbers) == len(found) and max(numbers) < _MOST_CLASSES:
        return [str(number) for number in range(max(numbers) + 1)]
    return sorted(found)
