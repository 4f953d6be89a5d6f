"""Where an export may be written to, and whether there is room."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cdclean.errors import OutputError, UsageError
from cdclean.exporting import remote
from cdclean.exporting.lists import is_list
from cdclean.storage import Location, answering, from_text, is_within, to_text

MARKER = ".cdclean-copy"  # an empty file in every copy: what has none is not replaced
_PROBE = ".cdclean-probe"
_NEW = "Choose another place."
_BESIDE = "Choose a place beside it."


@dataclass(frozen=True)
class Closed:
    """A folder that is never written to. `inside`: nor is any place in it."""

    folder: Location
    what: str
    inside: bool = True


def allowed(place: Location, closed: Iterable[Closed], *, folder: bool) -> Location:
    """`place` with links resolved; `folder` says whether a folder or a file is to stand there.

    Raises UsageError where writing to it, or replacing what is there, could harm what is not the export's own.
    """
    if isinstance(place, Path):
        return _allowed_here(place, closed, folder)
    remote.refuse_unfit(place)
    for each in closed:
        if is_within(each.folder, place) or (each.inside and is_within(place, each.folder)):
            raise _refused(place, each)
    is_folder = remote.any_object(place)
    if is_folder != folder and (is_folder or remote.is_object(place)):
        raise _wrong_kind(place, is_folder)
    return place


def _allowed_here(place: Path, closed: Iterable[Closed], folder: bool) -> Path:
    shown = to_text(place)
    try:
        path = place.resolve()
        is_folder, exists, is_mount = path.is_dir(), path.exists(), path.is_mount()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a folder that may not be entered
        raise UsageError(f"{shown} cannot be written to: {error}", hint=_NEW) from error
    for each in closed:
        if isinstance(each.folder, Path) and (each.inside or exists):
            other = each.folder.resolve()
            if is_within(other, path) or (each.inside and is_within(path, other)):
                raise _refused(place, each)
    for other, what in ((Path.home(), "the home folder"), (Path.cwd(), "the folder you are in")):
        if is_within(other.resolve(), path):  # the root folder holds them all
            raise UsageError(f"{shown} is or holds {what}, {to_text(other)}", hint="Choose a new folder.")
    if exists and is_folder != folder:
        raise _wrong_kind(place, is_folder)
    if is_mount:
        raise UsageError(
            f"{shown} is a mount point, which cannot be replaced",
            hint=f"Choose a folder in it: {shown}/clean",
        )
    return path


def _refused(place: Location, closed: Closed) -> UsageError:
    relation = "is, holds or lies in" if closed.inside else "is or holds"
    return UsageError(
        f"{to_text(place)} {relation} {closed.what} {to_text(closed.folder)}, which is never written to", hint=_BESIDE
    )


def _wrong_kind(place: Location, is_folder: bool) -> UsageError:
    is_, should = ("a folder", "a list is a file") if is_folder else ("a file", "a clean copy is a folder")
    return UsageError(f"{to_text(place)} is {is_}, and {should}", hint=_NEW)


def nested(one: Location, other: Location) -> bool:
    """Whether one of two places, as `allowed` gives them, is the other, or lies below it."""
    return is_within(one, other) or is_within(other, one)


def is_taken(place: Location) -> bool:
    """Whether something is at `place`; an empty folder is nothing."""
    if isinstance(place, Path):
        return any(place.iterdir()) if place.is_dir() else place.exists()
    return remote.is_object(place) or remote.any_object(place)


def refuse_taken(place: Location, overwrite: bool) -> None:
    """Raises UsageError where something is at `place`, unless it is an earlier copy that may be overwritten."""
    if not is_taken(place):
        return
    if not overwrite:
        raise UsageError(
            f"{to_text(place)} is already there", hint="Choose another place with --out, or replace it: --overwrite"
        )
    if not _is_copy(place):
        raise UsageError(
            f"{to_text(place)} is not a copy that cdclean wrote, so --overwrite does not replace it",
            hint="Choose another place, or remove it yourself.",
        )


def _is_copy(place: Location) -> bool:
    """Whether what is at `place` was written by an export, as far as one can see: a folder's marker, a list's head."""
    try:
        with answering():
            marked = (place / MARKER).exists() if _is_folder(place) else is_list(place)
    except OSError as error:
        raise OutputError(f"{to_text(place)} cannot be looked at: {error.strerror or error}", hint=_NEW) from error
    return marked


def _is_folder(place: Location) -> bool:
    """Whether there is a folder at `place`, or, on remote storage, objects below it."""
    return place.is_dir() if isinstance(place, Path) else remote.any_object(place)


def make_parent(place: Location) -> None:
    """Make the folder that is to hold `place`. Raises OutputError where that fails."""
    if not isinstance(place, Path):
        return  # the name of an object is all the folder that it has
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {to_text(place.parent)}: {error.strerror}", hint=_NEW) from error


def check_space(sizes: Mapping[Location, int]) -> None:
    """Raises OutputError where the bytes that each local place is to hold do not fit on its disk."""
    need: Counter[int] = Counter()
    where: dict[int, Path] = {}
    for place, size in sizes.items():
        if not isinstance(place, Path):
            continue
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


# ---- Names that one place cannot hold, though another does


def ignores_case(folder: Path) -> bool:
    """Whether the disk of `folder`, which may be written to, takes names that differ in case alone for the same."""
    probe = folder / _PROBE
    probe.touch()
    try:
        return (folder / _PROBE.upper()).exists()
    finally:
        probe.unlink()


def refuse_collisions(names: Any, target: Location) -> None:
    """Raises UsageError where two of `names` (distinct text, an Arrow array) would be one file or folder in `target`.

    Disks that ignore case often ignore how accents are composed too, so names that differ in that alone collide.
    """
    if not isinstance(target, Path) or not len(names) or not ignores_case(target):
        return
    folded = pc.utf8_lower(pc.utf8_upper(pc.call_function("utf8_normalize", [names], pc.Utf8NormalizeOptions("NFD"))))
    counts = folded.value_counts()
    twice = counts.filter(pc.greater(pc.struct_field(counts, "counts"), pa.scalar(1)))
    if not len(twice):
        return
    pair = names.filter(pc.equal(folded, twice[0]["values"])).to_pylist()
    more = f", and {len(twice) - 1} more such names" if len(twice) > 1 else ""
    raise UsageError(
        f"the disk of {to_text(target.parent.parent)} ignores case, where {' and '.join(pair)} are one name{more}",
        hint="Choose a place on a disk that tells them apart, or take --mode list.",
    )


def refuse_unsafe(names: Any) -> None:
    """Raises UsageError where one of `names` (an Arrow array of relative paths, as text) could lead elsewhere.

    An object store takes any name: `..`, a leading slash, two slashes in a row.
    """
    unsafe = names.filter(pc.match_substring_regex(names, r"(^|/)\.{0,2}(/|$)|\x00"))
    if len(unsafe):
        raise UsageError(
            f"{unsafe[0].as_py()!r} is no name for a file, so it is not copied", hint="Rename it in the dataset."
        )


def refuse_bytes(names: Any, target: Location) -> None:
    """Raises UsageError where one of `names` (an Arrow array of `to_text` texts) is not UTF-8, as remote names are."""
    if isinstance(target, Path):
        return
    for name in names.filter(pc.match_substring(names, "\\")).to_pylist():
        try:
            from_text(name).encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the name {name} is not UTF-8, as the names of {to_text(target)} have to be",
                hint="Rename it in the dataset and scan that, or choose a local place.",
            ) from error
