"""Where an export may be written to, and whether there is room."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from cdclean.errors import OutputError, UsageError
from cdclean.storage import to_text


def allowed(place: Path, *, dataset: Path, run: Path, folder: bool) -> Path:
    """`place` with links resolved; `folder` says whether a folder or a file is to stand there.

    Raises UsageError where writing to it, or replacing what is there, could harm what is not the export's own.
    """
    shown = to_text(place)
    try:
        path = place.resolve()
        is_folder, exists, is_mount = path.is_dir(), path.exists(), path.is_mount()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a folder that may not be entered
        raise UsageError(f"{shown} cannot be written to: {error}", hint="Choose another place.") from error
    for other, what in ((dataset.resolve(), "the dataset"), (run.resolve(), "the run folder")):
        if nested(path, other):
            raise UsageError(
                f"{shown} is, holds or lies in {what} {to_text(other)}, which is never written to",
                hint="Choose a place beside it.",
            )
    for other, what in ((Path.home(), "the home folder"), (Path.cwd(), "the folder you are in")):
        if _within(other.resolve(), path):  # the root folder holds them all
            raise UsageError(f"{shown} is or holds {what}, {to_text(other)}", hint="Choose a new folder.")
    if exists and is_folder != folder:
        is_, should = ("a folder", "a list is a file") if is_folder else ("a file", "a clean copy is a folder")
        raise UsageError(f"{shown} is {is_}, and {should}", hint="Choose another place.")
    if is_mount:
        raise UsageError(
            f"{shown} is a mount point, which cannot be replaced",
            hint=f"Choose a folder in it: {shown}/clean",
        )
    return path


def nested(one: Path, other: Path) -> bool:
    """Whether one of two resolved paths is the other, or lies below it."""
    return _within(one, other) or _within(other, one)


def _within(inner: Path, outer: Path) -> bool:
    """By name, and by identity too: a folder can have two names (bind mounts, disks that ignore case)."""
    if inner.is_relative_to(outer):
        return True
    for path in (inner, *inner.parents):
        with suppress(OSError):
            if path.samefile(outer):
                return True
    return False


def refuse_taken(place: Path, overwrite: bool) -> None:
    """Raises UsageError where something is at `place` (an empty folder is nothing), unless it may be overwritten."""
    taken = any(place.iterdir()) if place.is_dir() else place.exists()
    if taken and not overwrite:
        raise UsageError(
            f"{to_text(place)} is already there", hint="Choose another place with --out, or replace it: --overwrite"
        )


def make_parent(place: Path) -> None:
    """Make the folder that is to hold `place`. Raises OutputError where that fails."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the folder {to_text(place.parent)}: {error.strerror}", hint="Choose another place."
        ) from error


def check_space(sizes: Mapping[Path, int]) -> None:
    """Raises OutputError where the bytes that each place is to hold do not fit on its disk."""
    need: Counter[int] = Counter()
    where: dict[int, Path] = {}
    for place, size in sizes.items():
        folder = next(path for path in place.parents if path.is_dir())
        device = folder.stat().st_dev
        need[device] += size
        where[device] = folder
    for device, folder in where.items():
        free = shutil.disk_usage(folder).free
        if need[device] > free:
            raise OutputError(
                f"the copy takes {_size(need[device])}, and the disk of {to_text(folder)} has {_size(free)} free",
                hint="Free space, choose another place with --out, or take --mode hardlink, symlink or list.",
            )


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e3:,.1f} kB"
