"""Members of a tar: where `tarfile` finds them, and exactly how far a damaged archive can be trusted."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdclean.datasets.reading import DamageError
from cdclean.datasets.tar import Member, members
from tests.tars import header, member, padded, tar

LONG = "folder/" * 30 + "name.jpg"
END = bytes(1024)


@dataclass
class Bytes:
    """An archive in memory."""

    data: bytes
    modified: float | None = None

    @property
    def end(self) -> int:
        return len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]


def read(data: bytes) -> tuple[list[Member], DamageError | None]:
    found = []
    damage = None
    try:
        for one in members(Bytes(data)):
            found.append(one)
    except DamageError as error:
        damage = error
    assert damage is None or 0 <= damage.position <= len(data)
    return found, damage


def damage(data: bytes) -> tuple[int, int, str]:
    """Members before it, its byte, its message."""
    found, error = read(data)
    assert error is not None
    return len(found), error.position, str(error)


# --- what is right ---

NAMES = ["a.jpg", "folder/b.c.jpg", LONG, "ü.jpg", "\udcff.jpg", "../up.jpg", "/top.jpg", "no extension", "d" * 300]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_tarfile_finds_them(layout: int) -> None:
    names = [name for name in NAMES if layout != tarfile.USTAR_FORMAT or len(name) < 100]
    parts = [(name, name.encode("utf-8", "replace") * (number * 40)) for number, name in enumerate(names)]
    data = tar([*parts, member("folder/", tarfile.DIRTYPE), member("l.jpg", tarfile.SYMTYPE, "a.jpg")], layout)
    found, error = read(data)
    assert error is None
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as archive:
        expected = archive.getmembers()
    assert [(one.name, one.start, one.offset, one.size) for one in found] == [
        (info.name, info.offset, info.offset_data, info.size) for info in expected
    ]
    assert [one.kind for one in found] == ["file"] * len(parts) + ["folder", "link"]
    assert [one.start for one in found[1:]] == [one.next for one in found[:-1]]
    assert [data[one.offset : one.offset + one.size] for one in found[: len(parts)]] == [part[1] for part in parts]


def test_kinds() -> None:
    kinds = {
        tarfile.REGTYPE: "file",
        tarfile.AREGTYPE: "file",
        tarfile.CONTTYPE: "file",
        tarfile.SYMTYPE: "link",
        tarfile.LNKTYPE: "link",
        tarfile.DIRTYPE: "folder",
        tarfile.CHRTYPE: "special",
        tarfile.BLKTYPE: "special",
        tarfile.FIFOTYPE: "special",
        b"V": "special",
    }
    found, error = read(tar([member(f"{kind.hex()}.jpg", kind) for kind in kinds]))
    assert error is None
    assert [one.kind for one in found] == list(kinds.values())


def test_old_sparse_members_are_stepped_over_with_their_map() -> None:
    first = bytearray(header(b"s.jpg", b"00000001000", tarfile.GNUTYPE_SPARSE))
    first[482] = 1  # the map goes on
    first[148:156] = b" " * 8
    first[148:156] = b"%06o\0 " % sum(first)
    last = bytearray(512)
    more = bytearray(last)
    more[504] = 1
    data = bytes(first) + more + last + b"x" * 512 + header(b"b.jpg", b"0") + END
    found, error = read(data)
    assert error is None
    assert [(one.name, one.kind, one.offset, one.size) for one in found] == [
        ("s.jpg", "sparse", 1536, 512),
        ("b.jpg", "file", 2560, 0),
    ]


def test_pax_sparse_members_have_their_own_name() -> None:
    info = member("GNUSparseFile.0/s.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s.jpg"}
    found, _ = read(tar([info, ("b.jpg", b"b")]))
    assert [(one.name, one.kind) for one in found] == [("s.jpg", "sparse"), ("b.jpg", "file")]


def test_a_pax_size_counts_and_a_global_header_holds_for_all() -> None:
    def pax(kind: bytes, records: bytes) -> bytes:
        return header(b"pax", b"%011o" % len(records), kind) + padded(records)

    data = pax(tarfile.XGLTYPE, b"17 comment=hello\n") + pax(tarfile.XHDTYPE, b"12 size=600\n18 path=other.jpg\n")
    data += header(b"a.jpg", b"0") + padded(b"x" * 600) + header(b"b.jpg", b"0") + END
    found, error = read(data)
    assert error is None
    assert [(one.name, one.size) for one in found] == [("other.jpg", 600), ("b.jpg", 0)]


def test_of_two_extended_headers_the_first_counts() -> None:
    def pax(records: bytes) -> bytes:
        return header(b"pax", b"%011o" % len(records), b"x") + padded(records)

    data = pax(b"14 path=1.jpg\n") + pax(b"14 path=2.jpg\n") + header(b"3.jpg", b"0") + END
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = archive.getnames()
    assert [one.name for one in read(data)[0]] == expected == ["1.jpg"]


# --- what is not ---


def test_every_cut_is_told_where_it_is() -> None:
    parts = [("a.jpg", b"a" * 700), (LONG, b"b" * 1500), ("c.jpg", b"")]
    data = tar(parts)
    whole, _ = read(data)
    for cut in range(0, whole[-1].next + 512, 7):
        found, error = read(data[:cut])
        assert error is not None
        assert found == [one for one in whole if one.offset <= cut]
        assert error.position == cut
    for cut in range(whole[-1].next + 512, len(data), 512):  # within the zeros at the end
        assert read(data[:cut]) == (whole, None)


def test_damaged_headers() -> None:
    data = tar([("a.jpg", b"a" * 700), ("b.jpg", b"b")])
    assert damage(data[:1540] + b"?" + data[1541:]) == (1, 1536, "no header of a member: bad checksum")
    assert damage(b"?" + data[1:]) == (0, 0, "not a tar archive")
    assert damage(b"\x1f\x8b" + data) == (0, 0, "not a tar archive, but gzip data")
    assert damage(b"") == (0, 0, "the archive ends here, without its end-of-archive mark")
    assert read(END) == ([], None)


def test_what_follows_the_end_is_reported() -> None:
    one, two = tar([("a.jpg", b"a")]), tar([("b.jpg", b"b")])
    assert damage(one + two)[:2] == (1, 1024)
    assert read(one + bytes(1 << 19))[1] is None
    assert damage(one + bytes(2 << 20))[:2] == (1, 1024)


@pytest.mark.parametrize(
    "size", [b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"-0000000001\0"], ids=["huge", "below", "sign"]
)
def test_sizes_that_make_no_sense(size: bytes) -> None:
    assert damage(header(b"a.jpg", size) + END)[:2] == (0, 0)


@pytest.mark.parametrize("size", ["-1", "1e3", "9" * 30, ""])
def test_pax_sizes_that_make_no_sense(size: str) -> None:
    info = member("a.jpg")
    info.pax_headers = {"size": size}
    assert damage(tar([info]))[0] == 0


@pytest.mark.parametrize(
    "records",
    [b"0 path=a\n", b"99 path=a.jpg\n", b"path=a.jpg\n", b"9 path=a.jpg\n", b"12 path=a.jpgX", b"5\n", b"-5 path=a\n"],
)
def test_pax_headers_that_make_no_sense(records: bytes) -> None:
    data = header(b"pax", b"%011o" % len(records), b"x") + padded(records) + header(b"a.jpg", b"0") + END
    before, position, _ = damage(data)
    assert before == 0
    assert 512 <= position < 1024


@pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K"])
def test_huge_extended_headers_are_not_read(kind: bytes) -> None:
    class Endless(Bytes):
        def read(self, offset: int, size: int) -> bytes:
            assert size <= 1 << 20, "the header was read"
            return super().read(offset, size)

    with pytest.raises(DamageError, match="an extended header of 1073741824 bytes"):
        list(members(Endless(header(b"pax", b"%011o" % (1 << 30), kind) + END)))


def test_many_extended_headers_of_one_member_do_not_pile_up() -> None:
    records = b"1000000 comment=" + b"x" * (1000000 - 17) + b"\n"
    data = (header(b"pax", b"%011o" % len(records), b"x") + padded(records)) * 40 + header(b"a.jpg", b"0") + END
    tracemalloc.start()
    found, _ = read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [one.name for one in found] == ["a.jpg"]
    assert peak < 8e6
    chain = header(b"x", b"0", b"L") * 5000  # more than Python's stack takes
    assert [one.name for one in read(chain + header(b"a.jpg", b"0") + END)[0]] == [""]


def test_an_extended_header_without_a_member_is_damage() -> None:
    assert damage(header(b"x", b"0", b"x") + END)[:2] == (0, 0)


SEEDS = [
    tar(
        [("a.jpg", b"a" * 700), (LONG, b"b" * 40), member("c.jpg", tarfile.SYMTYPE, "a.jpg"), ("c.json", b"{}")], layout
    )
    for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
]


@given(st.data())
@settings(max_examples=300)
def test_whatever_the_bytes_positions_grow_and_nothing_else_is_raised(data: st.DataObject) -> None:
    archive = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(0, 6))):
        position = data.draw(st.integers(0, len(archive) - 1))
        archive[position] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):  # let the change pass the checksum
            block = position // 512 * 512
            archive[block + 148 : block + 156] = b" " * 8
            archive[block + 148 : block + 156] = b"%06o\0 " % sum(archive[block : block + 512])
    if data.draw(st.booleans()):
        del archive[data.draw(st.integers(0, len(archive))) :]
    found, _ = read(bytes(archive))
    position = 0
    for one in found:
        assert one.start == position < one.offset <= one.next
        assert one.offset + one.size <= one.next
        position = one.next


@given(st.binary(max_size=3000))
@settings(max_examples=100)
def test_any_bytes_are_an_archive_or_damage(data: bytes) -> None:
    read(data)
