"""Putting what was written into place: all places, or none.

A local place is filled as a hidden folder beside it, which is renamed when it is whole. A remote one is filled where
it is; see `remote`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cdclean.errors import OutputError
from cdclean.exporting import remote
from cdclean.exporting.filled import Filled
from cdclean.exporting.places import MARKER, make_parent, refuse_taken
from cdclean.exporting.plan import Fate
from cdclean.locks import lock
from cdclean.storage import Location, atomic_write, sync_folder, to_text

Fill = Callable[[Fate, Location], Filled]


def write(places: Mapping[Fate, Location], fill: Fill, overwrite: bool) -> dict[Fate, Filled]:
    """Call `fill` for each fate with the empty folder that is to become its place.

    Raises UsageError where a place has been taken meanwhile, OutputError where writing fails, and what `fill` raises;
    nothing new is then left at any place, and what was there is still there, unless it was remote.
    """
    try:
        with ExitStack() as held:
            local = {fate: place for fate, place in places.items() if isinstance(place, Path)}
            stages = {fate: held.enter_context(_stage(place)) for fate, place in local.items()}
            filled = {fate: fill(fate, stage / "new") for fate, stage in stages.items()}
            for stage in stages.values():
                (stage / "new" / MARKER).touch()
            uploads = {fate: place for fate, place in places.items() if not isinstance(place, Path)}
            for fate, place in uploads.items():
                refuse_taken(place, overwrite)  # by now
                target = held.enter_context(remote.fresh(place))
                with atomic_write(target / MARKER):  # first: what a killed one leaves is a copy too
                    pass
                filled[fate] = fill(fate, target)
            if stages:
                os.sync()  # once for all files: a rename must not reach the disk before they do
            with ExitStack() as undo:
                for fate, stage in stages.items():
                    refuse_taken(local[fate], overwrite)  # by now, or again: _stage may have put it back
                    _move_into_place(stage, local[fate], undo)
                for place in uploads.values():
                    remote.complete(place)
                undo.pop_all()
    except OSError as error:
        raise OutputError(
            f"cannot write {to_text(error.filename or places[Fate.KEPT])}: {error.strerror or error}",
            hint="Free space or choose another place with --out, then run the same command again.",
        ) from error
    return filled


@contextmanager
def _stage(place: Path) -> Iterator[Path]:
    """A locked hidden folder beside `place`, with an empty folder `new`; it goes at the end, whatever the end is."""
    make_parent(place)
    stage = place.with_name(f".{place.name}.cdclean-export")
    stage.mkdir(mode=0o700, exist_ok=True)
    with lock(stage):
        try:
            _put_back(stage, place)
            for leftover in ("new", "old"):
                if (stage / leftover).exists():
                    shutil.rmtree(stage / leftover)
            (stage / "new").mkdir()
            yield stage
        finally:
            with suppress(OSError):
                _put_back(stage, place)
            if place.exists() or not (stage / "old").exists():
                shutil.rmtree(stage, ignore_errors=True)


def _put_back(stage: Path, place: Path) -> None:
    """Undo a half-done replacement, after a kill or a failed rename: the old one is here, and no new one there."""
    if (stage / "old").exists() and not place.exists():
        (stage / "old").rename(place)


def _move_into_place(stage: Path, place: Path, undo: ExitStack) -> None:
    if place.exists():
        place.rename(stage / "old")  # _stage puts it back if this goes wrong
    (stage / "new").rename(place)
    undo.callback(place.rename, stage / "new")
    sync_folder(place.parent)
