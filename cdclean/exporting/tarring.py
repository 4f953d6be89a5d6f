"""Writing tar shards from the members of others, each byte as it is."""

from __future__ import annotations

import hashlib
import io
import tarfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from cdclean.datasets.reading import DamageError, Reader, open_reader
from cdclean.datasets.sample import Access
from cdclean.datasets.shards import ENDINGS, ending
from cdclean.datasets.tar import Member, members
from cdclean.errors import InputError
from cdclean.exporting.plan import CHANGED
from cdclean.storage import Location, atomic_write, from_text

LEFT_OUT, LOOSE, SIDECAR = -3, -2, -1  # what becomes of a member; else it is the image of the sample in that row

_BLOCK = 1 << 20  # bytes of a member read at once
_INSIDE, _BEGINS, _APART = range(3)  # a member begins no sample, begins one, or one for another shard than the last
_GLOBAL = tarfile.XGLTYPE
_EXTENDED = (_GLOBAL, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class _Piece(NamedTuple):
    """A member: positions as in `Member`, what becomes of it, and whether it begins a sample."""

    start: int
    offset: int
    size: int
    next: int
    row: int
    begins: int


class Layout:
    """What becomes of the members of a shard, but those of no sample that have no names as samples have."""

    def __init__(self) -> None:
        self.samples = 0  # to be kept
        self._columns = tuple(array("q") for _ in _Piece._fields)  # 48 bytes a member

    def add(self, member: Member, row: int, begins: int = _INSIDE) -> None:
        values = (member.start, member.offset, member.size, member.next, row, begins)
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)

    def add_sample(self, group: Sequence[Member], image: int, row: int, *, apart: bool) -> None:
        """A sample to be kept, whose image has its data at `image`; `apart`: not in the shard of the one before."""
        self.samples += 1
        begins = _APART if apart else _BEGINS
        for member in group:
            self.add(member, row if member.offset == image else SIDECAR, begins)
            begins = _INSIDE

    def cut(self, end: int) -> None:
        """Leave out the members whose data reaches beyond `end`, where the shard is damaged."""
        _, offset, size, _, row, _ = self._columns
        for index in range(len(row)):
            if offset[index] + size[index] > end and row[index] != LEFT_OUT:
                self.samples -= row[index] >= 0
                row[index] = LEFT_OUT

    def rows(self) -> set[int]:
        """Of the samples to be kept."""
        return {row for row in self._columns[4] if row >= 0}

    def in_order(self) -> Iterator[_Piece]:
        columns = [np.frombuffer(column, np.int64) for column in self._columns]
        order = np.argsort(columns[0])
        return map(_Piece._make, zip(*(column[order].tolist() for column in columns), strict=True))


