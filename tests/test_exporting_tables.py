"""Filtered copies of tables and lists: the wanted rows in the same schema, the same bytes, and nothing else."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cdclean import datasets
from cdclean.datasets import lists, tables
from cdclean.datasets.reading import contents
from cdclean.datasets.sample import Dataset
from cdclean.errors import InputError, OutputError
from cdclean.exporting import rewriting
from cdclean.exporting.filled import Filled
from cdclean.exporting.tables import fill
from cdclean.storage import Location, locate, to_text
from tests.runs import contents as files_below
from tests.runs import hidden, snapshot, write_tree

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    "boxes": {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"},
    "when": {"dtype": "timestamp[us]", "_type": "Value"},
}
METADATA = {"huggingface": json.dumps({"info": {"features": FEATURES}}), "ours": "kept"}


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, value // 256, 7)).save(file, "PNG")
    return file.getvalue()


def rows(first: int, count: int) -> pa.Table:
    numbers = range(first, first + count)
    columns = {
        "image": pa.array([{"bytes": png(number), "path": f"{number}.png"} for number in numbers], IMAGE),
        "label": pa.array([number % 2 for number in numbers]),
        "boxes": pa.array([[0.5] * (number % 3) for number in numbers], pa.list_(pa.float32())),
        "when": pa.array([number if number % 4 else None for number in numbers], pa.timestamp("us")),
    }
    return pa.table(columns).replace_schema_metadata(METADATA)


def write(path: Path, table: pa.Table, rows: int = 4, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pq.write_table(table, file, row_group_size=rows, **options)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    write(folder / "data/train-0.parquet", rows(0, 10))
    write(folder / "data/train-1.parquet", rows(10, 3))
    write(folder / "test.parquet", rows(13, 2))
    (folder / "README.md").write_text("15 rows")
    return folder


def described(dataset: Dataset) -> pa.Table:
    """What an export knows of every sample of a run, its hash as a scan finds it."""
    found = list(datasets.samples(dataset))
    names = ("key", "url", "offset", "size", "class_name", "access", "problem")
    columns: dict[str, Any] = {name: [getattr(sample, name) for sample in found] for name in names}
    columns["label"] = [None] * len(found)
    read = contents(sample for sample in found)
    columns["content_hash"] = [
        None if sample.problem else hashlib.sha256(data()).hexdigest() for sample, data in zip(found, read, strict=True)
    ]
    text = [pa.field(name, pa.string()) for name in ("key", "url", "class_name", "access", "problem", "content_hash")]
    numbers = [pa.field(name, pa.int64()) for name in ("offset", "size", "label")]
    return pa.table(columns, schema=pa.schema([*text, *numbers]))


def copy(
    dataset: Dataset,
    target: Location,
    wanted: Callable[[str], bool],
    progress: Callable[[int], object] = lambda _: None,
) -> Filled:
    if isinstance(target, Path):
        target.mkdir()
    samples = described(dataset)
    good = samples["problem"].is_null().to_pylist()
    mask = np.array([wanted(key) and ok for key, ok in zip(samples["key"].to_pylist(), good, strict=True)])
    return fill(samples, mask, dataset.files, target, progress)


def odd(key: str) -> bool:
    return int(key.rpartition("/")[2]) % 2 == 1


# --- Parquet with images ---


def test_the_wanted_rows_in_the_same_files(root: Path, tmp_path: Path) -> None:
    before = snapshot(root)
    counts: list[int] = []
    target = tmp_path / "clean"
    filled = copy(tables.open_tables(str(root)), target, odd, counts.append)
    expected = {name: range(1, count, 2) for name, count in (("data/train-0", 10), ("data/train-1", 3), ("test", 2))}
    assert sorted(files_below(target)) == sorted(f"{name}.parquet" for name in expected)
    for name, kept in expected.items():
        source, result = (pq.ParquetFile(place / f"{name}.parquet") for place in (root, target))
        with source, result:
            assert result.read().equals(source.read().take(list(kept)), check_metadata=True)
            assert result.schema_arrow.equals(source.schema_arrow, check_metadata=True)
            assert result.schema.equals(source.schema)
    size = sum(len(png(number)) for number in (1, 3, 5, 7, 9, 11, 14))
    assert filled == Filled(samples=7, others=0, bytes=size, emptied=())
    assert sum(counts) == 7
    assert snapshot(root) == before
    assert not hidden(target)


def test_a_file_in_which_nothing_is_left_is_omitted_and_reported(root: Path, tmp_path: Path) -> None:
    filled = copy(tables.open_tables(str(root)), tmp_path / "clean", lambda key: key.startswith("test"))
    assert filled.emptied == ("data/train-0.parquet", "data/train-1.parquet")
    assert list(files_below(tmp_path / "clean")) == ["test.parquet"]


def test_a_single_file_is_copied_into_the_folder(root: Path, tmp_path: Path) -> None:
    copy(tables.open_tables(str(root / "test.parquet")), tmp_path / "clean", odd)
    assert list(files_below(tmp_path / "clean")) == ["test.parquet"]


def test_the_copy_is_a_dataset_of_the_same_kind(root: Path, tmp_path: Path) -> None:
    dataset = tables.open_tables(str(root))
    copy(dataset, tmp_path / "clean", odd)
    before, after = (described(each) for each in (dataset, tables.open_tables(str(tmp_path / "clean"))))
    assert tables.recognises(str(tmp_path / "clean"))
    kept = [row for row, key in enumerate(before["key"].to_pylist()) if odd(key)]
    assert after["content_hash"].to_pylist() == before["content_hash"].take(kept).to_pylist()
    assert after["class_name"].to_pylist() == before["class_name"].take(kept).to_pylist()


def test_hugging_face_datasets_reads_the_copy(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    load_dataset = pytest.importorskip("datasets").load_dataset
    copy(tables.open_tables(str(root)), tmp_path / "clean", odd)
    files = {"train": [str(tmp_path / f"clean/data/train-{number}.parquet") for number in range(2)]}
    loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["label"].names == ["cat", "dog"]
    assert loaded["label"] == [1, 1, 1, 1, 1, 1]
    assert [image.getpixel((0, 0)) for image in loaded["image"]] == [(value, 0, 7) for value in (1, 3, 5, 7, 9, 11)]


@settings(max_examples=25)
@given(
    wanted=st.sets(st.integers(0, 29), min_size=1),
    group=st.integers(1, 30),
    codec=st.sampled_from(["none", "snappy", "zstd", "gzip"]),
    plain=st.booleans(),
)
def test_any_rows_of_any_layout(wanted: set[int], group: int, codec: str, plain: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        table = rows(0, 30)
        if plain:
            table = table.set_column(0, "image", pa.array([png(row) for row in range(30)], pa.large_binary()))
        path = write(Path(place) / "data.parquet", table, group, compression=codec)
        target = Path(place) / "clean"
        copy(Dataset(str(path), "parquet", "data", (str(path),)), target, lambda key: int(key[-8:]) in wanted)
        source, result = (pq.ParquetFile(each) for each in (path, target / "data.parquet"))
        with source, result:
            assert result.read().equals(source.read().take(sorted(wanted)))
            about = result.metadata.row_group(0).column(0)
            assert about.compression == source.metadata.row_group(0).column(0).compression
            most = max(source.metadata.row_group(each).num_rows for each in range(source.num_row_groups))
            assert all(result.metadata.row_group(each).num_rows <= most for each in range(result.num_row_groups))


def test_rows_that_are_not_among_the_samples_are_left_out(root: Path, tmp_path: Path) -> None:
    """A run may have been limited to some samples."""
    dataset = tables.open_tables(str(root))
    samples = described(dataset).slice(2, 3)
    (tmp_path / "clean").mkdir()
    filled = fill(samples, np.array([True, False, True]), dataset.files, tmp_path / "clean", lambda _: None)
    assert (filled.samples, filled.unscanned) == (2, 7)
    result = pq.read_table(tmp_path / "clean/data/train-0.parquet")
    assert [row["path"] for row in result["image"].to_pylist()] == ["2.png", "4.png"]


def test_an_image_that_has_changed_is_named(root: Path, tmp_path: Path) -> None:
    dataset = tables.open_tables(str(root))
    samples = described(dataset)
    write(root / "data/train-1.parquet", rows(20, 3))
    (tmp_path / "clean").mkdir()
    with pytest.raises(InputError, match=r"data/train-1\.parquet/00000001 has changed since the scan"):
        fill(
            samples, np.array([odd(key) for key in samples["key"].to_pylist()]), (), tmp_path / "clean", lambda _: None
        )
    assert list(files_below(tmp_path / "clean")) == ["data/train-0.parquet"]


@pytest.mark.parametrize("change", ["shorter", "gone", "damaged", "no images"])
def test_a_file_that_cannot_be_copied_any_more(root: Path, tmp_path: Path, change: str) -> None:
    dataset = tables.open_tables(str(root))
    samples = described(dataset)
    path = root / "data/train-0.parquet"
    if change == "shorter":
        write(path, rows(0, 9))
    elif change == "gone":
        path.unlink()
    elif change == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        write(path, pa.table({"words": ["a"] * 10}))
    (tmp_path / "clean").mkdir()
    with pytest.raises(InputError, match=r"data/train-0\.parquet"):
        fill(samples, np.ones(15, np.bool_), dataset.files, tmp_path / "clean", lambda _: None)
    assert not files_below(tmp_path / "clean")


def test_damaged_row_groups_are_not_touched(root: Path, tmp_path: Path) -> None:
    """What indexing found to be damaged has a problem, is never wanted, and does not keep the rest from it."""
    path = write(root / "data/train-0.parquet", rows(0, 10), 5, write_page_checksum=True, compression="none")
    content = path.read_bytes()
    path.write_bytes(content.replace(png(7), png(8), 1))
    filled = copy(tables.open_tables(str(root)), tmp_path / "clean", lambda _: True)
    assert filled.samples == 10
    assert pq.read_metadata(tmp_path / "clean/data/train-0.parquet").num_rows == 5


def test_a_disk_that_is_full(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "clean"
    target.mkdir()
    (target / "data").mkdir()
    (target / "data/train-0.parquet").mkdir()  # cannot be replaced by a file
    dataset = tables.open_tables(str(root))
    with pytest.raises(OutputError, match="cannot write"):
        fill(described(dataset), np.ones(15, np.bool_), dataset.files, target, lambda _: None)
    assert not hidden(target / "data")


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB of images in one row group, copied in row groups of 8 MB."""
    monkeypatch.setattr(rewriting, "_GROUP", 8 << 20)
    monkeypatch.setattr(tables, "_BATCH", 2 << 20)
    image, count = os.urandom(1 << 18), 256
    # In small pages: Arrow reads whole ones.
    path = write(
        tmp_path / "data.parquet", pa.table({"image": [image] * count}), count, use_dictionary=False, write_batch_size=4
    )
    assert pq.read_metadata(path).num_row_groups == 1
    dataset = tables.open_tables(str(path))
    found = list(tables.samples(dataset))
    samples = pa.table(
        {
            "key": [sample.key for sample in found],
            "url": [sample.url for sample in found],
            "offset": range(count),
            "size": [len(image)] * count,
            "content_hash": [hashlib.sha256(image).hexdigest()] * count,
            "access": ["parquet"] * count,
        }
    )
    before, peak = pa.total_allocated_bytes(), 0

    def look(_: int) -> None:
        nonlocal peak
        peak = max(peak, pa.total_allocated_bytes() - before)

    (tmp_path / "clean").mkdir()
    fill(samples, np.ones(count, np.bool_), dataset.files, tmp_path / "clean", look)
    assert 0 < peak < 32 << 20
    about = pq.read_metadata(tmp_path / "clean/data.parquet")
    assert about.num_rows == count
    assert all(about.row_group(each).num_rows <= 32 for each in range(about.num_row_groups))


