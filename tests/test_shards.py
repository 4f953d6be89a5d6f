"""What a user types for the shards of a WebDataset, and the tars that it means, in their order."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from cdclean.datasets.webdataset import open_webdataset, recognises, shards
from cdclean.errors import DatasetError, UsageError
from tests.tars import shard, tar, write


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names(root: Path, pattern: str) -> list[str]:
    return [os.path.relpath(str(shard), root) for shard in shards(f"{root}/{pattern}")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("x-{000..002}.tar", ["x-000.tar", "x-001.tar", "x-002.tar"]),
        ("x-{002..000}.tar", ["x-002.tar", "x-001.tar", "x-000.tar"]),
        ("{b,a}/{0..1}.tar", ["b/0.tar", "b/1.tar", "a/0.tar", "a/1.tar"]),
        ("{a/{1,0},b/0}.tar", ["a/1.tar", "a/0.tar", "b/0.tar"]),
        ("{b,a}/*.tar", ["b/0.tar", "b/1.tar", "a/0.tar", "a/1.tar"]),
        ("x-00[02].tar", ["x-000.tar", "x-002.tar"]),
        ("x-00?.*", ["x-000.tar", "x-001.tar", "x-002.tar"]),
        ("**/0.tar", ["a/0.tar", "b/0.tar"]),
        ("x-{9..10}.tgz", ["x-9.tgz", "x-10.tgz"]),
        ("x-{a}.tar", ["x-{a}.tar"]),
        ("x-{1,2}.tar", ["x-{1,2}.tar"]),
        ("x-000.tar", ["x-000.tar"]),
        ("a", ["a/0.tar", "a/1.tar"]),
        (
            "",
            ["x-000.tar", "x-001.tar", "x-002.tar", "x-10.tgz", "x-9.tgz", "x-{1,2}.tar", "x-{a}.tar"],
        ),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    touch(tmp_path, *(f"x-00{number}.tar" for number in range(3)), "x-9.tgz", "x-10.tgz", "x-{a}.tar", "x-{1,2}.tar")
    touch(tmp_path, "a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar", "x-000.txt", ".hidden.tar", "a/.x.tar", "notes.md")
    assert names(tmp_path, pattern) == expected


def test_every_ending_in_any_case(tmp_path: Path) -> None:
    expected = ["0.TAR", "1.tar.gz", "2.tgz", "3.tar.zst", "4.tar.bz2"]
    touch(tmp_path, *expected, "5.zip", "6.gz", "tar")
    assert names(tmp_path, "") == expected


def test_missing_shards_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "s/0.tar", "s/2.tar")
    with pytest.raises(DatasetError, match=r"2 of the 4 shards .* are missing: .*s/1.tar, .*s/3.tar\n") as caught:
        shards(f"{tmp_path}/s/{{0..3}}.tar")
    assert caught.value.hint
    with pytest.raises(DatasetError, match=r"98 of the 100 .*\.\.\."):
        shards(f"{tmp_path}/s/{{0..99}}.tar")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none.tar", "does not exist"),
        ("none", "does not exist"),
        ("empty", "holds no tar"),
        ("*.tar", "no tar matches"),
        ("a.zip", "does not have the name of a tar"),
        ("{a,a}.zip", "does not have the name of a tar"),
        ("{0..99999999999}.tar", "more than 100000 shards"),
    ],
)
def test_what_is_not_there(tmp_path: Path, pattern: str, message: str) -> None:
    touch(tmp_path, "a.zip", "empty/x.txt")
    with pytest.raises(DatasetError, match=message) as caught:
        shards(f"{tmp_path}/{pattern}")
    assert caught.value.hint


def test_nothing_is_run_and_nothing_chained() -> None:
    for text in ("pipe://cat x.tar", "zip://*.tar::s3://x/y.zip"):
        with pytest.raises(UsageError):
            shards(text)


def test_names_that_are_not_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    write(folder / os.fsdecode(b"\xfe-0.tar"), shard(range(2)))
    for location in (f"{folder}", f"{folder}/*.tar"):
        assert open_webdataset([location]).files == (f"{tmp_path}/\\xff/\\xfe-0.tar",)


def test_a_shard_may_be_a_link_and_its_name_stays(tmp_path: Path) -> None:
    write(tmp_path / "blobs/abc", shard(range(2)))
    (tmp_path / "real").mkdir()
    (tmp_path / "real/0.tar").symlink_to("../blobs/abc")
    (tmp_path / "linked").symlink_to("real")
    dataset = open_webdataset([f"{tmp_path}/linked"])
    assert (dataset.location, dataset.name) == (f"{tmp_path}/real", "linked")
    assert dataset.files == (f"{tmp_path}/real/0.tar",)


@pytest.mark.parametrize(
    ("locations", "name", "folder"),
    [
        (["s"], "s", "s"),
        (["s/"], "s", "s"),
        (["s/train-{0..1}.tar"], "train", "s"),
        (["s/{train-0,train-1}.tar"], "s", "s"),
        (["s/train-*.tar"], "train", "s"),
        (["s/train-0.tar"], "train-0", "s"),
        (["s/z.tar.gz"], "z", "s"),
        (["s/train-0.tar", "t/0.tar"], "root", ""),
        (["s/../s/."], "s", "s"),
        (["{s,t}/*0.tar"], "root", ""),
    ],
)
def test_names_and_places(tmp_path: Path, locations: list[str], name: str, folder: str) -> None:
    root = tmp_path / "root"
    for shard_name in ("s/train-0.tar", "s/train-1.tar", "t/0.tar"):
        write(root / shard_name, shard(range(2)))
    if "z" in locations[0]:
        (root / "s/z.tar.gz").write_bytes(gzip.compress(tar(shard(range(2)))))
    dataset = open_webdataset([f"{root}/{location}" for location in locations])
    assert (dataset.name, dataset.location) == (name, f"{root}/{folder}".rstrip("/"))
    assert dataset.root == Path(dataset.location)


def test_a_shard_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", shard(range(2)))
    assert len(open_webdataset([str(tmp_path), f"{tmp_path}/*.tar", f"{tmp_path}/0.tar"]).files) == 1


def test_what_is_recognised(tmp_path: Path) -> None:
    touch(tmp_path, "tars/0.tar", "tars/index.json", "tars/logs/x.txt", "tars/.git/x.png")
    touch(tmp_path, "classes/cat/1.png", "classes/0.tar", "mixed/0.tar", "mixed/1.png", "folder.tar/1.png", "list.csv")
    yes = ["tars", "tars/0.tar", "none.tar", "tars/{0..9}.tar", "x/{a,b}.tar.zst", "tars/*.tgz", "x.{tar,tgz}"]
    no = ["classes", "mixed", "folder.tar", "list.csv", "none", "classes/cat", "x/{a,b}", "tars/*"]
    assert [text for text in yes + no if recognises(f"{tmp_path}/{text}")] == yes
    assert recognises("s3://bucket/{000..123}.tar")
    assert recognises("https://host.invalid/0.tar?signature=a/b")
    assert not recognises("https://host.invalid/list.csv")


@pytest.fixture
def memory() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for number in range(3):
        system.pipe(f"/shards/s/x-{number}.tar", tar(shard(range(2), f"{number}/")))
    system.pipe("/shards/s/notes.txt", b"")
    system.pipe("/shards/t/0.tar", tar(shard(range(2), "t/")))
    yield "memory://shards"
    system.rm("/shards", recursive=True)


@pytest.mark.parametrize("pattern", ["s", "s/", "s/x-{0..2}.tar", "s/*.tar", "s/x-[012].tar"])
def test_remote_patterns(memory: str, pattern: str) -> None:
    location = f"{memory}/{pattern}"
    assert [str(shard) for shard in shards(location)] == [f"{memory}/s/x-{number}.tar" for number in range(3)]
    assert recognises(location)
    dataset = open_webdataset([location])
    assert dataset.location == f"{memory}/s"
    assert dataset.root.is_dir()


def test_remote_names(memory: str, tmp_path: Path) -> None:
    assert open_webdataset([f"{memory}/s/x-1.tar"]).name == "x-1"
    assert open_webdataset([f"{memory}/{{s/x-0,t/0}}.tar"]).location == memory
    with pytest.raises(DatasetError, match=r"1 of the 2 shards .* missing: memory://shards/s/x-3.tar"):
        shards(f"{memory}/s/x-{{2..3}}.tar")
    for missing in ("none", "none/0.tar", "s/*.tgz"):
        with pytest.raises(DatasetError):
            shards(f"{memory}/{missing}")
    local = write(tmp_path / "0.tar", shard(range(1)))
    with pytest.raises(DatasetError, match="different places"):
        open_webdataset([f"{memory}/s", str(local)])
