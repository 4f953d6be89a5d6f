"""Files: names that are not text, whole-or-absent writes, durable renames, the lock of a run folder.

Keys and urls are text; file names are bytes. `to_text` maps any name to text and back without loss: names that are
UTF-8 stay as they are (a backslash is doubled), other bytes become \\xNN.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import filelock

from cdclean.errors import LockedError, OutputError, UsageError

_TEMPORARY = ".part"  # the end of an unfinished file's name


def to_text(path: str | bytes | os.PathLike[str]) -> str:
    """A path as text that any file format can hold; `from_text` gives the path back."""
    escaped = os.fsencode(path).replace(b"\\", b"\\\\")
    return escaped.decode("utf-8", "backslashreplace")


def from_text(text: str) -> str:
    """The path (with surrogate escapes, as Python's os functions take it) for which `to_text` gave `text`."""
    raw = re.sub(
        rb"\\(\\|x[0-9a-f]{2})",
        lambda match: b"\\" if match[1] == b"\\" else bytes([int(match[1][1:], 16)]),
        text.encode("utf-8", "surrogateescape"),
    )
    return os.fsdecode(raw)


def local_path(location: str) -> Path:
    """`location` as a local path. Raises UsageError for a URL: remote storage is not supported."""
    scheme, separator, rest = location.partition("://")
    if separator and scheme == "file":
        return Path(rest)
    if separator:
        raise UsageError(
            f"{location} is remote; this version reads and writes local folders only",
            hint="Mount or copy it, and give the local path.",
        )
    return Path(location)


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` of the file at `url` (text as `to_text` gives it). Raises OSError."""
    with open(from_text(url), "rb") as file:  # noqa: PTH123  (Path would refuse nothing, and costs on every file)
        file.seek(offset)
        return file.read(size)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` whole, or not at all: temporary file, fsync, rename.

    Raises OutputError where the disk is full or the folder cannot be written to; what was at `path` stays.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(_TEMPORARY, f".{path.name}.", path.parent)
        temporary = Path(name)
        with open(handle, "wb") as file:  # noqa: PTH123
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # noqa: PTH101
        os.replace(temporary, path)  # noqa: PTH105
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}",
            hint="Free space or choose another place, then run the same command again: finished work is kept.",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=True).encode() + b"\n")


def is_temporary(path: Path) -> bool:
    """Whether `path` is what `atomic_write` leaves behind when the process is killed."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


def remove_temporaries(*folders: Path) -> None:
    """Remove what killed processes have left of unfinished files; the caller holds the lock."""
    for folder in folders:
        for path in folder.glob(f".*{_TEMPORARY}"):
            path.unlink()


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder`/.lock. Raises LockedError when another process has it; ends with the process."""
    held = filelock.FileLock(folder / ".lock")
    try:
        held.acquire(timeout=1)  # is_locked holds it for a moment
    except filelock.Timeout as error:
        raise LockedError(
            f"another cdclean process is writing to {folder}",
            hint="Wait for it, or look at it with: cdclean status",
        ) from error
    try:
        yield
    finally:
        held.release()


def is_locked(folder: Path) -> bool:
    """Whether a process holds `folder`/.lock."""
    if not (folder / ".lock").exists():
        return False
    held = filelock.FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        return True
    held.release()
    return False