# --- lists ---

TREE = {"cat/1.png": b"one", "cat/2.png": b"two!", "dog/3.png": b"three", "dog/4.png": b"four"}


def listed(root: Path, name: str, named: Mapping[str, str]) -> Path:
    path = root / name
    table = [{"path": key, "label": label, "note": f'{label},\n"{key}"'} for key, label in named.items()]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(table).replace_schema_metadata({"ours": "kept"}), path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["note", "path", "label"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(table)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl", "train.parquet"])
def test_the_wanted_rows_and_the_files_that_they_name(tmp_path: Path, name: str) -> None:
    root = write_tree(tmp_path / "pets", {**TREE, "other.png": b"not in the list"})
    path = listed(root, name, {key: key[:3] for key in TREE})
    before = snapshot(root)
    counts: list[int] = []
    target = tmp_path / "clean"
    filled = copy(lists.open_list(str(path)), target, lambda key: key != "cat/2.png", counts.append)
    kept = {key: content for key, content in TREE.items() if key != "cat/2.png"}
    assert {key: content for key, content in files_below(target).items() if key != name} == kept
    assert read(target / name) == [row for row in read(path) if row["path"] in kept]
    size = 0 if name.endswith(".parquet") else (target / name).stat().st_size
    assert filled == Filled(samples=3, others=1, bytes=size + sum(map(len, kept.values())))
    assert sum(counts) == 3
    assert (target / "dog/3.png").stat().st_mtime == (root / "dog/3.png").stat().st_mtime
    assert snapshot(root) == before
    assert lists.open_list(str(target / name)).name == "train"
    if name.endswith(".parquet"):
        assert pq.read_schema(target / name).equals(pq.read_schema(path), check_metadata=True)


def test_lines_are_copied_byte_for_byte(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "pets", TREE)
    lines = [
        b"\xef\xbb\xbfnote,path\r\n",
        b'"a\nb",cat/1.png\n',
        b"\n",
        b"x,cat/2.png\r\n",
        b"caf\xe9,./dog//3.png,more\r\n",
        b'"""",dog/4.png',
    ]
    (root / "a.csv").write_bytes(b"".join(lines))
    copy(lists.open_list(str(root / "a.csv")), tmp_path / "clean", lambda key: key != "cat/2.png")
    assert (tmp_path / "clean/a.csv").read_bytes() == b"".join([*lines[:2], *lines[4:]])
    assert sorted(files_below(tmp_path / "clean")) == ["a.csv", "cat/1.png", "dog/3.png", "dog/4.png"]


@settings(max_examples=40)
@given(
    notes=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=8),
    dropped=st.sets(st.integers(0, 7)),
    ending=st.sampled_from(["csv", "tsv", "jsonl"]),
)
def test_any_text_in_any_row_is_kept(notes: list[str], dropped: set[int], ending: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = write_tree(Path(place) / "pets", {f"{row}.png": b"x" for row in range(len(notes))})
        path = listed(root, f"a.{ending}", {f"{row}.png": note for row, note in enumerate(notes)})
        dataset = lists.open_list(str(path))
        copy(dataset, Path(place) / "clean", lambda key: int(key[:-4]) not in dropped)
        target = Path(place) / f"clean/a.{ending}"
        expected = [row for at, row in enumerate(read(path)) if at not in dropped]
        assert (read(target) if target.exists() else []) == expected


def test_a_file_that_two_rows_name_is_there_if_one_of_them_is_wanted(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "pets", TREE)
    path = root / "a.csv"
    path.write_text("path,label\ncat/1.png,a\ncat/1.png,b\ncat/1.png,c\ncat/2.png,a\n")
    counts: list[int] = []
    filled = copy(lists.open_list(str(path)), tmp_path / "clean", lambda key: "#" in key, counts.append)
    assert (tmp_path / "clean/a.csv").read_text() == "path,label\ncat/1.png,b\ncat/1.png,c\n"
    assert sorted(files_below(tmp_path / "clean")) == ["a.csv", "cat/1.png"]
    assert (filled.samples, sum(counts)) == (2, 2)


def test_absolute_paths_and_urls_stay_as_they_are(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "pets", TREE)
    (tmp_path / "outside.png").write_bytes(b"outside")
    url = f"memory://{uuid4().hex}/far.png"
    locate(url).write_bytes(b"far")
    names = [str(tmp_path / "outside.png"), str(root / "cat/1.png"), url, "cat/2.png"]
    path = root / "a.csv"
    path.write_text("path\n" + "".join(f"{name}\n" for name in names))
    filled = copy(lists.open_list(str(path)), tmp_path / "clean", lambda _: True)
    assert files_below(tmp_path / "clean") == {"a.csv": path.read_bytes(), "cat/2.png": b"two!"}
    assert filled.samples == 4


def test_rows_of_a_list_that_came_after_the_scan_are_left_out(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "pets", TREE)
    names = list(TREE)
    dataset = lists.open_list(str(listed(root, "a.csv", dict.fromkeys(names[:2], "x"))))
    samples = described(dataset)
    listed(root, "a.csv", dict.fromkeys([names[2], *names[:2]], "x"))
    (tmp_path / "clean").mkdir()
    filled = fill(samples, np.array([True, False]), dataset.files, tmp_path / "clean", lambda _: None)
    assert (filled.samples, filled.unscanned) == (1, 1)
    assert sorted(files_below(tmp_path / "clean")) == ["a.csv", names[0]]


def test_a_list_in_which_nothing_is_left(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "pets", TREE)
    path = listed(root, "a.csv", {"cat/1.png": "cat"})
    assert copy(lists.open_list(str(path)), tmp_path / "clean", lambda _: False) == Filled(0, 0, 0, ("a.csv",))
    assert not files_below(tmp_path / "clean")


@pytest.mark.parametrize("change", ["bytes", "size", "gone", "row"])
def test_what_has_changed_since_the_scan_is_named(tmp_path: Path, change: str) -> None:
    root = write_tree(tmp_path / "pets", TREE)
    path = listed(root, "a.csv", dict.fromkeys(TREE, "x"))
    dataset = lists.open_list(str(path))
    samples = described(dataset)
    if change == "row":
        listed(root, "a.csv", dict.fromkeys(list(TREE)[:3], "x"))
    elif change == "gone":
        (root / "dog/3.png").unlink()
    else:
        (root / "dog/3.png").write_bytes(b"other" if change == "bytes" else b"th")
    (tmp_path / "clean").mkdir()
    with pytest.raises(InputError, match="1 of its rows are gone" if change == "row" else r"dog/3\.png"):
        fill(samples, np.ones(4, np.bool_), dataset.files, tmp_path / "clean", lambda _: None)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\\.png")
    root = write_tree(tmp_path / "pets", {name: b"coffee"})
    (root / "a.csv").write_bytes(b"path\n" + os.fsencode(name) + b"\n")
    copy(lists.open_list(str(root / "a.csv")), tmp_path / "clean", lambda _: True)
    assert (tmp_path / "clean" / name).read_bytes() == b"coffee"
    assert (tmp_path / "clean/a.csv").read_bytes() == (root / "a.csv").read_bytes()
    write(tmp_path / "tables" / os.fsdecode(b"\xff.parquet"), rows(0, 3))
    copy(tables.open_tables(str(tmp_path / "tables")), tmp_path / "copy", odd)
    assert list(files_below(tmp_path / "copy")) == [to_text(b"\xff.parquet")]


# --- remote storage ---


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else f"memory://{uuid4().hex}"


def upload(local: Path, place: str) -> None:
    for name, content in files_below(local).items():
        locate(f"{place}/{name}").write_bytes(content)


def download(place: str) -> dict[str, bytes]:
    root = locate(place)
    base = root.path.strip("/") + "/"
    return {name.strip("/").removeprefix(base): root.fs.cat_file(name) for name in root.fs.find(root.path)}


def test_from_remote_to_remote_is_what_it_is_locally(root: Path, tmp_path: Path, remote: str) -> None:
    upload(root, f"{remote}/pets")
    copy(tables.open_tables(str(root)), tmp_path / "clean", odd)
    copy(tables.open_tables(f"{remote}/pets"), locate(f"{remote}/clean"), odd)
    copy(tables.open_tables(f"{remote}/pets"), tmp_path / "fetched", odd)
    assert download(f"{remote}/clean") == files_below(tmp_path / "clean") == files_below(tmp_path / "fetched")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_remote_lists(tmp_path: Path, remote: str, name: str) -> None:
    root = write_tree(tmp_path / "pets", TREE)
    listed(root, name, dict.fromkeys(TREE, "x"))
    upload(root, f"{remote}/pets")

    def wanted(key: str) -> bool:
        return key != "cat/2.png"

    copy(lists.open_list(str(root / name)), tmp_path / "clean", wanted)
    copy(lists.open_list(f"{remote}/pets/{name}"), locate(f"{remote}/clean"), wanted)
    assert download(f"{remote}/clean") == files_below(tmp_path / "clean")


def test_a_remote_copy_that_fails_shows_no_half_file(root: Path, tmp_path: Path, s3: str) -> None:
    upload(root, f"{s3}/pets")
    dataset = tables.open_tables(f"{s3}/pets")
    samples = described(dataset)
    write(root / "data/train-0.parquet", rows(1, 10))
    upload(root, f"{s3}/pets")
    with pytest.raises(InputError, match="has changed"):
        fill(samples, np.ones(15, np.bool_), dataset.files, locate(f"{s3}/clean"), lambda _: None)
    assert download(f"{s3}/clean") == {}
