"""Every file and folder below a place, on a local disk or on storage that fsspec reaches, in one order.

Order: within a folder by the bytes of the names, a folder's contents in its place; so it depends on the names alone,
never on the file system. Memory: the names of one folder a level, never of all files.

Links: one that leads to a regular file inside the place is that file. Any other (to a folder, out of the place, to
nothing, in a circle) is not followed. A run folder of cdclean (it holds run.json and manifest.parquet) is passed
over, with all that is in it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from upath import UPath

from cdclean.errors import DatasetError
from cdclean.storage import Location, to_text

IMAGE_EXTENSIONS: frozenset[str] = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)  # lower case; compared without regard to case

Kind = Literal["image", "file", "folder", "link", "special", "unreadable"]

LINK_TO_FOLDER = "a link to a folder; links to folders are not followed"


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


def walk(root: Location) -> Iterator[Entry]:
    """Every entry below `root`, a folder before its contents. Raises DatasetError when `root` cannot be listed."""
    levels = [_top(root)]
    while levels:
        for entry, inside in levels[-1]:
            yield entry
            if entry.kind == "folder":
                prefix = f"{entry.relative}/"
                if isinstance(root, Path):
                    levels.append(_children(os.path.realpath(root), prefix, inside))
                else:
                    levels.append(_remote_children(root, prefix, inside))
                break
        else:
            levels.pop()


def top(root: Location) -> Iterator[Entry]:
    """The entries directly in `root`. Raises DatasetError when it cannot be listed."""
    return (entry for entry, _ in _top(root))


def _top(root: Location) -> Iterator[tuple[Entry, list[Any]]]:
    if isinstance(root, Path):
        return _children(os.path.realpath(root), "", root_names(root))
    try:
        return _remote_children(root, "", _remote_listing(root, ""))
    except (OSError, ValueError) as error:
        raise unreadable(root, error) from error


def _children(base: str, prefix: str, names: list[bytes]) -> Iterator[tuple[Entry, list[bytes]]]:
    """The entries for `names`, which lie in the folder `base`/`prefix`; with a folder, the names in it."""
    for name in names:
        relative = prefix + os.fsdecode(name)
        path = f"{base}/{relative}"
        image = is_image(relative)
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
            yield Entry(relative, "special", 0, f"a {special(status.st_mode)}, not a file"), []
        else:
            try:
                inside = _names(path)
            except OSError as error:
                problem = f"the folder cannot be listed: {_because(error)}"
                yield Entry(relative, "unreadable", 0, problem), []
            else:
                if not is_run(inside):
                    yield Entry(relative, "folder", 0), inside


def _link(base: str, relative: str) -> Entry:
    try:
        target = os.path.realpath(f"{base}/{relative}", strict=True)
        status = os.lstat(target)
    except OSError as error:
        return Entry(relative, "link", 0, f"a link that cannot be followed: {_because(error)}")
    if stat.S_ISDIR(status.st_mode):
        return Entry(relative, "link", 0, LINK_TO_FOLDER)
    if not target.startswith(base.rstrip("/") + "/"):
        return Entry(relative, "link", 0, "a link out of the dataset; such links are not followed")
    if not stat.S_ISREG(status.st_mode):
        return Entry(relative, "link", 0, f"a link to a {special(status.st_mode)}")
    return Entry(relative, "image" if is_image(relative) else "file", status.st_size, None, status.st_mtime)


def _names(folder: str) -> list[bytes]:
    return sorted(os.listdir(os.fsencode(folder)))  # noqa: PTH208  (bytes: the order we want, at half the memory)


def root_names(root: Path) -> list[bytes]:
    try:
        return _names(str(root))
    except OSError as error:
        raise unreadable(root, error) from error


def is_image(name: str) -> bool:
    return name[name.rfind(".") :].lower() in IMAGE_EXTENSIONS


def special(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "named pipe"
    return "socket" if stat.S_ISSOCK(mode) else "device"


def _because(error: OSError | ValueError) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(reason).lower() if getattr(error, "strerror", None) else str(reason)


def unreadable(root: Location, error: OSError | ValueError) -> DatasetError:
    shown = to_text(root)
    hint = f"Check who may read it: ls -ld {shown}" if isinstance(root, Path) else "Check the address and the access."
    return DatasetError(f"the dataset {shown} cannot be read: {_because(error)}", hint=hint)


def is_run(names: list[bytes]) -> bool:
    """Whether a folder with these names in it is a run folder."""
    return b"run.json" in names and b"manifest.parquet" in names


# --- Storage that fsspec reaches: files and folders alone, no links ---


def _remote_listing(root: UPath, relative: str) -> list[dict[str, Any]]:
    """What fsspec says of everything in one folder, sorted; its cache of listings would grow with the dataset."""
    folder = f"{root.path.rstrip('/')}/{relative}".rstrip("/")
    infos = [info for info in root.fs.ls(folder, detail=True) if info["name"].rstrip("/") != folder]
    root.fs.invalidate_cache(folder)
    return sorted(infos, key=lambda info: os.fsencode(_last(info)))


def _last(info: dict[str, Any]) -> str:
    return str(info["name"]).rstrip("/").rpartition("/")[2]


def _remote_children(
    root: UPath, prefix: str, infos: list[dict[str, Any]]
) -> Iterator[tuple[Entry, list[dict[str, Any]]]]:
    for info in infos:
        name = _last(info)
        relative = prefix + name
        if name in ("", ".", ".."):  # an object store allows them
            yield Entry(relative, "special", 0, f"its name is {name!r}, which is no file's"), []
        elif info["type"] != "directory":
            kind: Kind = "image" if is_image(relative) else "file"
            yield Entry(relative, kind, int(info.get("size") or 0), None, modified(info)), []
        else:
            try:
                inside = _remote_listing(root, relative)
            except OSError as error:
                yield Entry(relative, "unreadable", 0, f"the folder cannot be listed: {_because(error)}"), []
            else:
                if not is_run([os.fsencode(_last(each)) for each in inside]):
                    yield Entry(relative, "folder", 0), inside


def modified(info: dict[str, Any]) -> float | None:
    """When the file last changed; every file system has its own name for it."""
    for name in ("LastModified", "mtime", "updated", "last_modified", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
    return None
