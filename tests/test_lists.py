"""Lists of paths and labels: a row a sample, whatever it names; nothing is read that the list does not say plainly."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdclean.datasets import lists
from cdclean.datasets.listed import header, rows
from cdclean.datasets.sample import Dataset, Sample
from cdclean.errors import DatasetError
from cdclean.storage import locate, read_range, to_text
from tests.runs import write_tree

TREE = {"cat/1.png": b"one", "cat/2.png": b"two!", "dog/3.png": b"three", "deep/er/4.png": b""}
ROWS = [("cat/1.png", "cat"), ("dog/3.png", "dog"), ("cat/2.png", None), ("deep/er/4.png", "dog")]


def write(path: Path, named: Sequence[tuple[str | None, ...]], columns: Sequence[str] = ("path", "label")) -> Path:
    """A list in the format that its ending tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [dict(zip(columns, row, strict=True)) for row in named]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(table), path, row_group_size=max(3, len(named) // 5))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(table)
    return path


def index(path: object) -> list[Sample]:
    return list(lists.samples(lists.open_list(str(path))))


def samples(path: Path) -> list[Sample]:
    """As `index`, also where no image can be read."""
    return list(lists.samples(Dataset(str(path), "list", "list", (str(path),))))


def problems(path: Path) -> dict[str, str | None]:
    return {sample.key: sample.problem for sample in samples(path)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "images", TREE)


# --- good lists ---


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl", "train.parquet", "TRAIN.CSV"])
def test_every_row_is_a_sample(root: Path, name: str) -> None:
    path = write(root / name, ROWS) if name != "TRAIN.CSV" else write(root / "t.csv", ROWS).rename(root / name)
    assert lists.recognises(str(path))
    dataset = lists.open_list(str(path))
    assert (dataset.kind, dataset.location, dataset.files) == ("list", str(path), (str(path),))
    assert dataset.name == name.split(".")[0]
    assert lists.classes(dataset) is None  # type: ignore[func-returns-value]
    found = list(lists.samples(dataset))
    assert [(sample.key, sample.class_name) for sample in found] == ROWS
    assert [sample.url for sample in found] == [str(root / key) for key, _ in ROWS]
    assert [sample.size for sample in found] == [len(TREE[key]) for key, _ in ROWS]
    assert {(sample.offset, sample.problem, sample.access) for sample in found} == {(0, None, "range")}
    assert found[0].modified == (root / "cat/1.png").stat().st_mtime


@pytest.mark.parametrize("name", ["path", "File", "filename", "file_name", "image", "url", "key", " file_path "])
def test_the_column_of_paths(root: Path, name: str) -> None:
    for ending in ("csv", "jsonl", "parquet"):
        path = write(root / f"a.{ending}", [("0", "cat/1.png", "x")], ["id", name, "Class"])
        assert [(sample.key, sample.class_name) for sample in index(path)] == [("cat/1.png", "x")]


def test_of_several_columns_the_first_that_is_documented_counts(root: Path) -> None:
    columns = ["key", "url", "label", "class_name", "path"]
    path = write(root / "a.csv", [("k", "u", "0", "cat", "cat/1.png")], columns)
    assert [(sample.key, sample.class_name) for sample in index(path)] == [("cat/1.png", "cat")]


def test_labels_are_optional(root: Path) -> None:
    for ending in ("csv", "jsonl", "parquet"):
        assert index(write(root / f"a.{ending}", [("cat/1.png",)], ["path"]))[0].class_name is None


def test_labels_that_are_not_utf8(root: Path) -> None:
    (root / "a.csv").write_bytes(b"path,label\ncat/1.png,caf\xe9\ncat/2.png,\xc3\xa9\n")
    assert [sample.class_name for sample in index(root / "a.csv")] == ["caf\\xe9", "é"]
    (root / "a.jsonl").write_bytes(b'{"path": "cat/1.png", "label": "\\ud800"}')
    assert [sample.class_name for sample in index(root / "a.jsonl")] == ["\\xed\\xa0\\x80"]


def test_labels_of_every_type(root: Path) -> None:
    labels = [3, "3", True, None, 2.0, 2.5, "", ["a"], {"a": 1}]
    path = root / "a.jsonl"
    path.write_text("".join(json.dumps({"path": "cat/1.png", "label": label}) + "\n" for label in labels))
    assert [sample.class_name for sample in index(path)] == ["3", "3", "true", None, "2", "2.5", None, None, None]
    path.write_text('{"path": "cat/1.png"}\n{"label": "b", "path": "cat/2.png"}\n')
    assert [sample.class_name for sample in index(path)] == [None, "b"]


def test_a_hugging_face_metadata_file(root: Path) -> None:
    path = root / "metadata.csv"
    path.write_text('file_name,text\ncat/1.png,"a cat, and\na ""dog"""\ndog/3.png,x\n')
    assert [sample.key for sample in index(path)] == ["cat/1.png", "dog/3.png"]


def test_blank_lines_marks_and_windows_line_ends(root: Path) -> None:
    path = root / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfpath,label\r\n\r\ncat/1.png,a\r\n\r\ncat/2.png,b")
    assert [(sample.key, sample.class_name) for sample in index(path)] == [("cat/1.png", "a"), ("cat/2.png", "b")]
    path = root / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"path": "cat/1.png"}\r\n\r\n{"path": "cat/2.png"}')
    assert [sample.key for sample in index(path)] == ["cat/1.png", "cat/2.png"]


