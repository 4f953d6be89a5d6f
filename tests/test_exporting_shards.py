"""A clean copy of tar shards: members as they were, in their order, and the webdataset library reads what was kept."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import random
import tarfile
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath
from webdataset.tariterators import group_by_keys, tar_file_expander

from cdclean.datasets import open_dataset, samples
from cdclean.errors import InputError, OutputError, UsageError
from cdclean.exporting import Exported, export
from cdclean.exporting.places import MARKER
from cdclean.schema import DECISIONS, MANIFEST, RECORDS, SCHEMA_VERSION
from cdclean.storage import Location, locate
from tests.runs import contents, hidden, snapshot

Members = Sequence[tuple[str, bytes]]  # name, content; a name that ends in / is a folder

PLAIN: dict[str, Members] = {
    "a-000.tar": [
        ("1.jpg", b"one"),
        ("1.cls", b"0"),
        ("1.json", b"{}"),
        ("2.jpg", b"two" * 700),
        ("2.cls", b"1"),
        ("3.cls", b"0"),
        ("3.seg.png", b"mask"),
        ("3.jpg", b"three"),
    ],
    "a-001.tar": [("4.jpg", b"four"), ("4.txt", b"text of four")],
    "a-002.tar": [("5.jpg", b"five"), ("6.jpg", b""), ("7.jpg", b"seven" * 500)],
}


def write_shard(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar with exactly these members, compressed as its name says."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number, (name, content) in enumerate(members):
            info = tarfile.TarInfo(name.rstrip("/"))
            info.mtime, info.uname, info.mode = 1_600_000_000 + number, "someone", 0o640
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(path.name, buffer.getvalue()))
    return path


def pack(name: str, data: bytes) -> bytes:
    if name.endswith("gz"):
        return gzip.compress(data)
    if name.endswith(".bz2"):
        return bz2.compress(data)
    if name.endswith(".zst"):
        return pa.compress(data, "zstd", asbytes=True)
    return data


def unpack(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name.endswith("gz"):
        return gzip.decompress(data)
    if path.name.endswith(".bz2"):
        return bz2.decompress(data)
    if path.name.endswith(".zst"):
        return pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
    return data


def write_shards(root: Path, shards: Mapping[str, Members]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, members in shards.items():
        write_shard(root / name, members)
    return root


def scanned(run: Path, *locations: str) -> Path:
    """A complete run of the WebDataset at `locations`, as a scan that could score every image writes it."""
    dataset = open_dataset(*locations)
    assert dataset.kind == "webdataset"
    rows = list(samples(dataset))
    common = {"key": [row.key for row in rows], "url": [row.url for row in rows]}
    common |= {"class_name": [row.class_name for row in rows], "label": [0 for _ in rows]}
    manifest = common | {name: [getattr(row, name) for row in rows] for name in ("offset", "size", "problem", "access")}
    records = common | {
        "status": ["ok" if row.problem is None else "unreadable" for row in rows],
        "content_hash": [None if row.problem else digest(row) for row in rows],
        "mask_norm": [None if row.problem else 1.0 for row in rows],
    }
    (run / "records").mkdir(parents=True)
    pq.write_table(table(manifest, MANIFEST, len(rows)), run / "manifest.parquet")
    pq.write_table(table(records, RECORDS, len(rows)), run / "records/part-00000.parquet")
    about = {"location": dataset.location, "kind": dataset.kind, "name": dataset.name, "files": list(dataset.files)}
    about |= {"samples": len(rows), "classes": [], "digest": "0" * 64}
    (run / "run.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, "dataset": about}))
    (run / "_SUCCESS").touch()
    return run


def digest(row: Any) -> str:
    from cdclean.datasets.reading import contents

    (read,) = contents([row])
    return hashlib.sha256(read()).hexdigest()


def table(columns: Mapping[str, list[Any]], schema: pa.Schema, rows: int) -> pa.Table:
    return pa.table([pa.array(columns.get(f.name, [None] * rows), f.type) for f in schema], schema=schema)


def decide(run: Path, dropped: Iterable[str]) -> pa.Table:
    """Drop the samples with these keys."""
    rows = pq.read_table(run / "manifest.parquet", columns=["key", "problem"]).to_pylist()
    gone = set(dropped)
    assert gone <= {row["key"] for row in rows}
    keep = [row["key"] not in gone and row["problem"] is None for row in rows]
    columns = {"key": [row["key"] for row in rows], "keep": keep, "reason": ["" for _ in rows]}
    return pa.table(columns, schema=DECISIONS)


def listing(path: Path) -> list[tuple[str, bytes]]:
    """Name and content of every member, by tarfile; a folder's name ends in /."""
    with tarfile.open(fileobj=io.BytesIO(unpack(path))) as tar:
        return [
            (member.name + "/", b"") if member.isdir() else (member.name, tar.extractfile(member).read())  # type: ignore[union-attr]
            for member in tar
        ]


