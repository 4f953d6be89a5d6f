"""Files, on local disks and wherever fsspec reaches: names that are not text, whole-or-absent writes, byte ranges.

Keys and urls are text; local file names are bytes. `to_text` maps any name to text and back without loss: names that
are UTF-8 stay as they are (a backslash is doubled), other bytes become \\xNN.

A `Location` is a local pathlib.Path, or a UPath with the same methods for s3://, gs://, az://, hf://, https:// and
memory://. Credentials and endpoints come from where each of these usually takes them (for S3: the AWS_*
variables and ~/.aws), never from cdclean.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import fsspec
from upath import UPath

from cdclean.errors import CdcleanError, OutputError, UsageError

Location = Path | UPath

_ALIASES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}
# Of those that reach storage; their exceptions are about places, not bugs.
_LIBRARIES = ("botocore", "aiobotocore", "s3fs", "gcsfs", "google", "azure", "adlfs", "huggingface_hub", "aiohttp")
_TEMPORARY = ".part"  # the end of an unfinished file's name
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
_EXTRAS |= {"hf": "hf", "http": "http", "https": "http"}
# Of all that fsspec knows these alone: some hand names to a program, and some are the local disk by another name, which
# what protects a dataset would not know.
_KNOWN = {*_EXTRAS, "memory"}


def locate(location: str | os.PathLike[str]) -> Location:
    """`location`, a path or a URL, as something to read and write. Nothing is looked up yet.

    Raises UsageError for a kind of URL that is not storage, or whose library is not installed.
    """
    text = os.fspath(location) if isinstance(location, Path) else str(location)
    if "::" in text and "://" in text:
        raise UsageError(f"{text} is not a place that cdclean reads or writes", hint="Copy it, and give that path.")
    if not URL.match(text):
        return Path(text)
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    if scheme in ("file", "local"):
        return Path(rest)
    if scheme not in _KNOWN:
        raise UsageError(
            f"{text} is not a place that cdclean reads or writes: it knows s3://, gs://, az://, hf://, https://",
            hint="Copy it, and give that path.",
        )
    try:
        path = UPath(f"{scheme}://{rest}")
        _ = path.fs
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        hint = f"pip install 'cdclean[{extra}]'" if extra else str(error)
        raise UsageError(f"{scheme}:// needs a library that is not installed", hint=hint) from error
    except ValueError as error:
        raise UsageError(f"{text}: {error}", hint="Check the address.") from error
    return path


@contextmanager
def answering() -> Iterator[None]:
    """Storage libraries raise errors of their own for a network, an account or a server: here they are OSErrors."""
    try:
        yield
    except (OSError, CdcleanError):
        raise
    except Exception as error:
        if not type(error).__module__.startswith(_LIBRARIES):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def is_local(location: Location) -> bool:
    return isinstance(location, Path)


def is_within(inner: Location, outer: Location) -> bool:
    """Whether one place is the other, or lies below it.

    On a disk with links resolved, and by identity too: a folder can have two names (bind mounts, disks that ignore
    case). Elsewhere by address, whichever of its schemes a store is called by.
    """
    if isinstance(inner, Path) and isinstance(outer, Path):
        inner, outer = inner.resolve(), outer.resolve()
        if inner.is_relative_to(outer):
            return True
        for path in (inner, *inner.parents):
            with suppress(OSError):
                if path.samefile(outer):
                    return True
        return False
    if isinstance(inner, Path) or isinstance(outer, Path):
        return False
    above = address(outer)
    return address(inner)[: len(above)] == above


def address(place: UPath) -> tuple[str, ...]:
    """Scheme and names of a remote place; equal for two ways to write it."""
    scheme = _ALIASES.get(place.protocol, place.protocol)
    return (scheme, *(part for part in str(place.path).split("/") if part))


def local_path(location: str) -> Path:
    """`location` as a local path. Raises UsageError for a URL, where only a file on this machine will do."""
    path = locate(location)
    if not isinstance(path, Path):
        raise UsageError(f"{location} is remote, and this has to be a local file", hint="Copy it, and give that path.")
    return path


def to_text(path: str | bytes | os.PathLike[str] | UPath) -> str:
    """A path as text that any file format can hold; `from_text` gives the path back."""
    raw = path if isinstance(path, bytes) else os.fsencode(path if isinstance(path, str | Path) else str(path))
    return raw.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def from_text(text: str) -> str:
    """The path (with surrogate escapes, as Python's os functions take it) for which `to_text` gave `text`."""
    raw = re.sub(
        rb"\\(\\|x[0-9a-f]{2})",
        lambda match: b"\\" if match[1] == b"\\" else bytes([int(match[1][1:], 16)]),
        text.encode("utf-8", "surrogateescape"),
    )
    return os.fsdecode(raw)


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` of the file at `url` (text as `to_text` gives it); fewer where it ends.

    Raises OSError.
    """
    path = from_text(url)
    if URL.match(path):
        with answering():
            system, name = fsspec.core.url_to_fs(path)
            data: bytes = system.cat_file(name, start=offset, end=offset + size) if size else b""
            return data
    with open(path, "rb") as file:  # noqa: PTH123  (Path would refuse nothing, and costs on every file)
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
def atomic_write(path: Location) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` whole, or not at all, and then survives a power cut.

    On a local disk: temporary file, fsync, rename. Elsewhere: an upload that is committed at the end, or aborted.
    Raises OutputError where the disk is full or the folder cannot be written to; what was at `path` stays.
    """
    try:
        with answering(), _temporary(path) if isinstance(path, Path) else _upload(path) as file:
            yield file
    except OSError as error:
        raise OutputError(
            f"cannot write {to_text(path)}: {error.strerror or error}",
            hint="Free space or choose another place, then run the same command again: finished work is kept.",
        ) from error


@contextmanager
def _temporary(path: Path) -> Iterator[IO[bytes]]:
    handle, name = tempfile.mkstemp(_TEMPORARY, f".{path.name}.", path.parent)
    temporary = Path(name)
    try:
        with open(handle, "wb") as file:  # noqa: PTH123
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # noqa: PTH101
        os.replace(temporary, path)  # noqa: PTH105
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _upload(path: UPath) -> Iterator[IO[bytes]]:
    if path.protocol == "memory":  # shows a file as soon as it is opened
        buffer = io.BytesIO()
        yield buffer
        path.write_bytes(buffer.getvalue())
        return
    file: Any = path.fs.open(path.path, "wb", autocommit=False)
    try:
        yield file
        file.close()  # the last part is sent; nothing is visible before the commit
    except BaseException:
        with suppress(OSError):
            file.discard()
        file.closed = True  # or it would be closed, and so sent, when it is collected
        raise
    file.commit()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Location, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=True).encode() + b"\n")


def is_temporary(path: Location) -> bool:
    """Whether `path` is what `atomic_write` leaves behind when the process is killed."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


def remove_temporaries(*folders: Location) -> None:
    """Remove what killed processes have left of unfinished files; the caller holds the lock."""
    for folder in folders:
        if not isinstance(folder, Path):
            continue  # an upload that was not finished is in no listing
        for path in folder.glob(f".*{_TEMPORARY}"):
            path.unlink()
