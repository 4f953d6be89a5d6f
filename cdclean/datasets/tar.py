"""The members of a tar and where their bytes stand, up to the first byte that makes no sense.

One header block is read by `tarfile.TarInfo.frombuf`; the walk from header to header is our own, as `tarfile`'s cannot
say where a damaged archive ends, and takes an extended header of any length into memory.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cdclean.datasets.reading import DamageError, Reader

Kind = Literal["file", "folder", "link", "special", "sparse"]

_BLOCK = tarfile.BLOCKSIZE
_LONGEST = 1 << 20  # bytes of an extended header
_TAIL = 1 << 20  # bytes of padding behind the end of the archive
_RECORD = re.compile(rb"([0-9]{1,9}) ")
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip", b"\xfd7zXZ": "xz"}
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)

Records = dict[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Member:
    """One member; positions in bytes from the beginning of the archive (of the unpacked one, if it is compressed).

    `special` is a device, a named pipe, or of a type that this module does not know. The data of a `sparse` member
    is stored without its holes.
    """

    name: str  # as it is stored, bytes that are not UTF-8 as surrogate escapes; a folder's without '/' at its end
    kind: Kind
    start: int  # of its first header
    offset: int  # of its data
    size: int  # of its data, as it is stored
    next: int  # where the header after it begins


def members(reader: Reader) -> Iterator[Member]:
    """Every member, in order; reads headers only.

    Raises DamageError, with the byte, where the archive is damaged or ends without its mark. The last member that was
    given may reach beyond that byte: then its data is cut off. Raises OSError where the storage fails.
    """
    position = 0
    common: Records = {}
    while (member := _member(reader, position, common)) is not None:
        yield member
        position = member.next


def _member(reader: Reader, start: int, common: Records) -> Member | None:
    """The member whose first header is at `start`; None at the end. `common`: what holds for all members from here."""
    own: Records = {}
    position = start
    while True:
        block = _block(reader, position)
        if not any(block):
            _check_end(reader, start, position)
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DamageError(_not_a_header(block, position, str(error)), position) from error
        position += _BLOCK
        if info.type not in _EXTENDED:
            break
        _extend(own, common, info, _payload(reader, position, info.size), position)
        position += _padded(info.size)

    if info.type == tarfile.GNUTYPE_SPARSE:  # its map goes on in blocks of its own
        more = block[482]
        while more:
            more = _block(reader, position)[504]
            position += _BLOCK
    records = common | own
    name = _name(records, info)
    size = _size(records, info, position) if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES else 0
    return Member(name, _kind(records, info), start, position, size, position + _padded(size))


def _block(reader: Reader, position: int) -> bytes:
    block = reader.read(position, _BLOCK)
    if len(block) < _BLOCK:
        end = position + len(block) if reader.end is None else reader.end
        raise DamageError("the archive ends here, without its end-of-archive mark", end)
    return block


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _check_end(reader: Reader, start: int, position: int) -> None:
    """Raise DamageError unless the blocks of zeros at `position` are all that there is."""
    if position != start:
        raise DamageError("an extended header without a member", start)
    tail = reader.read(position, _TAIL + 1)
    if len(tail) > _TAIL or tail.strip(b"\0"):
        raise DamageError("the archive ends here, but more than padding follows; it is not read", position)


def _not_a_header(block: bytes, position: int, error: str) -> str:
    if position:
        return f"no header of a member: {error}"
    packed = next((name for start, name in _PACKED.items() if block.startswith(start)), None)
    return f"not a tar archive, but {packed} data" if packed else "not a tar archive"


def _payload(reader: Reader, position: int, size: int) -> bytes:
    if not 0 <= size <= _LONGEST:
        raise DamageError(f"an extended header of {size} bytes; the limit is {_LONGEST}", position - _BLOCK)
    payload = reader.read(position, size)
    if len(payload) < size:
        raise DamageError("the archive ends within an extended header", position + len(payload))
    return payload


def _extend(own: Records, common: Records, info: tarfile.TarInfo, payload: bytes, position: int) -> None:
    """Add what an extended header says. As in `tarfile`, of two for one member the first counts."""
    if info.type == tarfile.GNUTYPE_LONGNAME:
        own.setdefault(b"path", payload.partition(b"\0")[0])
    elif info.type == tarfile.XGLTYPE:
        common.update(_records(payload, position))
    elif info.type in _PAX:
        for keyword, value in _records(payload, position).items():
            own.setdefault(keyword, value)


def _records(payload: bytes, position: int) -> Records:
    """The records of a pax header that matter here. Raises DamageError where they make no sense."""
    found: Records = {}
    begin = 0
    while begin < len(payload) and payload[begin]:
        match = _RECORD.match(payload, begin)
        end = begin + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(payload) or payload[end - 1 : end] != b"\n":
            raise DamageError("a pax header that makes no sense", position + begin)
        keyword, _, value = payload[match.end() : end - 1].partition(b"=")
        if keyword in (b"path", b"size") or keyword.startswith(b"GNU.sparse."):
            found[keyword] = value
        begin = end
    return found


def _name(records: Records, info: tarfile.TarInfo) -> str:
    stored = records.get(b"GNU.sparse.name", records.get(b"path"))
    name = info.name if stored is None else stored.decode("utf-8", "surrogateescape")
    return name.rstrip("/") if info.isdir() else name


def _size(records: Records, info: tarfile.TarInfo, position: int) -> int:
    stored = records.get(b"size")
    if stored is None:
        size = info.size
    elif stored.isdigit() and len(stored) < 20:
        size = int(stored)
    else:
        size = -1
    if not 0 <= size < 1 << 62:
        raise DamageError("a member whose size makes no sense", position - _BLOCK)
    return size


def _kind(records: Records, info: tarfile.TarInfo) -> Kind:
    if info.type in _LINKS:
        return "link"
    if info.isdir():
        return "folder"
    if not info.isreg():
        return "special"
    sparse = info.type == tarfile.GNUTYPE_SPARSE or any(keyword.startswith(b"GNU.sparse.") for keyword in records)
    return "sparse" if sparse else "file"