def listings(folder: Path) -> dict[str, list[tuple[str, bytes]]]:
    return {path.name: listing(path) for path in sorted(folder.iterdir()) if path.name != MARKER}


def by_the_library(folder: Path) -> list[dict[str, Any]]:
    """What the webdataset library reads, without what it adds itself. It would leave files open that it opens."""
    shards = [{"url": str(path), "stream": io.BytesIO(unpack(path))} for path in sorted(folder.rglob("*.tar*"))]
    read = group_by_keys(tar_file_expander(shards))
    return [{k: v for k, v in sample.items() if k == "__key__" or not k.startswith("__")} for sample in read]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", PLAIN)


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    return scanned(tmp_path / "x.cdclean", str(data))


def test_what_is_kept_is_as_it_was(tmp_path: Path, data: Path, run: Path) -> None:
    before, original = snapshot(data), by_the_library(data)
    out, bad = tmp_path / "clean", tmp_path / "bad"
    steps: list[int] = []
    done = export(run, decide(run, ["2", "4"]), out, quarantine=bad, progress=steps.append)
    assert listings(out) == {
        "a-000.tar": [member for member in PLAIN["a-000.tar"] if not member[0].startswith("2.")],
        "a-002.tar": list(PLAIN["a-002.tar"]),
    }
    assert listings(bad) == {"a-000.tar": list(PLAIN["a-000.tar"][3:5]), "a-001.tar": list(PLAIN["a-001.tar"])}
    assert (out / "a-002.tar").read_bytes() == (data / "a-002.tar").read_bytes()
    kept = sum(len(c) for members in listings(out).values() for _, c in members)
    assert done == Exported(5, 4, kept, 2, ("a-001.tar",), 0, 0, out, bad)
    assert sum(steps) == 7
    assert by_the_library(out) == [sample for sample in original if sample["__key__"] not in "24"]
    assert by_the_library(bad) == [sample for sample in original if sample["__key__"] in "24"]
    assert snapshot(data) == before
    assert hidden(tmp_path) == []


def test_nothing_dropped_nothing_changed(tmp_path: Path, data: Path, run: Path) -> None:
    done = export(run, decide(run, []), tmp_path / "clean")
    assert contents(tmp_path / "clean") == contents(data)
    assert done.emptied == ()


