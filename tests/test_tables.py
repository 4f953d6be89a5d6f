"""Parquet with images: a row a sample, whatever the columns are called and whatever is wrong with the file."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import EndpointConnectionError
from hypothesis import given, settings
from hypothesis import strategies as st

from cdclean.datasets import tables
from cdclean.datasets.columns import Labels, image_column, label_column
from cdclean.datasets.sample import Sample
from cdclean.errors import DatasetError, UsageError
from cdclean.storage import locate, to_text

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def huggingface(features: dict[str, Any]) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": features}})}


CIFAR = huggingface(
    {"img": {"_type": "Image"}, "label": {"names": ["plane", "car", "bird"], "_type": "ClassLabel"}},
)


def image_bytes(row: int) -> bytes:
    return random.Random(row).randbytes(20 + row % 7)


def structs(rows: Sequence[int]) -> pa.Array:
    return pa.array([{"bytes": image_bytes(row), "path": f"{row}.png"} for row in rows], IMAGE)


def write(path: Path, table: pa.Table, rows: int = 3, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pq.write_table(table, file, row_group_size=rows, **options)
    return path


def cifar(rows: Sequence[int]) -> pa.Table:
    labels = pa.array([row % 3 for row in rows])
    return pa.table({"img": structs(rows), "label": labels, "id": pa.array(rows)}).replace_schema_metadata(CIFAR)


def folder(root: Path) -> Path:
    write(root / "data/train-0.parquet", cifar(range(10)))
    write(root / "data/train-1.parquet", cifar(range(10, 14)))
    write(root / "extra.parquet", cifar(range(14, 15)))
    (root / "README.md").write_text("words")
    return root


def index(path: object) -> list[Sample]:
    return list(tables.samples(tables.open_tables(str(path))))


def read(samples: Sequence[Sample]) -> list[bytes]:
    outcomes = list(tables.read_rows(samples))
    assert not [outcome for outcome in outcomes if isinstance(outcome, OSError)]
    return [outcome for outcome in outcomes if isinstance(outcome, bytes)]


# --- a good dataset ---


def test_every_row_is_a_sample(tmp_path: Path) -> None:
    root = folder(tmp_path / "birds")
    assert tables.recognises(str(root))
    dataset = tables.open_tables(str(root))
    assert (dataset.kind, dataset.name, dataset.location) == ("parquet", "birds", str(root))
    files = [str(root / name) for name in ("data/train-0.parquet", "data/train-1.parquet", "extra.parquet")]
    assert list(dataset.files) == files
    assert tables.classes(dataset) == ["plane", "car", "bird"]
    found = list(tables.samples(dataset))
    assert [sample.key for sample in found][9:12] == [
        "data/train-0.parquet/00000009",
        "data/train-1.parquet/00000000",
        "data/train-1.parquet/00000001",
    ]
    assert [sample.offset for sample in found] == [*range(10), *range(4), 0]
    assert [sample.size for sample in found] == [len(image_bytes(row)) for row in range(15)]
    assert [sample.class_name for sample in found] == [["plane", "car", "bird"][row % 3] for row in range(15)]
    assert {(sample.access, sample.problem) for sample in found} == {("parquet", None)}
    assert [sample.url for sample in found] == [files[0]] * 10 + [files[1]] * 4 + [files[2]]
    assert found[0].modified == Path(files[0]).stat().st_mtime
    assert read(found[:10]) == [image_bytes(row) for row in range(10)]


def test_a_single_file(tmp_path: Path) -> None:
    path = write(tmp_path / "birds.parquet", cifar(range(4)))
    assert tables.recognises(str(path))
    dataset = tables.open_tables(str(path))
    assert (dataset.name, dataset.location, dataset.files) == ("birds", str(path), (str(path),))
    found = list(tables.samples(dataset))
    assert [sample.key for sample in found] == [f"birds.parquet/0000000{row}" for row in range(4)]
    assert read(found) == [image_bytes(row) for row in range(4)]
    assert index(folder(tmp_path / "other"))[0].key != found[0].key


def test_a_location_with_a_slash_or_a_link_is_the_same(tmp_path: Path) -> None:
    root = folder(tmp_path / "birds")
    (tmp_path / "link").symlink_to(root)
    assert index(f"{root}/") == index(root)
    linked = tables.open_tables(str(tmp_path / "link"))
    assert (linked.location, linked.name) == (str(root), "link")
    assert list(tables.samples(linked)) == index(root)


def test_a_file_that_is_a_link_keeps_its_name(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub, where names lead to blobs."""
    blob = write(tmp_path / "blobs/0123abc", cifar(range(4)))
    (tmp_path / "birds.parquet").symlink_to(blob)
    dataset = tables.open_tables(str(tmp_path / "birds.parquet"))
    assert (dataset.name, dataset.location) == ("birds", str(tmp_path / "birds.parquet"))
    found = list(tables.samples(dataset))
    assert found[0].key == "birds.parquet/00000000"
    assert read(found) == [image_bytes(row) for row in range(4)]


