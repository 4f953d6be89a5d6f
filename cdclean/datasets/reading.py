"""The bytes of samples, wherever and however they are stored."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import groupby
from typing import IO, Any, Protocol

import fsspec

from cdclean.datasets.sample import Access
from cdclean.datasets.walking import modified
from cdclean.storage import from_text, is_local, locate, read_range

LARGEST = 512 * 1024**2  # bytes of one sample: what is larger is never read

_BLOCK = 1 << 14  # decompressed at a time; always the same, so that damage is met at the same place every time
_RATIO, _ALLOWANCE = 100, 1 << 30  # images hardly compress: more than this many times the file, and 1 GiB, is a bomb
_FETCH = (1 << 14, 1 << 18, 1 << 22)  # bytes asked of a remote file at once: at least, at first, at most


class Stored(Protocol):
    """What reading needs to know of a sample."""

    @property
    def url(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def access(self) -> Access: ...


class DamageError(OSError):
    """What is stored makes no sense from byte `position` on; no error of the disk or the network."""

    def __init__(self, message: str, position: int = 0) -> None:
        super().__init__(message)
        self.position = position


class Reader(Protocol):
    """An open file, or the unpacked stream of a compressed one."""

    @property
    def end(self) -> int | None:
        """Its length in bytes; None for a compressed one until a read came back short."""

    @property
    def modified(self) -> float | None:
        """When the file last changed, seconds since 1970; None where nothing tells."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer where the file ends. A compressed one is read forwards only.

        Raises DamageError where what is compressed is damaged, OSError where the storage fails.
        """


def contents(samples: Iterable[Stored]) -> Iterator[Callable[[], bytes]]:
    """For each of `samples`, in order, a function that gives its bytes once, or raises OSError.

    The functions may be called on any thread. Ranges are read there, many at a time; what has to be read in order
    (compressed archives, tables) is read here, as the iterator advances. Samples of one compressed archive that follow
    one another are read in one pass, if they stand in the archive's order. Fewer bytes than a sample's size come back
    where its file has become shorter.
    """
    for (access, url), run in groupby(samples, key=lambda sample: (sample.access, sample.url)):
        if access == "range":
            for sample in run:
                yield partial(_read_range, url, sample.offset, sample.size)
        elif access == "parquet":
            for rows in _ascending(run):
                yield from _rows(rows)
        else:
            yield from _unpacked(url, access, run)


def _read_range(url: str, offset: int, size: int) -> bytes:
    _check_size(size)
    with storage_errors():
        return read_range(url, offset, size)


def _unpacked(url: str, access: Access, samples: Iterable[Stored]) -> Iterator[Callable[[], bytes]]:
    """Samples of one compressed archive: one pass for as long as their offsets grow."""
    with ExitStack() as stack:
        reader: Reader | None = None
        position = 0
        for sample in samples:
            try:
                _check_size(sample.size)
                if reader is None or sample.offset < position:
                    stack.close()
                    reader = stack.enter_context(open_reader(url, access))
                data = reader.read(sample.offset, sample.size)
                position = sample.offset + sample.size
            except OSError as error:
                yield partial(_outcome, error)
            else:
                yield partial(_outcome, data)


def _ascending(samples: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Runs of `samples` whose offsets do not fall."""
    run: list[Stored] = []
    for sample in samples:
        if run and sample.offset < run[-1].offset:
            yield run
            run = []
        run.append(sample)
    if run:
        yield run


def _rows(samples: list[Stored]) -> Iterator[Callable[[], bytes]]:
    """Samples that are rows of one Parquet file."""
    from cdclean.datasets.tables import read_rows

    failure = OSError("the table gave fewer rows than were asked for")
    given = 0
    try:
        with storage_errors():
            for outcome in read_rows(samples):
                yield partial(_outcome, outcome)
                given += 1
    except OSError as error:
        failure = error
    for _ in samples[given:]:
        yield partial(_outcome, failure)


def _outcome(outcome: bytes | OSError) -> bytes:
    if isinstance(outcome, OSError):
        raise outcome
    return outcome


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise OSError(f"{size} bytes; the limit is {LARGEST}")


@contextmanager
def open_reader(url: str, access: Access) -> Iterator[Reader]:
    """The file at `url` (text as `storage.to_text` gives it), unpacked unless `access` is range. Raises OSError."""
    with ExitStack() as stack:
        with storage_errors():
            reader = _open_local(url, access, stack) if is_local(locate(from_text(url))) else None
            if reader is None:
                reader = _open_remote(url, access, stack)
        yield reader


def _open_local(url: str, access: Access, stack: ExitStack) -> Reader:
    path = from_text(url)
    status = os.stat(path)  # noqa: PTH116
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")  # opening a named pipe would wait for its writer
    file = stack.enter_context(open(path, "rb"))  # noqa: PTH123, SIM115
    if access == "range":
        return _File(file.fileno(), status.st_size, status.st_mtime)
    return _Forward(file, access, status.st_size, status.st_mtime)