def test_everything_dropped(tmp_path: Path, run: Path) -> None:
    done = export(run, decide(run, "1234567"), tmp_path / "clean")
    assert listings(tmp_path / "clean") == {}
    assert (done.files, done.bytes, done.emptied) == (0, 0, ("a-000.tar", "a-001.tar", "a-002.tar"))


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".tar.bz2", ".tar.zst"])
def test_compressed_shards_stay_compressed(tmp_path: Path, ending: str) -> None:
    big = random.Random(0).randbytes(1_100_000)
    shards = {
        f"s-0{ending}": [*PLAIN["a-000.tar"], ("9.jpg", big), ("9.txt", b"nine")],
        f"s-1{ending}": [("8.jpg", b"8")],
    }
    data = write_shards(tmp_path / "shards", shards)
    run = scanned(tmp_path / "x.cdclean", str(data))
    export(run, decide(run, ["2", "8"]), tmp_path / "clean")
    kept = [member for member in shards[f"s-0{ending}"] if not member[0].startswith("2.")]
    assert listings(tmp_path / "clean") == {f"s-0{ending}": kept}
    export(run, decide(run, []), tmp_path / "all")
    assert unpack(tmp_path / f"all/s-0{ending}") == unpack(data / f"s-0{ending}")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_odd_ones(tmp_path: Path, form: int) -> None:
    deep = "folder/" * 30
    members = [(f"{deep}{name}", name.encode()) for name in ("1.jpg", "1.txt", "2.jpg", "é.jpg", "3." + "x" * 200)]
    members += [("a/b.c/4.jpg", b"4"), ("a/b.c/4.JSON", b"{}")]
    write_shard(tmp_path / "shards/0.tar", members, form)
    run = scanned(tmp_path / "x.cdclean", str(tmp_path / "shards"))
    export(run, decide(run, [f"{deep}1"]), tmp_path / "clean")
    assert listing(tmp_path / "clean/0.tar") == [members[2], members[3], members[5], members[6]]
    with tarfile.open(tmp_path / "shards/0.tar") as before, tarfile.open(tmp_path / "clean/0.tar") as after:
        headers = {member.name: member.get_info() for member in before}
        assert all(member.get_info() == headers[member.name] for member in after)


def test_members_of_no_sample_stay_in_their_places(tmp_path: Path) -> None:
    members = [("./", b""), ("__info__", b"i"), ("1.jpg", b"1"), ("sub/", b""), ("1.txt", b"t"), ("README", b"r")]
    members += [("2.jpg", b"2"), ("__end__/", b""), ("2.txt", b"t"), ("last/", b"")]
    write_shard(tmp_path / "shards/0.tar", members)
    write_shard(tmp_path / "shards/1.tar.gz", [*members[:-1], ("3.jpg", b"3"), ("x/", b""), ("__x__", b"x" * 600)])
    run = scanned(tmp_path / "x.cdclean", str(tmp_path / "shards"))
    keys = pq.read_table(run / "manifest.parquet")["key"].to_pylist()
    second = next(key for key in keys if key.startswith("2@"))
    done = export(run, decide(run, ["1", second]), tmp_path / "clean", quarantine=tmp_path / "bad")
    clean = listings(tmp_path / "clean")
    assert clean["0.tar"] == [member for member in members if not member[0].startswith("1.")]
    assert [name for name, _ in clean["1.tar.gz"]][-3:] == ["3.jpg", "x/", "__x__"]
    assert ("README", b"r") in clean["1.tar.gz"]
    assert listings(tmp_path / "bad") == {"0.tar": [members[2], members[4]], "1.tar.gz": [members[6], members[8]]}
    assert done.files == 3