@pytest.mark.parametrize(
    "images",
    [
        structs(range(5)),
        pa.array([image_bytes(row) for row in range(5)], pa.binary()),
        pa.array([image_bytes(row) for row in range(5)], pa.large_binary()),
        pa.array([image_bytes(row) for row in range(5)], pa.binary_view()),
        pa.array([{"bytes": image_bytes(row)} for row in range(5)], pa.struct([("bytes", pa.large_binary())])),
    ],
    ids=["struct", "binary", "large", "view", "struct of large"],
)
def test_every_type_of_image_column(tmp_path: Path, images: pa.Array) -> None:
    path = write(tmp_path / "data.parquet", pa.table({"id": range(5), "Image": images}), rows=2)
    found = index(path)
    assert [sample.size for sample in found] == [len(image_bytes(row)) for row in range(5)]
    assert {sample.class_name for sample in found} == {None}
    assert read(found[1:4]) == [image_bytes(row) for row in range(1, 4)]


@settings(max_examples=40)
@given(
    rows=st.lists(st.tuples(st.none() | st.binary(max_size=40), st.booleans(), st.none() | st.text()), min_size=1),
    group=st.integers(1, 9),
    chosen=st.sets(st.integers(0, 99)),
)
def test_any_rows_keep_their_bytes_and_labels(
    rows: list[tuple[bytes | None, bool, str | None]], group: int, chosen: set[int]
) -> None:
    images = [{"bytes": data, "path": "a.png"} if there else None for data, there, _ in rows]
    labels = pa.array([label for _, _, label in rows], pa.string())
    table = pa.table({"image": pa.array(images, IMAGE), "label": labels})
    with tempfile.TemporaryDirectory() as place:
        path = write(Path(place) / "data.parquet", table, group)
        dataset = tables.Dataset(str(path), "parquet", "data")
        found = list(tables.samples(dataset))
        assert len({sample.key for sample in found}) == len(found) == len(rows)
        assert [sample.class_name for sample in found] == [label or None for _, _, label in rows]
        for sample, (data, there, _) in zip(found, rows, strict=True):
            good = there and data is not None
            assert (sample.problem is None) == good
            assert sample.size == (len(data) if good and data is not None else 0)
        asked = [sample for row, sample in enumerate(found) if row in chosen]
        outcomes = list(tables.read_rows(asked)) if asked else []
        assert len(outcomes) == len(asked)
        for sample, outcome in zip(asked, outcomes, strict=True):
            data, there, _ = rows[sample.offset]
            assert isinstance(outcome, OSError) if not there or data is None else outcome == data


def test_what_a_row_without_bytes_is_told(tmp_path: Path) -> None:
    images = pa.array([{"bytes": b"a", "path": None}, {"bytes": None, "path": "/etc/passwd"}, None], IMAGE)
    good, elsewhere, empty = index(write(tmp_path / "data.parquet", pa.table({"image": images})))
    assert good.problem is None
    assert elsewhere.problem is not None
    assert "path" in elsewhere.problem
    assert empty.problem == "the row holds no image"


# --- which column is which ---