def test_names_that_are_not_utf8(root: Path) -> None:
    name = os.fsdecode(b"caf\xe9\\.png")
    (root / name).write_bytes(b"coffee")
    for ending, content in (("csv", b"path\ncaf\xe9\\.png\n"), ("jsonl", b'{"path": "caf\xe9\\\\.png"}\n')):
        (root / f"a.{ending}").write_bytes(content)
        (sample,) = index(root / f"a.{ending}")
        assert (sample.key, sample.url, sample.size) == ("caf\\xe9\\\\.png", to_text(root / name), 6)
        assert read_range(sample.url, sample.offset, sample.size) == b"coffee"


def test_a_list_that_is_a_link_is_relative_to_where_it_is_seen(root: Path, tmp_path: Path) -> None:
    (root / "a.csv").symlink_to(write(tmp_path / "elsewhere/b.csv", ROWS))
    assert {sample.problem for sample in index(root / "a.csv")} == {None}


# --- keys ---


def test_keys_are_paths_as_written_and_unique(root: Path) -> None:
    written = ["cat/1.png", "./cat//1.png", "cat/2.png", "dog/../cat/1.png", "cat/1.png#2", "cat/2.png"]
    path = write(root / "a.csv", [(name, None) for name in written])
    assert [sample.key for sample in samples(path)] == [
        "cat/1.png",
        "cat/1.png#2",
        "cat/2.png",
        "cat/1.png#3",
        "cat/1.png#2#2",
        "cat/2.png#2",
    ]
    assert [sample.url for sample in samples(path)][1] == str(root / "cat/1.png")


NAMES = st.sampled_from(
    ["a", "a#2", "a#3", "./a", "b", "b#2", "a#2#2", "../a", "", "c/../a", "list#1", "/a", "http://a"]
)


