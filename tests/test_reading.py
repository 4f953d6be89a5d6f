"""The bytes of samples: ranges on any thread, compressed archives in one pass, errors where they belong."""

from __future__ import annotations

import bz2
import gzip
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdclean.datasets import reading
from cdclean.datasets.reading import DamageError, contents, open_reader
from cdclean.datasets.sample import Access, Dataset, Sample
from cdclean.datasets.webdataset import open_webdataset, samples
from cdclean.errors import DatasetError
from tests.tars import Part, png, shard, tar

NOISE = np.random.default_rng(0).bytes(3_000_000)


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return packed


def bzip2(data: bytes) -> bytes:
    return bz2.compress(data, 1)  # blocks of 100,000 bytes


PACK: dict[Access, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bz2": bzip2, "zstd": zstd}
ENDING: dict[str, str] = {"range": ".tar", "gzip": ".tar.gz", "bz2": ".tar.bz2", "zstd": ".tar.zst"}
packed = pytest.mark.parametrize("access", PACK)


@dataclass(frozen=True)
class Place:
    url: str
    offset: int
    size: int
    access: Access = "range"


def outcomes(places: list[Place] | list[Sample]) -> list[bytes | str]:
    """The bytes of each, or the error."""
    found: list[bytes | str] = []
    for read in contents(places):
        try:
            found.append(read())
        except OSError as error:
            found.append(str(error))
    return found


# --- ranges ---


def test_ranges_are_read_on_any_thread_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(NOISE)
    places = [Place(f"{tmp_path}/x", (number * 7919) % 10**6, number) for number in range(100)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda read: read(), contents(places)))
    assert found == [NOISE[place.offset : place.offset + place.size] for place in places]


def test_errors_are_raised_where_the_bytes_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    places = [Place(f"{tmp_path}/none", 0, 3), Place(f"{tmp_path}/x", 3, 3), Place(f"{tmp_path}/x", 0, 10**12)]
    places += [Place("unknown-scheme://x", 0, 1), Place(f"{tmp_path}/x", 0, 3)]
    found = outcomes(places)
    assert "No such file" in str(found[0])
    assert found[1] == b"45"
    assert "the limit is" in str(found[2])
    assert isinstance(found[3], str)
    assert found[4] == b"123"


# --- compressed ---


def archive(path: Path, access: Access, parts: list[Part], cut: int | None = None) -> Path:
    path = path.with_name(path.name + ENDING[access])
    path.write_bytes(PACK[access](tar(parts))[:cut] if access != "range" else tar(parts)[:cut])
    return path


def big(count: int) -> list[Part]:
    return [(f"{number:03d}.jpg", NOISE[number * 40_000 : number * 40_000 + 40_000]) for number in range(count)]


@packed
def test_a_compressed_shard_holds_what_a_plain_one_does(tmp_path: Path, access: Access) -> None:
    parts = [*shard(range(50), "a/"), *big(5)]
    plain, squeezed = (
        list(samples(open_webdataset([str(archive(tmp_path / "0", kind, parts))]))) for kind in ("range", access)
    )
    assert {sample.access for sample in squeezed} == {access}
    assert [(s.key, s.offset, s.size, s.class_name, s.problem) for s in plain] == [
        (s.key, s.offset, s.size, s.class_name, s.problem) for s in squeezed
    ]
    assert outcomes(squeezed) == outcomes(plain)
    assert outcomes(squeezed[::-7]) == outcomes(plain[::-7])  # backwards, from the beginning each time