def test_headers_for_all_members_stay_when_the_first_goes(tmp_path: Path) -> None:
    path = tmp_path / "shards/0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of all"}) as tar:
        for name in ("1.jpg", "2.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    run = scanned(tmp_path / "x.cdclean", str(path))
    export(run, decide(run, ["1"]), tmp_path / "clean")
    with tarfile.open(tmp_path / "clean/0.tar") as tar:
        assert tar.getnames() == ["2.jpg"]
        assert tar.pax_headers == {"comment": "of all"}


def test_what_could_not_be_scanned_is_left_out(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "shards/0.tar", [("1.jpg", b"1"), ("t.txt", b"text alone"), ("../2.jpg", b"2")])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("3.jpg", tarfile.SYMTYPE), ("link", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("/up/README")
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("README"))
    run = scanned(tmp_path / "x.cdclean", str(path))
    done = export(run, decide(run, []), tmp_path / "clean", quarantine=tmp_path / "bad")
    assert [name for name, _ in listing(tmp_path / "clean/0.tar")] == ["1.jpg", "README"]
    assert (done.files, done.sidecars, done.quarantined) == (1, 1, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "clean", "bad", "x.cdclean"}
    assert list(contents(tmp_path / "clean")) == ["0.tar"]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_damaged_shards_give_what_is_whole(tmp_path: Path, ending: str) -> None:
    # Without an image beside the image: with the last member cut off, that would be another sample.
    members = [(name.replace("seg.png", "seg.npy"), content) for name, content in PLAIN["a-000.tar"]]
    whole = unpack(write_shard(tmp_path / f"whole{ending}", members))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = {member.name: member.offset_data + member.size for member in tar}
    for cut in range(700, len(whole) - 9000, 700):
        folder = tmp_path / str(cut)
        folder.mkdir()
        path = folder / f"0{ending}"
        path.write_bytes(pack(path.name, whole[:cut]))
        run = scanned(folder / "x.cdclean", str(path))
        done = export(run, decide(run, []), folder / "clean")
        images = [key for key in "123" if ends[f"{key}.jpg"] <= cut]
        assert listing(folder / f"clean/0{ending}") == [
            (name, content) for name, content in members if name[0] in images and ends[name] <= cut
        ]
        assert done.files == len(images)


# ---- New shards --------------------------------------------------------------------------------------------------


def test_new_shards_of_one_size(tmp_path: Path, data: Path, run: Path) -> None:
    original = by_the_library(data)
    done = export(run, decide(run, ["4"]), tmp_path / "clean", shard_size=4)
    clean = listings(tmp_path / "clean")
    assert list(clean) == ["shard-000000.tar", "shard-000001.tar"]
    assert clean["shard-000000.tar"] == [*PLAIN["a-000.tar"], PLAIN["a-002.tar"][0]]
    assert clean["shard-000001.tar"] == list(PLAIN["a-002.tar"][1:])
    assert by_the_library(tmp_path / "clean") == [sample for sample in original if sample["__key__"] != "4"]
    assert (done.files, done.emptied) == (6, ("a-001.tar",))


def test_new_shards_keep_samples_of_one_key_apart(tmp_path: Path) -> None:
    shards = {"0.tar": [("1.jpg", b"a"), ("2.jpg", b"b"), ("1.txt", b"c"), ("1.jpg", b"d")], "1.tar": [("1.jpg", b"e")]}
    data = write_shards(tmp_path / "shards", shards)
    run = scanned(tmp_path / "x.cdclean", str(data))
    with pytest.raises(UsageError, match="several samples of the key '1'") as error:
        export(run, decide(run, ["2"]), tmp_path / "clean")
    assert "--shard-size" in error.value.hint
    assert not (tmp_path / "clean").exists()
    export(run, decide(run, ["2"]), tmp_path / "clean", shard_size=100)
    assert by_the_library(tmp_path / "clean") == [
        {"__key__": "1", "jpg": b"a"},
        {"__key__": "1", "txt": b"c", "jpg": b"d"},
        {"__key__": "1", "jpg": b"e"},
    ]
    export(run, decide(run, []), tmp_path / "all")
    assert (tmp_path / "all/0.tar").read_bytes() == (data / "0.tar").read_bytes()


@pytest.mark.parametrize("size", [0, -1])
def test_shard_sizes_that_make_no_sense(tmp_path: Path, run: Path, size: int) -> None:
    with pytest.raises(UsageError, match="1 or more"):
        export(run, decide(run, []), tmp_path / "clean", shard_size=size)


NAMES = st.tuples(st.sampled_from(["", "a/", "b/"]), st.sampled_from("1234"), st.sampled_from(["", ".x"])).map("".join)
ENDINGS = st.lists(st.sampled_from(["jpg", "png", "txt", "json", "cls", "seg.png"]), min_size=1, unique=True)


@settings(max_examples=30)
@given(
    st.lists(
        st.lists(st.tuples(NAMES, ENDINGS), max_size=5, unique_by=lambda s: s[0].split(".")[0]), min_size=1, max_size=3
    ),
    st.sampled_from([".tar", ".tar.gz"]),
    st.sampled_from([None, 1, 2, 100]),
    st.data(),
)
def test_the_library_reads_just_what_was_kept(
    shards: list[list[tuple[str, list[str]]]], ending: str, shard_size: int | None, draw: st.DataObject
) -> None:
    files = {
        f"{number}{ending}": [
            (f"{key}.{field}", f"{number}{key}{field}".encode()) for key, fields in shard for field in fields
        ]
        for number, shard in enumerate(shards)
    }
    if not any(name.endswith(("jpg", "png")) for members in files.values() for name, _ in members):
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_shards(folder / "shards", files)
        run = scanned(folder / "x.cdclean", str(data))
        rows = pq.read_table(run / "manifest.parquet").to_pylist()
        readable = [row["key"] for row in rows if row["problem"] is None]
        dropped = draw.draw(st.sets(st.sampled_from(readable)))
        before = snapshot(data)
        done = export(run, decide(run, dropped), folder / "clean", quarantine=folder / "bad", shard_size=shard_size)
        expected: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for row, sample in zip(rows, by_the_library(data), strict=True):  # every group has a row
            if row["problem"] is None:
                expected[row["key"] not in dropped].append(sample)
        assert by_the_library(folder / "clean") == expected[True]
        assert by_the_library(folder / "bad") == expected[False]
        assert (done.files, done.quarantined) == (len(expected[True]), len(expected[False]))
        if shard_size is None:
            assert contents(folder / "clean").keys() == files.keys() - set(done.emptied)
        assert snapshot(data) == before
        assert hidden(folder) == []


# ---- A dataset that is not what it was ---------------------------------------------------------------------------


def test_other_bytes_than_were_scanned_are_never_exported(tmp_path: Path, data: Path, run: Path) -> None:
    write_shard(data / "a-002.tar", [("5.jpg", b"five"), ("6.jpg", b""), ("7.jpg", b"SEVEN" * 500)])
    with pytest.raises(InputError, match=r"a-002\.tar has changed since the scan"):
        export(run, decide(run, []), tmp_path / "clean", quarantine=tmp_path / "bad")
    assert not (tmp_path / "clean").exists()
    assert not (tmp_path / "bad").exists()
    assert hidden(tmp_path) == []
    assert export(run, decide(run, ["7"]), tmp_path / "clean").files == 6


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("5.jpg", b"five!"), ("6.jpg", b""), ("7.jpg", b"seven" * 500)],
            "has changed since the scan: 5 bytes, not 4",
        ),
        ([("0.jpg", b""), *PLAIN["a-002.tar"]], "5 is not in .* as it was when it was scanned|has changed since"),
        ([("5.jpg", b"five")], "6 is not in .*a-002.tar as it was when it was scanned\n"),
        (None, "cannot be read: no such file"),
    ],
)
def test_what_is_gone_or_has_another_size_is_named(
    tmp_path: Path, data: Path, run: Path, members: Members | None, message: str
) -> None:
    if members is None:
        (data / "a-002.tar").unlink()
    else:
        write_shard(data / "a-002.tar", members)
    with pytest.raises(InputError, match=message) as error:
        export(run, decide(run, []), tmp_path / "clean")
    assert error.value.exit_code == 3
    assert not (tmp_path / "clean").exists()


