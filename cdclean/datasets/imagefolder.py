"""ImageFolder: a folder whose top-level folders are the classes, images at any depth below them.

Order: within a folder by the bytes of the names, a folder's contents in its place; so it depends on the names alone,
never on the file system. Memory: the names of one folder a level, never of all files.

Links: one that leads to a regular file inside the dataset is that file. Any other (to a folder, out of the dataset,
to nothing, in a circle) is not followed and becomes a sample with a `problem`. A run folder of cdclean that lies in
the dataset (it holds run.json and manifest.parquet) is passed over, with all that is in it.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cdclean.datasets.sample import Dataset, Sample
from cdclean.errors import DatasetError
from cdclean.storage import from_text, local_path, to_text

IMAGE_EXTENSIONS: frozenset[str] = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)  # lower case; compared without regard to case

Kind = Literal["image", "file", "folder", "link", "special", "unreadable"]

_ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
_LINK_TO_FOLDER = "a link to a folder; links to folders are not followed"


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in the folder.

    A link that is followed is the image or file that it leads to. An entry with a `problem` must not be opened: a
    `link` that is not followed, something `special` (named pipe, socket, device), an `unreadable` folder, or an
    image that lies in a folder that cannot be entered.
    """

    relative: str  # path below the root, with surrogate escapes, as os functions take it
    kind: Kind
    size: int  # in bytes; 0 for all but image and file
    problem: str | None = None
    modified: float | None = None  # seconds since 1970


def open_dataset(location: str) -> Dataset:
    """The dataset at `location`, a local folder. Raises DatasetError unless it holds an image, UsageError for a URL."""
    path = local_path(location)
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
        raise _refused(path, error) from error
    if not stat.S_ISDIR(mode):
        what = "file" if stat.S_ISREG(mode) else _special(mode)
        raise DatasetError(
            f"the dataset {shown} is a {what}, not a folder",
            hint="Give the folder that holds the images, one subfolder a class; unpack an archive first.",
        )
    root = Path(os.path.realpath(path))
    if _is_run(_root_names(root)):
        raise DatasetError(
            f"{shown} is a run folder of cdclean, not a dataset",
            hint="Give the folder of images that was scanned; for the state of this run: cdclean status",
        )
    name = path.name if path.name not in ("", "..") else root.name
    dataset = Dataset(to_text(root), "imagefolder", to_text(name) or "dataset")
    if not any(sample.problem is None for sample in samples(dataset)):
        raise _no_images(root, shown)
    return dataset


def samples(dataset: Dataset) -> Iterator[Sample]:
    """Every sample of `dataset`, lazily, in the order of its folder.

    What images may hide behind is a sample too, with its problem: a folder that cannot be listed, a link that is not
    followed. Raises DatasetError when the dataset's own folder cannot be listed.
    """
    base = dataset.location.rstrip("/") + "/"
    for entry in walk(Path(from_text(dataset.location))):
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
    root = Path(from_text(dataset.location))
    found = []
    for entry, _ in _children(str(root), "", _root_names(root)):
        folder = entry.kind == "folder"
        if folder and entry.relative.startswith("."):
            folder = any(_is_sample(inside) for inside in walk(root / entry.relative))
        if folder or _is_closed_folder(entry):
            found.append(to_text(entry.relative))
    return found


def walk(root: Path) -> Iterator[Entry]:
    """Every entry below `root`, a folder before its contents. Raises DatasetError when `root` cannot be listed."""
    base = os.path.realpath(root)
    levels = [_children(base, "", _root_names(root))]
    while levels:
        for entry, names in levels[-1]:
            yield entry
            if entry.kind == "folder":
                levels.append(_children(base, f"{entry.relative}/", names))
                break
        else:
            levels.pop()


def _children(base: str, prefix: str, names: list[bytes]) -> Iterator[tuple[Entry, list[bytes]]]:
    """The entries for `names`, which lie in the folder `base`/`prefix`; with a folder, the names in it."""
    for name in names:
        relative = prefix + os.fsdecode(name)
        path = f"{base}/{relative}"
        image = _is_image(relative)
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue  # gone since its folder was listed
        except OSError as error:
            # Its folder can be listed but not entered. Without an image's name it may be a folder of images.
            kind: Kind = "image" if image else "unreadable"
            yield Entry(relative, kind, 0, f"cannot be examined: {_because(error)}"), []
            continue
        if stat.S_ISREG(status.st_mode):
            yield Entry(relative, "image" if image else "file", status.st_size, None, status.st_mtime), []
        elif stat.S_ISLNK(status.st_mode):
            yield _link(base, relative), []
        elif not stat.S_ISDIR(status.st_mode):
            yield Entry(relative, "special", 0, f"a {_special(status.st_mode)}, not a file"), []
        else:
            try:
                inside = _names(path)
            except OSError as error:
                problem = f"the folder cannot be listed: {_because(error)}"
                yield Entry(relative, "unreadable", 0, problem), []
            else:
                if not _is_run(inside):
                    yield Entry(relative, "folder", 0), inside


def _link(base: str, relative: str) -> Entry:
    try:
        target = os.path.realpath(f"{base}/{relative}", strict=True)
        status = os.lstat(target)
    except OSError as error:
        return Entry(relative, "link", 0, f"a link that cannot be followed: {_because(error)}")
    if stat.S_ISDIR(status.st_mode):
        return Entry(relative, "link", 0, _LINK_TO_FOLDER)
    if not target.startswith(base.rstrip("/") + "/"):
        return Entry(relative, "link", 0, "a link out of the dataset; such links are not followed")
    if not stat.S_ISREG(status.st_mode):
        return Entry(relative, "link", 0, f"a link to a {_special(status.st_mode)}")
    return Entry(relative, "image" if _is_image(relative) else "file", status.st_size, None, status.st_mtime)


def _names(folder: str) -> list[bytes]:
    return sorted(os.listdir(os.fsencode(folder)))  # noqa: PTH208  (bytes: the order we want, at half the memory)


def _root_names(root: Path) -> list[bytes]:
    try:
        return _names(str(root))
    except OSError as error:
        raise _refused(root, error) from error


def _is_image(name: str) -> bool:
    return name[name.rfind(".") :].lower() in IMAGE_EXTENSIONS


def _is_closed_folder(entry: Entry) -> bool:
    return entry.kind == "unreadable" or entry.problem == _LINK_TO_FOLDER


def _is_sample(entry: Entry) -> bool:
    """Whether the entry is an image, or images may hide behind it."""
    if entry.problem is None:
        return entry.kind == "image"
    return _is_closed_folder(entry) or _is_image(entry.relative)


def _is_run(names: list[bytes]) -> bool:
    return b"run.json" in names and b"manifest.parquet" in names


def _special(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "named pipe"
    return "socket" if stat.S_ISSOCK(mode) else "device"


def _because(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()


def _refused(path: Path, error: OSError) -> DatasetError:
    shown = to_text(path)
    return DatasetError(
        f"the dataset {shown} cannot be read: {_because(error)}", hint=f"Check who may read it: ls -ld {shown}"
    )


def _similar(path: Path) -> str:
    try:
        folders = [inside.name for inside in path.parent.iterdir() if inside.is_dir()]
    except OSError:
        folders = []
    near = difflib.get_close_matches(path.name, folders, n=3)
    if near:
        return "Did you mean " + " or ".join(to_text(path.with_name(name)) for name in near) + "?"
    return f"Check the path; you are in {to_text(Path.cwd())}"


def _no_images(root: Path, shown: str) -> DatasetError:
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