def _open_remote(url: str, access: Access, stack: ExitStack) -> Reader:
    system, path = fsspec.core.url_to_fs(from_text(url))
    about = system.info(path)
    size = about.get("size")
    if not isinstance(size, int):
        raise OSError("the server does not tell its size")
    if access == "range":
        return _Window(system, path, size, modified(about))
    file = stack.enter_context(system.open(path, "rb", block_size=_FETCH[-1]))
    return _Forward(file, access, size, modified(about))


@contextmanager
def storage_errors() -> Iterator[None]:
    """Libraries for remote storage have exceptions of their own; here they are OSErrors."""
    try:
        yield
    except FileNotFoundError as error:
        # fsspec says so of whatever an http server answers, and when there is no server.
        cause = error.__cause__
        refused = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
        if refused or getattr(cause, "status", 404) != 404:
            raise OSError(f"{type(cause).__name__}: {cause}") from error
        raise
    except (OSError, GeneratorExit):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class _File:
    """A local file."""

    def __init__(self, handle: int, size: int, modified: float | None) -> None:
        self._handle = handle
        self.end = size
        self.modified = modified

    def read(self, offset: int, size: int) -> bytes:
        # Past the end an offset need not fit the system's integers.
        return os.pread(self._handle, size, offset) if offset < self.end else b""


class _Window:
    """A remote file of which one stretch is held.

    How much is fetched at once follows the steps of its reader. If what it asks for next is near, more is fetched the
    next time, up to whole megabytes in a row; if it is far, less, so that what lies between is not downloaded.
    """

    def __init__(self, system: Any, path: str, size: int, modified: float | None) -> None:
        self._system = system
        self._path = path
        self._start = 0
        self._data = b""
        self._fetch = _FETCH[1]
        self.end = size
        self.modified = modified

    def read(self, offset: int, size: int) -> bytes:
        stop = min(offset + size, self.end)
        if stop <= offset:
            return b""
        held = self._start + len(self._data)
        if not (self._start <= offset and stop <= held):
            if held:
                near = self._start <= offset <= held + self._fetch
                self._fetch = min(2 * self._fetch, _FETCH[2]) if near else max(self._fetch // 4, _FETCH[0])
            self._data = self._range(offset, min(max(stop, offset + self._fetch), self.end))
            self._start = offset
        return self._data[offset - self._start : stop - self._start]

    def _range(self, start: int, stop: int) -> bytes:
        with storage_errors():
            data: bytes = self._system.cat_file(self._path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(f"asked for {stop - start} bytes, the server sent {len(data)}")
        return data


class _Forward:
    """What a compressed file holds, read forwards."""

    def __init__(self, file: IO[bytes], access: Access, size: int, modified: float | None) -> None:
        self._source = _Source(file)
        self._stream = _decompressor(self._source, access)
        self._limit = _ALLOWANCE + _RATIO * size
        self._start = 0  # of the block that is held
        self._block = b""
        self._damage: str | None = None
        self.end: int | None = None
        self.modified = modified

    def read(self, offset: int, size: int) -> bytes:
        if offset < self._start:
            raise ValueError(f"byte {offset} has been passed")
        data = bytearray()
        while size:
            if offset < self._start + len(self._block):
                piece = self._block[offset - self._start : offset - self._start + size]
                data += piece
                offset += len(piece)
                size -= len(piece)
            elif not self._advance():
                break
        return bytes(data)

    def _advance(self) -> bool:
        """Hold the next block; False at the end."""
        position = self._start + len(self._block)
        if self._damage is None and self.end is None:
            try:
                block = self._stream(_BLOCK)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                if self._source.failure is not None:
                    raise self._source.failure from error
                self._damage = f"the compressed data is damaged: {error}"
            else:
                if not block:
                    self.end = position
                elif position + len(block) > self._limit:
                    self._damage = f"it unpacks to more than {_RATIO} times its size"
                else:
                    self._start, self._block = position, block
                    return True
        if self._damage is not None:
            raise DamageError(self._damage, position)
        return False


def _decompressor(source: _Source, access: Access) -> Callable[[int], bytes]:
    """A function that gives at most so many bytes more, b"" at the end, and loses none before it raises."""
    if access == "gzip":
        return gzip.GzipFile(fileobj=source, mode="rb").read1
    if access == "bz2":
        return bz2.BZ2File(source, "rb").read1
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(source, "r"), "zstd").read


class _Source(io.RawIOBase):
    """A compressed file that remembers how reading it failed: decompressors raise OSError for both."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: OSError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            with storage_errors():
                data = self._file.read(len(buffer))
        except OSError as error:
            self.failure = error
            raise
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
        super().close()