def test_what_came_after_the_scan_is_left_out_and_counted(tmp_path: Path, data: Path, run: Path) -> None:
    write_shard(data / "a-001.tar", [*PLAIN["a-001.tar"], ("8.jpg", b"new"), ("8.txt", b"new")])
    done = export(run, decide(run, ["1"]), tmp_path / "clean")
    assert listing(tmp_path / "clean/a-001.tar") == list(PLAIN["a-001.tar"])
    assert done.unscanned == 1


# ---- Names and places --------------------------------------------------------------------------------------------


def test_shards_of_several_folders_keep_them(tmp_path: Path) -> None:
    for name in ("train/0.tar", "val/0.tar", "val/1.tar"):
        write_shard(tmp_path / "data" / name, [(f"{name[0]}{name[-5]}.jpg", name.encode())])
    run = scanned(tmp_path / "x.cdclean", str(tmp_path / "data/train"), str(tmp_path / "data/val"))
    done = export(run, decide(run, ["v1"]), tmp_path / "clean")
    clean = sorted(str(path.relative_to(tmp_path / "clean")) for path in (tmp_path / "clean").rglob("*.tar"))
    assert clean == ["train/0.tar", "val/0.tar"]
    assert done.emptied == ("val/1.tar",)


@pytest.mark.parametrize("place", ["shards", "shards/clean", "shards/..", "x.cdclean", "shards/a-000.tar"])
def test_places_that_are_never_written_to(tmp_path: Path, data: Path, run: Path, place: str) -> None:
    before = snapshot(tmp_path)
    for mode in ("copy", "list"):
        with pytest.raises(UsageError):
            export(run, decide(run, []), tmp_path / place, overwrite=True, mode=mode)  # type: ignore[arg-type]
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("mode", ["hardlink", "symlink"])
def test_shards_are_not_linked(tmp_path: Path, run: Path, mode: str) -> None:
    with pytest.raises(UsageError, match="for folders of images"):
        export(run, decide(run, []), tmp_path / "clean", mode=mode)  # type: ignore[arg-type]