@packed
def test_one_pass_a_shard(tmp_path: Path, access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [archive(tmp_path / str(number), access, shard(range(number * 9, number * 9 + 9))) for number in range(3)]
    found = list(samples(open_webdataset([str(shard) for shard in shards])))
    opened = []

    def counted(url: str, access: Access) -> Any:
        opened.append(url)
        return open_reader(url, access)

    monkeypatch.setattr(reading, "open_reader", counted)
    assert outcomes(found) == [png(number) for number in range(27)]
    assert opened == [str(shard) for shard in shards]


@packed
def test_several_streams_in_one_file_are_one(tmp_path: Path, access: Access) -> None:
    data = tar(big(4))
    path = tmp_path / f"0{ENDING[access]}"
    path.write_bytes(PACK[access](data[:70_001]) + PACK[access](data[70_001:]))
    found = list(samples(open_webdataset([str(path)])))
    assert outcomes(found) == [part[1] for part in big(4)]


@packed
def test_a_cut_stream_gives_what_stands_before_the_cut(tmp_path: Path, access: Access) -> None:
    parts = big(20)
    whole = archive(tmp_path / "whole", access, parts)
    size = whole.stat().st_size
    kept = []
    for cut in range(size // 4, size, size // 5):
        found = list(samples(open_webdataset([str(archive(tmp_path / "0", access, parts, cut))])))
        assert found[-1].key == f"0{ENDING[access]}/"
        assert "of the unpacked archive, nothing is read from there on: the compressed data is damaged" in str(
            found[-1].problem
        )
        good = [sample for sample in found if sample.problem is None]
        assert outcomes(good) == [part[1] for part in parts[: len(good)]]
        kept.append(len(good))
        # NOISE does not compress: what is missing is at most a block of the format.
        assert len(good) >= cut / size * 20 - 6
        # What the manifest promised before the file was cut is an error, for each, where it is read.
        cut_file = [Place(sample.url, 1 << 22, 10, access) for sample in good]
        assert all("damaged" in str(outcome) for outcome in outcomes(cut_file))
    assert kept == sorted(kept)


@packed
def test_damage_spoils_itself_and_what_follows(tmp_path: Path, access: Access) -> None:
    path = archive(tmp_path / "0", access, big(40))
    found = list(samples(open_webdataset([str(path)])))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    path.write_bytes(data)
    outcome = outcomes(found)
    right = [one == part[1] for one, part in zip(outcome, big(40), strict=True)]
    assert right[0] or access == "bz2"  # whose blocks are 900,000 bytes
    assert not all(right)
    again = samples(open_webdataset([str(path)])) if right[0] else iter(())
    assert len({sample.key for sample in again}) >= right[0]


@packed
def test_a_bomb_is_left(tmp_path: Path, access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_ALLOWANCE", 1 << 20)
    path = archive(tmp_path / "0", access, [("a.jpg", b"a"), ("b.jpg", bytes(64 << 20)), ("c.jpg", b"c")])
    found = list(samples(open_webdataset([str(path)])))
    assert [(sample.key, bool(sample.problem)) for sample in found] == [
        ("a", False),
        ("b", True),
        (f"{path.name}/", True),
    ]
    assert "unpacks to more than 100 times its size" in str(found[-1].problem)
    assert outcomes([found[0]]) == [b"a"]


@packed
@given(data=st.data())
@settings(max_examples=40)
def test_whatever_the_compressed_bytes(
    tmp_path_factory: pytest.TempPathFactory, access: Access, data: st.DataObject
) -> None:
    squeezed = bytearray(PACK[access](tar([*shard(range(20)), ("x.jpg", NOISE[:30_000])])))
    for _ in range(data.draw(st.integers(1, 5))):
        squeezed[data.draw(st.integers(0, len(squeezed) - 1))] = data.draw(st.integers(0, 255))
    del squeezed[data.draw(st.integers(0, len(squeezed))) :]
    path = tmp_path_factory.mktemp("fuzz") / f"0{ENDING[access]}"
    path.write_bytes(squeezed)
    found = list(samples(Dataset(str(path.parent), "webdataset", "x", (str(path),))))
    assert len({sample.key for sample in found}) == len(found)
    good = [sample for sample in found if sample.problem is None]
    assert [len(outcome) for outcome in outcomes(good)] == [sample.size for sample in good]


@packed
def test_not_compressed_at_all(tmp_path: Path, access: Access) -> None:
    path = tmp_path / f"0{ENDING[access]}"
    for data in (b"", tar(big(1)), b"\x1f\x8b\x08"):
        path.write_bytes(data)
        with pytest.raises(DatasetError, match="damaged at byte 0 "):
            open_webdataset([str(path)])


def test_damage_has_a_byte_wherever_it_is_raised(tmp_path: Path) -> None:
    path = archive(tmp_path / "0", "gzip", big(3), 50_000)
    with open_reader(os.fspath(path), "gzip") as reader:
        for _ in range(2):
            with pytest.raises(DamageError) as caught:
                reader.read(80_000, 1)
            assert 40_000 < caught.value.position < 60_000
        assert len(reader.read(caught.value.position - 10, 10)) == 10
        with pytest.raises(ValueError, match="has been passed"):
            reader.read(0, 1)


# --- tables ---


def test_rows_of_a_table_in_any_order(tmp_path: Path) -> None:
    images = [{"bytes": png(number), "path": None} for number in range(10)]
    pq.write_table(pa.table({"image": images}), tmp_path / "0.parquet", row_group_size=4)
    (tmp_path / "x").write_bytes(b"plain")
    order = [3, 4, 9, 0, 5, 5, 2]
    places = [Place(f"{tmp_path}/0.parquet", row, len(png(row)), "parquet") for row in order]
    places.insert(2, Place(f"{tmp_path}/x", 0, 5))
    expected: list[bytes | str] = [png(row) for row in order]
    expected.insert(2, b"plain")
    assert outcomes(places) == expected
    gone = outcomes([Place(f"{tmp_path}/1.parquet", 0, 1, "parquet"), Place(f"{tmp_path}/0.parquet", 10, 1, "parquet")])
    assert all(isinstance(outcome, str) for outcome in gone)
