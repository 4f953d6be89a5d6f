"""Filling a hidden folder beside the place asked for, and renaming it into place when it is whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from cdclean.errors import InputError, OutputError
from cdclean.exporting.places import make_parent, refuse_taken
from cdclean.exporting.plan import Fate, Plan
from cdclean.storage import from_text, lock, sync_folder, to_text

Linking = Literal["copy", "hardlink", "symlink"]

_BLOCK = 1 << 20  # bytes read at once
_WORKERS = 8  # files written at once; waiting for the disk is what takes the time
_AHEAD = 8 * _WORKERS  # files handed out and not finished: bounds the memory


def write(
    plan: Plan,
    places: Mapping[Fate, Path],
    linking: Linking,
    overwrite: bool,
    progress: Callable[[int], object],
) -> None:
    """Write the files of each fate to its place: all places, or none.

    Raises InputError where a file cannot be read or has changed, OutputError where writing fails, UsageError where a
    place has been taken meanwhile; nothing new is then left at any place, and what was there is still there.
    """
    try:
        with ExitStack() as held:
            stages = {fate: held.enter_context(_stage(place)) for fate, place in places.items()}
            for fate, stage in stages.items():
                _fill(plan, fate, stage / "new", linking, progress)
            os.sync()  # once for all files: a rename must not reach the disk before they do
            with ExitStack() as undo:
                for fate, stage in stages.items():
                    refuse_taken(places[fate], overwrite)  # by now, or again: _stage may have put it back
                    _move_into_place(stage, places[fate], undo)
                undo.pop_all()
    except OSError as error:
        raise OutputError(
            f"cannot write {to_text(error.filename or places[Fate.KEPT])}: {error.strerror or error}",
            hint="Free space or choose another place with --out, then run the same command again.",
        ) from error


@contextmanager
def _stage(place: Path) -> Iterator[Path]:
    """A locked, empty, hidden folder beside `place`; it goes at the end, whatever the end is."""
    make_parent(place)
    stage = place.with_name(f".{place.name}.cdclean-export")
    stage.mkdir(mode=0o700, exist_ok=True)
    with lock(stage):
        try:
            _put_back(stage, place)
            for leftover in ("new", "old"):
                if (stage / leftover).exists():
                    shutil.rmtree(stage / leftover)
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


def _fill(plan: Plan, fate: Fate, target: Path, linking: Linking, progress: Callable[[int], object]) -> None:
    files = plan.part(fate)
    made = _Folders(plan.root, target)
    if fate is Fate.KEPT:
        for folder in plan.folders:  # those without a file of their own too
            made.need(folder)
    pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="export")
    running: set[Future[int]] = set()
    try:
        for relative, content_hash, sample in _rows(files):
            made.need(os.path.dirname(relative))  # noqa: PTH120  (a string, once a file)
            if len(running) == _AHEAD:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                progress(sum(future.result() for future in done))
            source, destination = f"{plan.root}/{relative}", f"{target}/{relative}"
            running.add(pool.submit(_place_file, source, destination, linking, content_hash, int(sample)))
        for future in running:
            progress(future.result())
    finally:
        pool.shutdown(cancel_futures=True)


def _rows(files: pa.Table) -> Iterator[tuple[str, str | None, bool]]:
    for batch in files.select(["key", "content_hash", "sample"]).to_batches(max_chunksize=1024):
        columns: list[list[Any]] = [column.to_pylist() for column in batch.columns]
        for key, content_hash, sample in zip(*columns, strict=True):
            yield from_text(key), content_hash, sample


class _Folders:
    """Makes folders below `target` as they are needed, with the permissions that their originals have."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source, self._target = source, target
        self._made: set[str] = set()
        self.need("")

    def need(self, relative: str) -> None:
        if relative in self._made:
            return
        if relative:
            self.need(os.path.dirname(relative))  # noqa: PTH120
        mode = stat.S_IMODE((self._source / relative).stat().st_mode) & 0o777
        (self._target / relative).mkdir(mode=mode | 0o700)  # ours to fill, and to remove again
        self._made.add(relative)


def _place_file(source: str, destination: str, linking: Linking, content_hash: str | None, count: int) -> int:
    """Put one file into place and return `count`. Paths are strings: pathlib would cost as much as a small file."""
    if linking == "copy":
        with open(destination, "xb") as file:  # noqa: PTH123
            found = _digest(source, file.write)
        with suppress(PermissionError):  # disks that know no permissions
            shutil.copystat(source, destination)
    else:
        found = _digest(source, lambda _: 0) if content_hash else ""
        if linking == "symlink":
            os.symlink(source, destination)  # noqa: PTH211
        else:
            _hard_link(source, destination)
    if content_hash and found != content_hash:
        raise InputError(
            f"{to_text(source)} has changed since the scan: its bytes are not those that were scored",
            hint="Bring the dataset back to what was scanned, or scan it again.",
        )
    return count


def _digest(source: str, use: Callable[[bytes], object]) -> str:
    """SHA-256 (hexadecimal) of the file at `source`, each block of which is given to `use`."""
    digest = hashlib.sha256()
    for block in _blocks(source):
        digest.update(block)
        use(block)
    return digest.hexdigest()


def _blocks(source: str) -> Iterable[bytes]:
    try:
        with open(source, "rb") as file:  # noqa: PTH123
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise InputError(
            f"cannot read {to_text(source)}: {error.strerror}", hint="Make it readable, and run the same command again."
        ) from error


def _hard_link(source: str, destination: str) -> None:
    try:
        os.link(os.path.realpath(source), destination)  # a link to the target, never to a link
    except OSError as error:
        raise OutputError(
            f"cannot make a hard link to {to_text(source)} at {to_text(destination)}: {error.strerror}",
            hint="Hard links need one disk that has them, and files that are yours: take --mode copy.",
        ) from error
