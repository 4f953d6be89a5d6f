"""ImageFolder: a folder whose top-level folders are the classes, images at any depth below them.

Without folders in it, it is a flat folder: its images have no label. What is not followed (links out of the dataset,
see walking.py) becomes a sample with a `problem`.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cdclean.datasets.sample import Dataset, Sample
from cdclean.datasets.walking import (
    IMAGE_EXTENSIONS,
    LINK_TO_FOLDER,
    Entry,
    is_image,
    is_run,
    root_names,
    special,
    top,
    unreadable,
    walk,
)
from cdclean.errors import DatasetError
from cdclean.storage import Location, locate, to_text

_ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}


def open_folder(location: str) -> Dataset:
    """The folder at `location`. Raises DatasetError unless it holds an image."""
    path = locate(location)
    root, name = _local_root(path) if isinstance(path, Path) else (path, path.name)
    dataset = Dataset(to_text(root).rstrip("/") or "/", "imagefolder", to_text(name) or "dataset")
    if not any(sample.problem is None for sample in samples(dataset)):
        raise _no_images(root, to_text(path))
    return dataset


def _local_root(path: Path) -> tuple[Path, str]:
    """The folder with links resolved, and its name. Raises DatasetError where it is none."""
    shown = to_text(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise DatasetError(
                f"the dataset {shown} is a link that leads nowhere",
                hint=f"See where it points: ls -l {shown}",
            ) from None
        raise DatasetError(f"the dataset {shown} does not exist", hint=_similar(path)) from None
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISDIR(mode):
        what = "file" if stat.S_ISREG(mode) else special(mode)
        raise DatasetError(
            f"the dataset {shown} is a {what}, not a folder",
            hint="Give a folder of images, one subfolder a class; tar shards; or a list (.csv, .jsonl, .parquet).",
        )
    root = Path(os.path.realpath(path))
    if is_run(root_names(root)):
        raise DatasetError(
            f"{shown} is a run folder of cdclean, not a dataset",
            hint="Give the folder of images that was scanned; for the state of this run: cdclean status",
        )
    return root, path.name if path.name not in ("", "..") else root.name


def samples(dataset: Dataset) -> Iterator[Sample]:
    """Every sample of `dataset`, lazily, in the order of its folder.

    What images may hide behind is a sample too, with its problem: a folder that cannot be listed, a link that is not
    followed. Raises DatasetError when the dataset's own folder cannot be listed.
    """
    base = dataset.location.rstrip("/") + "/"
    for entry in walk(dataset.root):
        if _is_sample(entry):
            key = to_text(entry.relative) + ("/" if _is_closed_folder(entry) else "")
            top, slash, _ = key.partition("/")
            class_name = top if slash else None
            yield Sample(key, base + key, 0, entry.size, class_name, entry.problem, modified=entry.modified)


def classes(dataset: Dataset) -> list[str]:
    """The class names; a label is an index into them. As in torchvision, the sorted names of the top-level folders.

    Empty folders and links to folders count, so that no label changes when a class is emptied or moved away. A hidden
    folder (.git, .cache, .ipynb_checkpoints) counts only if there is a sample in it. Raises DatasetError.
    """
    found = []
    for entry in top(dataset.root):
        folder = entry.kind == "folder"
        if folder and entry.relative.startswith("."):
            folder = any(_is_sample(inside) for inside in walk(dataset.root / entry.relative))
        if folder or _is_closed_folder(entry):
            found.append(to_text(entry.relative))
    return found


def _is_closed_folder(entry: Entry) -> bool:
    return entry.kind == "unreadable" or entry.problem == LINK_TO_FOLDER


def _is_sample(entry: Entry) -> bool:
    """Whether the entry is an image, or images may hide behind it."""
    if entry.problem is None:
        return entry.kind == "image"
    return _is_closed_folder(entry) or is_image(entry.relative)


def _similar(path: Path) -> str:
    try:
        folders = [inside.name for inside in path.parent.iterdir() if inside.is_dir()]
    except OSError:
        folders = []
    near = difflib.get_close_matches(path.name, folders, n=3)
    if near:
        return "Did you mean " + " or ".join(to_text(path.with_name(name)) for name in near) + "?"
    return f"Check the path; you are in {to_text(Path.cwd())}"


def _no_images(root: Location, shown: str) -> DatasetError:
    """What the folder holds instead, and what to do about it."""
    extensions: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    folders = 0
    for entry in walk(root):
        folders += entry.kind == "folder"
        if entry.problem is not None:
            problems[entry.problem] += 1
        elif entry.kind == "file":
            extensions[Path(entry.relative).suffix.lower() or "without extension"] += 1
    if not (extensions or problems or folders):
        return DatasetError(f"the dataset {shown} is empty", hint="Give a folder of images, one subfolder a class.")
    found = [f"{count} {to_text(extension)}" for extension, count in extensions.most_common(5)]
    if len(extensions) > 5:
        found.append(f"{len(extensions) - 5} other kinds of file")
    found += [f"{count} x {problem}" for problem, count in problems.most_common(3)]
    if folders:
        found.append("1 folder" if folders == 1 else f"{folders} folders")
    if extensions.keys() & _ARCHIVES:
        hint = "Unpack the archives and give the folder of images."
    elif problems:
        hint = "Copy or mount what the links lead to into the dataset, or mend the permissions."
    else:
        hint = f"Images are files with one of these extensions: {' '.join(sorted(IMAGE_EXTENSIONS))}"
    return DatasetError(f"the dataset {shown} holds no image that can be read; it holds {', '.join(found)}", hint=hint)