def test_a_dry_run_counts_samples_and_writes_nothing(tmp_path: Path, run: Path) -> None:
    before = snapshot(tmp_path)
    dry = export(run, decide(run, ["2", "4"]), tmp_path / "clean", quarantine=tmp_path / "bad", dry_run=True)
    assert snapshot(tmp_path) == before
    assert (dry.files, dry.sidecars, dry.quarantined, dry.emptied) == (5, None, 2, ("a-001.tar",))
    assert dry.bytes == 3 + 5 + 4 + 0 + 2500


def test_a_list_of_a_webdataset(tmp_path: Path, data: Path, run: Path) -> None:
    done = export(run, decide(run, ["2"]), tmp_path / "kept.jsonl", mode="list", format="jsonl")
    rows = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == list("134567")
    assert {row["url"] for row in rows} == {str(path) for path in data.iterdir()}
    assert done.files == 6


def test_a_target_that_cannot_be_written_leaves_nothing(tmp_path: Path, run: Path) -> None:
    def block(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(run, decide(run, []), tmp_path / "clean", progress=block)
    assert not (tmp_path / "clean").exists()
    assert hidden(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        export(run, decide(run, []), tmp_path / "file/clean")


# ---- Remote ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".tar", ".tar.zst"])
def test_shards_from_and_to_remote_storage(tmp_path: Path, ending: str) -> None:
    shards = {name.replace(".tar", ending): members for name, members in PLAIN.items()}
    local = write_shards(tmp_path / "shards", shards)
    store = f"memory://test-{uuid.uuid4().hex}"
    there = remote(f"{store}/shards")
    for path in local.iterdir():
        there.fs.pipe_file(f"{there.path}/{path.name}", path.read_bytes())
    run = scanned(tmp_path / "x.cdclean", f"{store}/shards")
    done = export(run, decide(run, ["2", "4"]), remote(f"{store}/clean"), quarantine=tmp_path / "bad")
    export(run, decide(run, ["2", "4"]), tmp_path / "clean")
    expected = contents(tmp_path / "clean") | {"_SUCCESS": b""}
    assert objects(f"{store}/clean") == expected
    assert (done.files, done.quarantined) == (5, 2)
    with pytest.raises(UsageError, match="is, holds or lies in"):
        export(run, decide(run, []), remote(f"{store}/shards/clean"))
    with pytest.raises(UsageError, match="already there"):
        export(run, decide(run, []), remote(f"{store}/clean"))
    there.fs.pipe_file(f"{there.path}/a-002{ending}", b"")
    with pytest.raises(InputError):
        export(run, decide(run, []), remote(f"{store}/new"))
    assert objects(f"{store}/new") == {}


def remote(address: str) -> UPath:
    place: Location = locate(address)
    assert isinstance(place, UPath)
    return place


def objects(address: str) -> dict[str, bytes]:
    place = remote(address)
    found = {name.removeprefix(f"{place.path}/"): place.fs.cat_file(name) for name in place.fs.find(place.path)}
    return {name: data for name, data in found.items() if name != MARKER}