@settings(max_examples=100)
@given(st.lists(NAMES, max_size=60), st.integers(1, 20))
def test_keys_are_unique_whatever_the_rows_are(names: list[str], at_once: int) -> None:
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr("cdclean.datasets.listed._AT_ONCE", at_once)
        path = write(Path(place) / "list.jsonl", [(name, None) for name in names])
        found = list(rows(path))
        assert len(found) == len(names) == len({row.key for row in found})
        patch.undo()
        assert [row.key for row in rows(path)] == [row.key for row in found]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=8)


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=10), st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
def test_any_text_is_a_path_and_a_label(named: list[tuple[str, str]], ending: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = write(Path(place) / f"list.{ending}", named)
        found = list(rows(path))
        assert [row.label for row in found] == [label for _, label in named]
        if ending != "parquet":
            assert header(path) + b"".join(row.raw for row in found) == path.read_bytes()
        good = [(row.path, name) for row, (name, _) in zip(found, named, strict=True) if row.problem is None]
        assert all(os.path.normpath(name).lstrip("/") == cleaned.lstrip("/") or "://" in name for cleaned, name in good)


@settings(max_examples=150)
@given(st.binary(max_size=120), st.sampled_from(["csv", "tsv", "jsonl"]))
def test_any_bytes_are_a_list(content: bytes, ending: str) -> None:
    """Every line is in some row, in its place, or is blank; nothing but DatasetError is raised."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"list.{ending}"
        path.write_bytes((b"path\n" if ending != "jsonl" else b"") + content)
        found = list(rows(path))
        raw = header(path) + b"".join(row.raw for row in found)
        assert raw.split() == path.read_bytes().split()
        assert len({row.key for row in found}) == len(found)
        for sample in samples(path):
            pa.array([sample.key, sample.url, sample.class_name, sample.problem]).validate(full=True)


# --- what must not be opened ---


def test_paths_out_of_the_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "away").symlink_to(tmp_path)
    (root / "within").symlink_to(root / "cat")
    (root / "in.png").symlink_to(root / "cat/1.png")
    (root / "nowhere.png").symlink_to(root / "missing.png")
    names = ["../secret.png", "cat/../../secret.png", "..", ".", "out.png", "away/secret.png", "nowhere.png"]
    good = ["within/1.png", "in.png", "cat/../dog/3.png"]
    found = problems(write(root / "a.csv", [(name, None) for name in names + good]))
    assert [key for key, problem in found.items() if problem is None] == ["within/1.png", "in.png", "dog/3.png"]
    assert list(found)[: len(names)] == names
    for name in names[:3]:
        assert "leads out of the folder" in str(found[name])
    for name in ("out.png", "away/secret.png"):
        assert "by a link" in str(found[name])


def test_what_is_no_file(root: Path) -> None:
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    path = write(root / "a.csv", [(name, None) for name in ["pipe.png", "folder.png", "missing.png", "a.csv"]])
    assert problems(path) == {
        "pipe.png": "a named pipe, not a file",
        "folder.png": "a folder, not a file",
        "missing.png": "cannot be examined: no such file or directory",
        "a.csv": "the list itself",
    }


def test_absolute_paths_are_read_where_they_lead(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"outside")
    names = [str(outside), f"/{outside}", str(root / "cat/1.png"), f"file://{outside}", "/dev/zero"]
    found = samples(write(root / "a.csv", [(name, None) for name in names]))
    assert [sample.key for sample in found] == [
        str(outside),
        f"{outside}#2",
        str(root / "cat/1.png"),
        f"file://{outside}",
        "/dev/zero",
    ]
    assert [sample.size for sample in found] == [7, 7, 3, 7, 0]
    assert [sample.problem for sample in found] == [None, None, None, None, "a device, not a file"]
    assert read_range(found[3].url, 0, 7) == b"outside"


def test_rows_that_name_nothing_are_rows_too(root: Path) -> None:
    path = root / "a.jsonl"
    lines = [
        '{"path": "cat/1.png"}',
        "nonsense",
        "[1]",
        "{}",
        '{"path": 3}',
        '{"path": "\\ud800"}',
        '{"path": "a\\u0000"}',
    ]
    path.write_text("\n".join([*lines, "[" * 100_000, '{"path": "cat/2.png"}']))
    found = problems(path)
    assert list(found) == [
        "cat/1.png",
        *(f"a.jsonl#{row}" for row in range(2, 6)),
        "\\xed\\xa0\\x80",
        "a\0",
        "a.jsonl#8",
        "cat/2.png",
    ]
    assert [problem is None for problem in found.values()] == [True] + [False] * 7 + [True]


def test_rows_of_a_csv_that_are_too_short_or_make_no_sense(root: Path) -> None:
    path = root / "a.csv"
    path.write_bytes(b"id,path\n1\n2,cat/1.png,more\n3,\n4,a\rb\n5,cat/2.png\n")
    found = problems(path)
    assert list(found) == ["a.csv#1", "cat/1.png", "a.csv#3", "a.csv#4", "cat/2.png"]
    assert found["a.csv#4"] == "the row is no CSV that makes sense"
    path.write_bytes(b'id,path\n1,cat/1.png\n2,"' + b"x" * 200_000)
    assert list(problems(path)) == ["cat/1.png", "a.csv#2"]


def test_nulls_in_parquet(root: Path) -> None:
    table = {"path": ["cat/1.png", None, "cat/2.png"], "label": [None, 1, 2]}
    pq.write_table(pa.table(table), root / "a.parquet", row_group_size=1)
    found = index(root / "a.parquet")
    assert [(sample.key, sample.class_name) for sample in found] == [
        ("cat/1.png", None),
        ("a.parquet#2", "1"),
        ("cat/2.png", "2"),
    ]
    assert [sample.problem for sample in found] == [None, "the row names no file", None]


def test_urls_that_are_no_storage(root: Path) -> None:
    path = write(root / "a.csv", [(name, None) for name in ["pipe://cat", "s3://a::b", "nothing://a", "cat/1.png"]])
    found = problems(path)
    assert [problem is None for problem in found.values()] == [False, False, False, True]
    assert "not a place" in str(found["pipe://cat"])


# --- what is no list ---


def test_what_is_recognised(root: Path) -> None:
    assert not lists.recognises(str(root))
    assert not lists.recognises(str(root / "cat/1.png"))
    assert not lists.recognises(str(root / "missing.csv"))
    pq.write_table(pa.table({"image": pa.array([b"a"])}), root / "images.parquet")
    assert not lists.recognises(str(root / "images.parquet"))
    (root / "text.parquet").write_text("no table")
    assert not lists.recognises(str(root / "text.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "no column of paths; its columns are: none"),
        ("a.csv", b"cat/1.png,cat\n", "its columns are: cat/1.png, cat"),
        ("a.csv", b"path\n", "it has no rows"),
        ("a.csv", b"path\nmissing.png\n", "missing.png: cannot be examined: no such file"),
        ("a.jsonl", b'{"name": "a"}\n', "its columns are: name"),
        ("a.jsonl", b"x" * (1 << 24) + b"y", "a line is longer than"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_what_is_no_list_says_why(root: Path, name: str, content: bytes, message: str) -> None:
    (root / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        lists.open_list(str(root / name))


def test_a_list_that_is_missing_or_damaged(root: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        lists.open_list(str(root / "missing.csv"))
    path = write(root / "a.parquet", ROWS * 100)
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes(100) + content[140:])
    with pytest.raises(DatasetError, match=r"a\.parquet cannot be read"):
        samples(path)


# --- large and remote ---


@pytest.mark.parametrize(("ending", "count"), [("csv", 100_000), ("jsonl", 30_000), ("parquet", 30_000)])
def test_many_rows(root: Path, ending: str, count: int) -> None:
    path = write(root / f"a.{ending}", [(f"cat/{row // 2}.png", str(row % 10)) for row in range(count)])
    found = list(rows(path))
    assert len({row.key for row in found}) == count
    assert sum(row.key.endswith("#2") for row in found) == count // 2


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else f"memory://{uuid4().hex}"


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_remote_list(tmp_path: Path, remote: str, ending: str) -> None:
    for name, content in TREE.items():
        locate(f"{remote}/{name}").write_bytes(content)
    outside = tmp_path / "local.png"
    outside.write_bytes(b"local")
    names = [
        *ROWS,
        ("missing.png", "x"),
        ("cat", "x"),
        (f"{remote}/cat/1.png", "x"),
        (str(outside), "x"),
        ("../a", "x"),
    ]
    path = f"{remote}/train.{ending}"
    locate(path).write_bytes(write(tmp_path / f"a.{ending}", names).read_bytes())
    assert lists.recognises(path)
    dataset = lists.open_list(path)
    assert (dataset.name, dataset.location) == ("train", path)
    found = list(lists.samples(dataset))
    assert [(sample.key, sample.class_name) for sample in found] == names
    good = [sample for sample in found if sample.problem is None]
    assert [sample.key for sample in good] == [*TREE_ORDER, f"{remote}/cat/1.png"]
    assert good[0].modified is not None
    assert [read_range(sample.url, 0, sample.size) for sample in good[:4]] == [TREE[name] for name in TREE_ORDER]
    by_key = {sample.key: sample.problem for sample in found}
    assert by_key["cat"] == "a folder, not a file"
    assert by_key[str(outside)] == "a file of this machine, in a list that is remote"


TREE_ORDER = [name for name, _ in ROWS]


def test_a_local_list_of_urls(root: Path, remote: str) -> None:
    locate(f"{remote}/far.png").write_bytes(b"far away")
    path = write(root / "a.csv", [("cat/1.png", None), (f"{remote}/far.png", None), (f"{remote}/gone.png", None)])
    near, far, gone = index(path)
    assert (near.problem, far.problem, far.size) == (None, None, 8)
    assert (far.key, far.url) == (f"{remote}/far.png", f"{remote}/far.png")
    assert str(gone.problem).startswith("cannot be examined")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_a_list_on_a_web_server(root: Path) -> None:
    write(root / "a.csv", [*ROWS[:2], ("gone.png", None)])
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            found = index(f"{base}/a.csv")
        finally:
            server.shutdown()
    assert [sample.url for sample in found] == [f"{base}/{name}" for name in ("cat/1.png", "dog/3.png", "gone.png")]
    assert [sample.size for sample in found] == [3, 5, 0]
    assert [sample.problem is None for sample in found] == [True, True, False]


def test_lines_are_kept_as_they_stand(root: Path) -> None:
    content = b'path,text\r\ncat/1.png,"two\nlines"\r\n"cat/2.png",""""\n'
    (root / "a.csv").write_bytes(content)
    assert header(root / "a.csv") == b"path,text\r\n"
    assert [row.raw for row in rows(root / "a.csv")] == [b'cat/1.png,"two\nlines"\r\n', b'"cat/2.png",""""\n']
    assert io.BytesIO(content).read() == content