def schema(columns: dict[str, pa.DataType], features: dict[str, Any] | None = None) -> pa.Schema:
    return pa.schema(columns, huggingface(features) if features is not None else None)


AN_IMAGE, A_CLASS = {"_type": "Image"}, {"_type": "ClassLabel", "names": ["a", "b"]}


@pytest.mark.parametrize(
    ("columns", "features", "expected"),
    [
        ({"pixels": IMAGE, "image": pa.binary()}, {"pixels": AN_IMAGE}, "pixels"),
        ({"image": IMAGE, "mask": IMAGE}, {"image": AN_IMAGE, "mask": AN_IMAGE}, "image"),
        ({"image": IMAGE, "mask": IMAGE}, None, "image"),
        ({"image": pa.string(), "img": pa.binary()}, None, "img"),
        ({"audio": IMAGE}, None, None),
        ({"image": pa.int64()}, {"image": AN_IMAGE}, None),
        ({"image": pa.list_(IMAGE)}, None, None),
        ({"PNG": pa.binary()}, {}, "PNG"),
    ],
)
def test_the_column_of_images(columns: Any, features: Any, expected: str | None) -> None:
    assert image_column(schema(columns, features)) == expected


@pytest.mark.parametrize(
    ("columns", "features"),
    [
        ({"image": IMAGE, "img": pa.binary()}, None),
        ({"before": IMAGE, "after": IMAGE}, {"before": AN_IMAGE, "after": AN_IMAGE}),
    ],
)
def test_two_columns_of_images(tmp_path: Path, columns: Any, features: Any) -> None:
    both = schema(columns, features)
    with pytest.raises(DatasetError, match=", ".join(columns)):
        image_column(both)
    path = write(tmp_path / "data.parquet", both.empty_table())
    assert tables.recognises(str(path))
    with pytest.raises(DatasetError, match=", ".join(columns)):
        tables.open_tables(str(path))


@pytest.mark.parametrize("metadata", [b"", b"{", b"[]", b'{"info": {"features": {"image": 1}}}', b"[" * 100_000])
def test_metadata_that_makes_no_sense_is_no_metadata(metadata: bytes) -> None:
    assert image_column(pa.schema({"image": IMAGE}, {"huggingface": metadata})) == "image"
    assert label_column(pa.schema({"label": pa.int64()}, {"huggingface": metadata})) == Labels("label", None)


@pytest.mark.parametrize(
    ("columns", "features", "expected"),
    [
        ({"kind": pa.int64(), "label": pa.int64()}, {"kind": A_CLASS}, Labels("kind", ("a", "b"))),
        ({"kind": pa.int64(), "label": pa.int64()}, {"kind": A_CLASS, "label": A_CLASS}, Labels("label", ("a", "b"))),
        (
            {"coarse": pa.int64(), "fine": pa.int64()},
            {"coarse": A_CLASS, "fine": {"_type": "ClassLabel", "names": ["a", "b", "c"]}},
            Labels("fine", ("a", "b", "c")),
        ),
        ({"class": pa.string(), "cls": pa.int64()}, None, Labels("cls", None)),
        ({"label": pa.list_(pa.int64()), "target": pa.bool_()}, None, Labels("target", None)),
        ({"caption": pa.string()}, None, None),
    ],
)
def test_the_column_of_labels(columns: Any, features: Any, expected: Labels | None) -> None:
    assert label_column(schema(columns, features)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1, None, 10]), ["1", None, "10"]),
        (pa.array([1.0, float("nan"), 2.5]), ["1", None, "2.5"]),
        (pa.array(["a", "", None]), ["a", None, None]),
        (pa.array(["a", None, "b"]).dictionary_encode(), ["a", None, "b"]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array([b"a", b"\xff", b""]), ["a", "\\xff", None]),
    ],
)
def test_labels_of_every_type(tmp_path: Path, values: pa.Array, expected: list[str | None]) -> None:
    path = write(tmp_path / "data.parquet", pa.table({"image": structs(range(3)), "label": values}), rows=2)
    dataset = tables.open_tables(str(path))
    assert [sample.class_name for sample in tables.samples(dataset)] == expected
    assert tables.classes(dataset) is None