class ShardWriter:
    """Writes shards into a folder, one after another, and counts. As a context manager it discards an unfinished one.

    shard_size: samples a shard; the shards are called shard-000000 and so on. None: as they are called in the dataset.
    loose: write the members of no sample too.
    """

    def __init__(
        self, target: Location, shard_size: int | None, loose: bool, progress: Callable[[int], object]
    ) -> None:
        self.samples = self.others = self.bytes = 0
        self._target, self._shard_size, self._loose, self._progress = target, shard_size, loose, progress
        self._number = 0  # of the next shard, where they get new names
        self._ending = ""  # of their names
        self._open = ExitStack()  # the shard that is being written
        self._out: IO[bytes] | None = None
        self._length = 0  # bytes of it
        self._count = 0  # samples in it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        else:
            self._open.__exit__(kind, error, trace)

    def add(self, file: str, name: str, layout: Layout, hashes: Mapping[int, str | None]) -> None:
        """Write what is kept of a shard, which is not nothing; `hashes`: row -> SHA-256 of the image.

        Raises InputError where an image has changed or the shard cannot be read, OutputError where writing fails.
        """
        access = ENDINGS[ending(file) or ".tar"]
        if self._shard_size is None:
            self._begin(name, access)
        self._ending = self._ending or ending(file) or ".tar"
        with _opened(file, access) as source:
            position = 0
            for piece in layout.in_order():
                if self._loose:
                    self._copy(source, position, piece.start)  # belongs to no sample
                position = piece.next
                self._member(source, piece, hashes)
            more = self._loose and any(source.peek(position, tarfile.BLOCKSIZE))
        if more:
            self._copy_rest(file, access, position)
        if self._shard_size is None:
            self._finish()

    def _member(self, source: _Source, piece: _Piece, hashes: Mapping[int, str | None]) -> None:
        if piece.row == LEFT_OUT or (piece.row == LOOSE and not self._loose):
            self._write(source.common_headers(piece))
            return
        if piece.begins and (piece.begins == _APART or self._count == self._shard_size):
            self._finish()
        self._count += piece.begins != _INSIDE
        digest = hashlib.sha256() if piece.row >= 0 else None
        self._copy(source, piece.start, piece.offset)
        self._copy(source, piece.offset, piece.offset + piece.size, digest)
        padding = source.peek(piece.offset + piece.size, -piece.size % tarfile.BLOCKSIZE)
        self._write(padding.ljust(-piece.size % tarfile.BLOCKSIZE, b"\0"))  # it may be cut off
        self.bytes += piece.size
        if digest is None:
            self.others += 1
            return
        if hashes[piece.row] not in (None, digest.hexdigest()):
            raise InputError(
                f"the image at byte {piece.offset} of {source.file} has changed since the scan: its bytes are not "
                "those that were scored",
                hint=CHANGED,
            )
        self.samples += 1
        self._progress(1)

    def _copy(self, source: _Source, start: int, end: int, digest: Any = None) -> None:
        for position in range(start, end, _BLOCK):
            block = source.read(position, min(_BLOCK, end - position))
            if len(block) < min(_BLOCK, end - position):
                raise InputError(f"{source.file} has become shorter since the scan", hint=CHANGED)
            if digest is not None:
                digest.update(block)
            self._write(block)

    def _copy_rest(self, file: str, access: Access, start: int) -> None:
        """Members of no sample at the end of a shard, up to the last that is whole."""
        end = whole = start
        with _opened(file, access) as source, suppress(DamageError):
            for member in members(_From(source.reader, start)):
                whole, end = end, start + member.next  # a header follows the one before
            whole = end
        with _opened(file, access) as source:
            self._copy(source, start, whole)

    def _write(self, data: bytes) -> None:
        if not data:
            return
        if self._out is None:
            self._begin(f"shard-{self._number:06d}{self._ending}", ENDINGS[self._ending])
            self._number += 1
        assert self._out is not None
        self._out.write(data)
        self._length += len(data)

    def _begin(self, name: str, access: Access) -> None:
        place = self._target / from_text(name)
        if isinstance(place, Path):
            place.parent.mkdir(parents=True, exist_ok=True)
        self._out = self._open.enter_context(_packed(place, access))

    def _finish(self) -> None:
        """End the shard that is open, if there is one, as tarfile and GNU tar do."""
        if self._out is not None:
            self._write(bytes(2 * tarfile.BLOCKSIZE))
            self._write(bytes(-self._length % tarfile.RECORDSIZE))
            self._out, self._length, self._count = None, 0, 0
            self._open.close()


class _Source:
    """A shard that is read."""

    def __init__(self, file: str, reader: Reader) -> None:
        self.file, self.reader = file, reader

    def read(self, offset: int, size: int) -> bytes:
        try:
            return self.reader.read(offset, size)
        except OSError as error:
            raise _unreadable(self.file, error) from error

    def peek(self, offset: int, size: int) -> bytes:
        """What can be read where a shard may be cut off."""
        try:
            return self.reader.read(offset, size)
        except DamageError:
            return b""
        except OSError as error:
            raise _unreadable(self.file, error) from error

    def common_headers(self, piece: _Piece) -> bytes:
        """Of the headers of a member those that hold for all after it too: they stay when it goes."""
        if piece.offset - piece.start <= tarfile.BLOCKSIZE:
            return b""
        headers = self.read(piece.start, piece.offset - piece.start)
        kept = b""
        position = 0
        while (kind := headers[position + 156 : position + 157]) in _EXTENDED:
            header = tarfile.TarInfo.frombuf(headers[position : position + tarfile.BLOCKSIZE], "utf-8", "replace")
            end = position + tarfile.BLOCKSIZE - (-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if kind == _GLOBAL:
                kept += headers[position:end]
            position = end
        return kept


class _From:
    """A reader that begins at a byte of another."""

    def __init__(self, reader: Reader, start: int) -> None:
        self._reader, self._start = reader, start

    @property
    def end(self) -> int | None:
        return None if self._reader.end is None else self._reader.end - self._start

    @property
    def modified(self) -> float | None:
        return self._reader.modified

    def read(self, offset: int, size: int) -> bytes:
        return self._reader.read(self._start + offset, size)


@contextmanager
def _opened(file: str, access: Access) -> Iterator[_Source]:
    with ExitStack() as stack:
        try:
            reader = stack.enter_context(open_reader(file, access))
        except OSError as error:
            raise _unreadable(file, error) from error
        yield _Source(file, reader)


def _unreadable(file: str, error: OSError) -> InputError:
    return InputError(f"cannot read {file}: {error.strerror or error}", hint=CHANGED)


@contextmanager
def _packed(place: Location, access: Access) -> Iterator[IO[bytes]]:
    """A file that is compressed in the way that `access` says."""
    with atomic_write(place) as file:
        if access == "range" or access == "parquet":
            yield file
        else:
            with pa.CompressedOutputStream(pa.PythonFile(_Shared(file), "w"), access) as packed:
                yield packed  # type: ignore[misc]


class _Shared(io.RawIOBase):
    """A file that is not closed by who writes to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)
