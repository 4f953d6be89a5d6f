"""The files of an ImageFolder, from and to local disks and remote storage: the same bytes under the same names."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from cdclean.errors import InputError, OutputError, UsageError
from cdclean.exporting.filled import Filled
from cdclean.exporting.parallel import in_parallel
from cdclean.exporting.places import refuse_bytes, refuse_collisions, refuse_unsafe
from cdclean.exporting.plan import CHANGED, Fate, Plan
from cdclean.storage import Location, atomic_write, from_text, read_range, to_text

Linking = Literal["copy", "hardlink", "symlink"]

_BLOCK = 1 << 20  # bytes read at once
_RANGE = 1 << 23  # the same, where each time costs a request


@dataclass(frozen=True, slots=True)
class _File:
    relative: str  # path below the dataset, as os functions take it
    size: int
    content_hash: str | None
    sample: bool


def fill(plan: Plan, fate: Fate, target: Location, linking: Linking, progress: Callable[[int], object]) -> Filled:
    """Write the files of one fate to the empty folder `target`; links need dataset and target on local disks.

    Raises InputError where a file cannot be read or has changed, OutputError where writing fails, UsageError where
    `target` cannot hold a name or tell two names apart.
    """
    files = plan.part(fate)
    _refuse_names(plan, files, target)
    made = _Folders(plan.root, target) if isinstance(target, Path) else None
    if made is not None and fate is Fate.KEPT:
        for folder in plan.folders:  # those without a file of their own too
            made.need(folder)
    place = _placing(plan.root, target, linking)

    def listed() -> Iterator[_File]:
        for file in _rows(files):
            if made is not None:
                made.need(os.path.dirname(file.relative))  # noqa: PTH120  (a string, once a file)
            yield file

    for samples in in_parallel(place, listed()):
        progress(samples)
    return plan.count(fate)


def _refuse_names(plan: Plan, files: pa.Table, target: Location) -> None:
    refuse_unsafe(files["key"])
    folders = pa.array([to_text(folder) for folder in plan.folders], pa.string())
    refuse_collisions(pa.chunked_array([*files["key"].chunks, folders]), target)
    refuse_bytes(files["key"], target)


def _rows(files: pa.Table) -> Iterator[_File]:
    for batch in files.select(["key", "size", "content_hash", "sample"]).to_batches(max_chunksize=1024):
        columns: list[list[Any]] = [column.to_pylist() for column in batch.columns]
        for key, size, content_hash, sample in zip(*columns, strict=True):
            yield _File(from_text(key), size, content_hash, sample)


class _Folders:
    """Makes folders below `target` as they are needed, with the permissions that their originals have."""

    def __init__(self, source: Location, target: Path) -> None:
        self._source, self._target = source, target
        self._made: set[str] = set()
        self.need("")

    def need(self, relative: str) -> None:
        if relative in self._made:
            return
        if relative:
            self.need(os.path.dirname(relative))  # noqa: PTH120
            with _once(relative):
                (self._target / relative).mkdir()
        if isinstance(self._source, Path):
            mode = stat.S_IMODE((self._source / relative).stat().st_mode) & 0o777
            (self._target / relative).chmod(mode | 0o700)  # ours to fill, and to remove again
        self._made.add(relative)


def _placing(root: Location, target: Location, linking: Linking) -> Callable[[_File], int]:
    """The function that puts a file into place; it gives 1 for a sample, 0 for another file.

    Local paths are strings: pathlib would cost as much as a small file.
    """
    blocks = _local_blocks if isinstance(root, Path) else _remote_blocks
    base = str(root).rstrip("/")

    def copy(file: _File) -> int:
        destination = f"{target}/{file.relative}"
        with _once(file.relative):
            written = open(destination, "xb")  # noqa: PTH123, SIM115
        with written:
            _check(file, _digest(blocks(base, file), written.write))
        if isinstance(root, Path):
            with suppress(PermissionError):  # disks that know no permissions
                shutil.copystat(f"{base}/{file.relative}", destination)
        return int(file.sample)

    def upload(file: _File) -> int:
        with atomic_write(target / file.relative) as written:
            _check(file, _digest(blocks(base, file), written.write))
        return int(file.sample)

    def link(file: _File) -> int:
        source, destination = f"{base}/{file.relative}", f"{target}/{file.relative}"
        if file.content_hash:
            _check(file, _digest(blocks(base, file), lambda _: 0))
        with _once(file.relative):
            if linking == "symlink":
                os.symlink(source, destination)  # noqa: PTH211
            else:
                _hard_link(source, destination)
        return int(file.sample)

    if linking != "copy":
        return link
    return copy if isinstance(target, Path) else upload


@contextmanager
def _once(relative: str) -> Iterator[None]:
    """Nothing is written over what has been written: the copy would lack a file."""
    try:
        yield
    except FileExistsError as error:
        raise UsageError(
            f"where the copy goes, {to_text(relative)} is also the name of another file or folder of the dataset",
            hint="Choose a place on a disk that tells them apart, or take --mode list.",
        ) from error


def _check(file: _File, found: str) -> None:
    if file.content_hash and found != file.content_hash:
        raise InputError(
            f"{to_text(file.relative)} has changed since the scan: its bytes are not those that were scored",
            hint=CHANGED,
        )


def _digest(blocks: Iterator[bytes], use: Callable[[bytes], object]) -> str:
    """SHA-256 (hexadecimal) of all blocks, each of which is given to `use`."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
        use(block)
    return digest.hexdigest()


def _local_blocks(base: str, file: _File) -> Iterator[bytes]:
    try:
        with open(f"{base}/{file.relative}", "rb") as source:  # noqa: PTH123
            while block := source.read(_BLOCK):
                yield block
    except OSError as error:
        raise _unreadable(f"{base}/{file.relative}", error) from error


def _remote_blocks(base: str, file: _File) -> Iterator[bytes]:
    """By its size in the listing: a request a block, and none to ask for the size."""
    url = to_text(f"{base}/{file.relative}".encode())
    for offset in range(0, file.size, _RANGE):
        try:
            block = read_range(url, offset, min(_RANGE, file.size - offset))
        except OSError as error:
            raise _unreadable(f"{base}/{file.relative}", error) from error
        yield block


def _unreadable(path: str, error: OSError) -> InputError:
    return InputError(
        f"cannot read {to_text(path)}: {error.strerror or error}",
        hint="Make it readable, and run the same command again.",
    )


def _hard_link(source: str, destination: str) -> None:
    try:
        os.link(os.path.realpath(source), destination)  # a link to the target, never to a link
    except FileExistsError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot make a hard link to {to_text(source)} at {to_text(destination)}: {error.strerror}",
            hint="Hard links need one disk that has them, and files that are yours: take --mode copy.",
        ) from error