def test_labels_that_the_metadata_does_not_name(tmp_path: Path) -> None:
    table = pa.table({"img": structs(range(4)), "label": pa.array([0, -1, None, 7])}).replace_schema_metadata(CIFAR)
    found = index(write(tmp_path / "data.parquet", table))
    assert [sample.class_name for sample in found] == ["plane", None, None, "7"]


def test_files_that_name_the_classes_differently_have_no_common_list(tmp_path: Path) -> None:
    root = folder(tmp_path / "birds")
    other = {"img": {"_type": "Image"}, "label": {"names": ["x", "y"], "_type": "ClassLabel"}}
    write(root / "other.parquet", cifar(range(2)).replace_schema_metadata(huggingface(other)))
    dataset = tables.open_tables(str(root))
    assert tables.classes(dataset) is None
    assert [sample.class_name for sample in tables.samples(dataset)][-2:] == ["x", "y"]


# --- what is recognised ---


def test_what_is_no_parquet_with_images(tmp_path: Path) -> None:
    assert not tables.recognises(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    assert not tables.recognises(str(tmp_path / "empty"))
    paths = write(tmp_path / "paths.parquet", pa.table({"path": ["a.png"]}))
    assert not tables.recognises(str(paths))
    write(tmp_path / "lists/index.parquet", pa.table({"path": ["a.png"]}))
    assert not tables.recognises(str(tmp_path / "lists"))
    (folder(tmp_path / "pictures") / "a.png").touch()
    assert not tables.recognises(str(tmp_path / "pictures"))
    hidden = tmp_path / "hidden"
    write(hidden / ".cache/a.parquet", cifar(range(2)))
    write(hidden / "a.cdclean/a.parquet", cifar(range(2)))
    for name in ("run.json", "manifest.parquet"):
        (hidden / "a.cdclean" / name).touch()
    assert not tables.recognises(str(hidden))
    with pytest.raises(DatasetError, match="no row in any Parquet file"):
        tables.open_tables(str(hidden))
    with pytest.raises(UsageError):
        tables.recognises("pipe://cat")


def test_many_images_before_the_first_table_are_a_folder_of_images(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write(root / "z/data.parquet", cifar(range(2)))
    (root / "assets").mkdir()
    (root / "assets/figure.png").touch()
    assert tables.recognises(str(root))
    for number in range(1000):
        (root / f"assets/{number}.png").touch()
    assert not tables.recognises(str(root))


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        tables.open_tables(str(tmp_path / "missing"))
    path = write(tmp_path / "plain.parquet", pa.table({"words": ["a"], "more": [1]}))
    with pytest.raises(DatasetError, match=r"plain\.parquet/: .*words, more"):
        tables.open_tables(str(path))
    (tmp_path / "text.parquet").write_text("no table")
    assert tables.recognises(str(tmp_path / "text.parquet"))
    with pytest.raises(DatasetError, match=r"text\.parquet/: the table cannot be read"):
        tables.open_tables(str(tmp_path / "text.parquet"))


# --- what is damaged, or leads elsewhere ---


def test_a_damaged_file_is_one_row_and_the_others_go_on(tmp_path: Path) -> None:
    root = folder(tmp_path / "birds")
    good = index(root)
    path = root / "data/train-0.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    damaged, *others = index(root)
    assert (damaged.key, damaged.size, damaged.class_name) == ("data/train-0.parquet/", 0, None)
    assert damaged.problem is not None
    assert others == good[10:]
    (outcome,) = tables.read_rows(good[:1])
    assert isinstance(outcome, OSError)


def test_a_damaged_row_group_is_a_problem_of_all_its_rows_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", cifar(range(9)), write_page_checksum=True, compression="none")
    good = index(path)
    content = bytearray(path.read_bytes())
    at = content.index(image_bytes(4))
    content[at] ^= 1
    os.utime(path, (1, 1))
    path.write_bytes(content)
    found = index(path)
    assert [sample.key for sample in found] == [sample.key for sample in good]
    assert [sample.problem is None for sample in found] == [True] * 3 + [False] * 3 + [True] * 3
    assert {sample.size for sample in found[3:6]} == {0}
    outcomes = list(tables.read_rows(good))
    assert [isinstance(outcome, OSError) for outcome in outcomes] == [False] * 3 + [True] * 3 + [False] * 3
    assert outcomes[6:] == [image_bytes(row) for row in range(6, 9)]


@settings(max_examples=150)
@given(data=st.data())
def test_no_damage_loses_a_row_or_raises(data: st.DataObject) -> None:
    """Any byte of the file changed: every row of every group that the footer tells of is there, or one for the file."""
    with tempfile.TemporaryDirectory() as place:
        path = write(Path(place) / "data.parquet", cifar(range(7)))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
        found = list(tables.samples(tables.Dataset(str(path), "parquet", "data")))
        assert found
        assert len({sample.key for sample in found}) == len(found)
        closed = [sample for sample in found if sample.key == "data.parquet/"]
        assert closed or len(found) == pq.read_metadata(path).num_rows
        asked = [sample for sample in found if sample.problem is None]
        outcomes = list(tables.read_rows(asked)) if asked else []
        assert [len(each) for each in outcomes if isinstance(each, bytes)] == [sample.size for sample in asked]


def test_a_file_that_promises_more_than_it_can_hold(tmp_path: Path) -> None:
    """A table of nulls is a few hundred bytes, however long it is."""
    table = pa.table({"image": pa.nulls(10_000_000, pa.binary())})
    path = write(tmp_path / "data.parquet", table, rows=10_000_000)
    (only,) = tables.samples(tables.Dataset(str(path), "parquet", "data"))
    assert only.problem is not None
    assert "10000000 rows" in only.problem


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = write(tmp_path / "secret.parquet", cifar(range(3)))
    root = folder(tmp_path / "birds")
    (root / "out.parquet").symlink_to(outside)
    (root / "in.parquet").symlink_to(root / "extra.parquet")
    (root / "away").symlink_to(tmp_path)
    found = {sample.key: sample.problem for sample in index(root) if "data/" not in sample.key}
    assert {key: problem is None for key, problem in found.items()} == {
        "away/": False,
        "extra.parquet/00000000": True,
        "in.parquet/00000000": True,
        "out.parquet/": False,
    }


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    root = tmp_path / "birds"
    path = write(root / os.fsdecode(b"a\xff\\.parquet"), cifar(range(2)))
    found = index(root)
    assert [sample.key for sample in found] == [f"a\\xff\\\\.parquet/0000000{row}" for row in range(2)]
    assert found[0].url == to_text(path)
    assert read(found) == [image_bytes(0), image_bytes(1)]


def test_rows_that_are_gone_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", cifar(range(9)))
    before = index(path)
    write(path, cifar(range(5)))
    outcomes = list(tables.read_rows(before[3:]))
    assert outcomes[:2] == [image_bytes(3), image_bytes(4)]
    assert [str(outcome) for outcome in outcomes[2:]] == ["the table has fewer rows than when it was indexed"] * 4
    path.unlink()
    assert [isinstance(outcome, OSError) for outcome in tables.read_rows(before[:2])] == [True, True]
    write(path, pa.table({"words": ["a"] * 9}))
    assert [isinstance(outcome, OSError) for outcome in tables.read_rows(before[:2])] == [True, True]


# --- large and remote ---


def test_only_the_row_groups_that_are_asked_for_are_read(tmp_path: Path) -> None:
    """Every row group but one is overwritten, so reading another one fails."""
    path = write(tmp_path / "data.parquet", cifar(range(30)), compression="none")
    found = index(path)
    content = bytearray(path.read_bytes())
    about = pq.read_metadata(path).row_group(4).column(0)
    first = about.dictionary_page_offset or about.data_page_offset
    last = first + about.total_compressed_size
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[4:first] = bytes(first - 4)
    content[last:footer] = bytes(footer - last)
    path.write_bytes(content)
    assert read(found[12:15]) == [image_bytes(row) for row in range(12, 15)]
    assert all(isinstance(outcome, OSError) for outcome in tables.read_rows(found[9:12]))


def test_memory_is_that_of_a_batch_not_of_a_row_group(tmp_path: Path) -> None:
    """128 MB of images in one row group, of which little is in memory at once."""
    image = os.urandom(1 << 20)
    path = tmp_path / "data.parquet"
    row = pa.table({"image": pa.array([image] * 32, pa.large_binary()), "label": ["a"] * 32})
    with pq.ParquetWriter(path, row.schema, compression="none", use_dictionary=False) as writer:
        writer.write_table(pa.concat_tables([row] * 4), row_group_size=128)
    assert pq.read_metadata(path).num_row_groups == 1
    before = pa.total_allocated_bytes()
    peak = 0
    for sample in tables.samples(tables.Dataset(str(path), "parquet", "data")):
        assert sample.size == 1 << 20
    found = index(path)
    for outcome in tables.read_rows(found[::40]):
        assert outcome == image
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 0 < peak < 64 << 20


def test_a_hundred_thousand_rows(tmp_path: Path) -> None:
    count = 100_000
    images = pa.array([b"x" * (row % 50) for row in range(count)], pa.binary())
    path = write(
        tmp_path / "data.parquet", pa.table({"image": images, "label": [row % 10 for row in range(count)]}), 10_000
    )
    found = index(path)
    assert len({sample.key for sample in found}) == count
    assert sum(sample.size for sample in found) == sum(row % 50 for row in range(count))
    assert read(found[99_990:]) == [b"x" * (row % 50) for row in range(99_990, count)]


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else f"memory://{uuid4().hex}"


def upload(local: Path, place: str) -> None:
    for path in local.rglob("*"):
        if path.is_file():
            locate(f"{place}/{path.relative_to(local)}").write_bytes(path.read_bytes())


def test_remote_storage_has_the_same_samples(tmp_path: Path, remote: str) -> None:
    root = folder(tmp_path / "birds")
    upload(root, f"{remote}/birds")
    assert tables.recognises(f"{remote}/birds")
    dataset = tables.open_tables(f"{remote}/birds")
    assert (dataset.name, dataset.location) == ("birds", f"{remote}/birds")
    assert dataset.files[0] == f"{remote}/birds/data/train-0.parquet"
    assert tables.classes(dataset) == ["plane", "car", "bird"]
    found, local = list(tables.samples(dataset)), index(root)
    names = ("key", "offset", "size", "class_name", "problem", "access")
    assert [[getattr(sample, name) for name in names] for sample in found] == [
        [getattr(sample, name) for name in names] for sample in local
    ]
    assert found[0].modified is not None
    assert read(found[2:9]) == [image_bytes(row) for row in range(2, 9)]
    single = tables.open_tables(f"{remote}/birds/extra.parquet")
    assert tables.recognises(single.location)
    (only,) = tables.samples(single)
    assert (only.key, only.url) == ("extra.parquet/00000000", f"{remote}/birds/extra.parquet")
    assert only.modified is not None
    assert read([only]) == [image_bytes(14)]


@pytest.mark.parametrize("during", ["open", "read"])
def test_storage_that_fails_is_no_damage(s3: str, during: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is gone raises, and is not noted as damage of the file for ever."""
    with tempfile.TemporaryDirectory() as place:
        upload(folder(Path(place)), f"{s3}/birds")
    dataset = tables.open_tables(f"{s3}/birds")
    found = tables.samples(dataset)
    if during == "read":
        assert next(found).problem is None
    files = type(dataset.root.fs.open(f"{s3}/birds/extra.parquet"))  # type: ignore[union-attr]

    def fail(*_: object) -> bytes:
        raise EndpointConnectionError(endpoint_url="http://nowhere")

    monkeypatch.setattr(files, "_fetch_range", fail)
    with pytest.raises(DatasetError, match="EndpointConnectionError"):
        list(found)
    with pytest.raises(DatasetError, match="EndpointConnectionError"):
        tables.classes(dataset)
