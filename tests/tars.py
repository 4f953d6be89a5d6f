"""Tars for the tests: members by name, of every type, and whole shards of small images."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

Part = tuple[str, bytes] | tarfile.TarInfo


def png(number: int, size: int = 8) -> bytes:
    """A grey PNG, another for every number."""
    rows = b"".join(b"\0" + bytes((number + 3 * x * y) % 256 for x in range(size)) for y in range(size))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    made = b"\x89PNG\r\n\x1a\n"
    for name, data in [*chunks, (b"IEND", b"")]:
        made += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return made


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    """A member without data: a link, a device, a folder, or an empty file."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def tar(parts: Iterable[Part], layout: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of (name, data) and members without data."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=layout) as archive:
        for part in parts:
            if isinstance(part, tarfile.TarInfo):
                archive.addfile(part)
            else:
                info = tarfile.TarInfo(part[0])
                info.size = len(part[1])
                archive.addfile(info, io.BytesIO(part[1]))
    return output.getvalue()


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """One header block whose fields are taken as they are, with a right checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def write(path: Path, parts: Iterable[Part], layout: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(parts, layout))
    return path


def shard(numbers: Iterable[int], folder: str = "") -> list[Part]:
    """For every number a PNG and a class: `000007.png`, `000007.cls`."""
    parts: list[Part] = []
    for number in numbers:
        parts += [(f"{folder}{number:06d}.png", png(number)), (f"{folder}{number:06d}.cls", b"%d" % (number % 3))]
    return parts
