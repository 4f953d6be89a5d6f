"""ImageFolder with links, pipes and locked folders in it: each is a row, and none is opened; and what is no dataset."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cdclean.datasets import classes, open_dataset, walk
from cdclean.errors import DatasetError, UsageError
from tests.test_imagefolder import make, rows


def problem(root: Path, key: str) -> str:
    text = rows(root)[key].problem
    assert text is not None
    return text


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run as a user for whom permissions count; root passes them all."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """An empty folder that every user can reach, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for parent, inside, _ in os.walk(folder):
        for name in inside:
            Path(parent, name).chmod(0o755)
    shutil.rmtree(folder)


# --- what must not be opened ---


def test_links(tmp_path: Path) -> None:
    outside = make(tmp_path / "outside", "secret.png", "folder/1.png")
    root = make(tmp_path / "root", "cat/1.png", "dog/2.png")
    links = {
        "inside.png": "1.png",
        "across.png": "../dog/2.png",
        "chain.png": "across.png",
        "out.png": outside / "secret.png",
        "dangling.png": "nowhere.png",
        "self.png": "self.png",
        "ping.png": "pong.png",
        "pong.png": "ping.png",
        "up": "..",
        "folder": outside / "folder",
        "folder.png": "../dog",
        "null.png": "/dev/null",
        "text.txt": outside / "secret.png",
    }
    for name, target in links.items():
        (root / "cat" / name).symlink_to(target)
    found = rows(root)
    usable = {key for key, sample in found.items() if sample.problem is None}
    assert usable == {"cat/1.png", "cat/inside.png", "cat/across.png", "cat/chain.png", "dog/2.png"}
    assert found["cat/chain.png"].size == len("dog/2.png")
    assert {sample.class_name for key, sample in found.items() if key.startswith("cat/")} == {"cat"}
    said = {key: sample.problem for key, sample in found.items() if sample.problem is not None}
    assert "out of the dataset" in said.pop("cat/out.png")
    assert "out of the dataset" in said.pop("cat/null.png")
    assert "no such file" in said.pop("cat/dangling.png")
    for key in ("cat/self.png", "cat/ping.png", "cat/pong.png"):
        assert "too many levels" in said.pop(key)
    for key in ("cat/up/", "cat/folder/", "cat/folder.png/"):
        assert "link to a folder" in said.pop(key)
    assert not said


def test_a_neighbour_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    make(tmp_path, "data/1.png", "data-private/2.png")
    (tmp_path / "data/link.png").symlink_to("../data-private/2.png")
    assert "out of the dataset" in problem(tmp_path / "data", "link.png")


def test_a_link_to_a_folder_keeps_its_place_among_the_classes(tmp_path: Path) -> None:
    make(tmp_path, "root/a/1.png", "root/c/1.png", "elsewhere/1.png")
    (tmp_path / "root/b").symlink_to("../elsewhere")
    assert classes(open_dataset(str(tmp_path / "root"))) == ["a", "b", "c"]
    assert rows(tmp_path / "root")["b/"].class_name == "b"


def test_pipes_sockets_and_devices_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "c/1.png")
    monkeypatch.chdir(tmp_path / "c")  # a socket's address is short
    os.mkfifo("pipe.png")
    os.mkfifo("pipe")
    Path("link.png").symlink_to("pipe.png")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("socket.png")
        assert "named pipe" in problem(tmp_path, "c/pipe.png")
        assert "named pipe" in problem(tmp_path, "c/link.png")
        assert "socket" in problem(tmp_path, "c/socket.png")
        assert "c/pipe" not in rows(tmp_path)
        kinds = {entry.relative: entry.kind for entry in walk(tmp_path)}
    assert kinds["c/pipe"] == kinds["c/pipe.png"] == kinds["c/socket.png"] == "special"


def test_a_folder_that_cannot_be_listed_is_a_row(public: Path) -> None:
    make(public, "cat/1.png", "dog/2.png", "cat/deep/3.png", ".secret/4.png")
    for name in ("dog", "cat/deep", ".secret"):
        (public / name).chmod(0)
    with as_nobody():
        found = rows(public)
        names = classes(open_dataset(str(public)))
    assert list(found) == [".secret/", "cat/1.png", "cat/deep/", "dog/"]
    for key in (".secret/", "cat/deep/", "dog/"):
        assert "permission denied" in (found[key].problem or "")
        assert found[key].class_name == key.split("/")[0]
    assert names == [".secret", "cat", "dog"]


def test_a_folder_that_can_be_listed_but_not_entered(public: Path) -> None:
    make(public, "cat/1.png", "dog/2.png", "dog/deep/3.png")
    (public / "dog").chmod(0o444)
    with as_nobody():
        found = rows(public)
    assert list(found) == ["cat/1.png", "dog/2.png", "dog/deep/"]
    assert all("permission denied" in (found[key].problem or "") for key in ("dog/2.png", "dog/deep/"))


def test_a_dataset_that_cannot_be_listed(public: Path) -> None:
    make(public, "data/1.png")
    (public / "data").chmod(0)
    with as_nobody():
        with pytest.raises(DatasetError, match="permission denied"):
            open_dataset(str(public / "data"))
        with pytest.raises(DatasetError, match="permission denied"):
            next(walk(public / "data"))
        with pytest.raises(DatasetError, match="permission denied"):
            open_dataset(str(public / "data/1.png"))


def test_a_tree_deeper_than_a_path_can_be_long(tmp_path: Path) -> None:
    make(tmp_path, "c/1.png")
    name = "d" * 250
    handle = os.open(tmp_path / "c", os.O_RDONLY)
    for _ in range(20):
        os.mkdir(name, dir_fd=handle)
        below = os.open(name, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = below
    os.close(os.open("lost.png", os.O_CREAT | os.O_WRONLY, dir_fd=handle))
    os.close(handle)
    try:
        found = rows(tmp_path)
        assert found["c/1.png"].problem is None
        (deep,) = (sample for key, sample in found.items() if key != "c/1.png")
        assert "too long" in (deep.problem or "")
    finally:
        shutil.rmtree(tmp_path / "c")


# --- errors ---


def refusal(location: Path | str) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        open_dataset(str(location))
    assert str(location) in caught.value.message
    assert caught.value.hint
    return caught.value


def test_a_missing_folder_and_its_near_names(tmp_path: Path) -> None:
    make(tmp_path, "dataset/1.png", "other/1.png")
    assert "dataset?" in refusal(tmp_path / "datset").hint
    assert "does not exist" in refusal(tmp_path / "datset").message
    assert str(Path.cwd()) in refusal(tmp_path / "xyz/abc").hint


def test_files_pipes_and_dangling_links_are_no_datasets(tmp_path: Path) -> None:
    make(tmp_path, "cat.png", "data.zip")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert "is a file" in refusal(tmp_path / "cat.png").message
    assert "is a file" in refusal(tmp_path / "data.zip").message
    assert "named pipe" in refusal(tmp_path / "pipe").message
    assert "leads nowhere" in refusal(tmp_path / "gone").message
    assert "too many levels" in refusal(tmp_path / "loop").message
    assert "not a directory" in refusal(tmp_path / "cat.png/inside").message


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path).message


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    make(tmp_path, "a/1.TXT", "a/2.txt", "b/table.csv", "Makefile")
    error = refusal(tmp_path)
    for part in ("2 .txt", "1 .csv", "1 without extension", "2 folders"):
        assert part in error.message
    assert ".jpeg" in error.hint
    make(tmp_path, "train.zip")
    assert "Unpack" in refusal(tmp_path).hint


def test_a_folder_of_empty_folders(tmp_path: Path) -> None:
    make(tmp_path, "cat/", "dog/")
    assert "2 folders" in refusal(tmp_path).message


def test_a_folder_of_links_alone_says_that_they_are_not_followed(tmp_path: Path) -> None:
    make(tmp_path, "elsewhere/1.png", "elsewhere/2.png", "root/")
    for name in ("a", "b"):
        (tmp_path / "root" / name).symlink_to("../elsewhere")
    (tmp_path / "root/1.png").symlink_to("../elsewhere/1.png")
    error = refusal(tmp_path / "root")
    assert "2 x a link to a folder" in error.message
    assert "1 x a link out of the dataset" in error.message
    assert "Copy" in error.hint


def test_a_run_folder_is_not_a_dataset(tmp_path: Path) -> None:
    make(tmp_path, "run.json", "manifest.parquet", "x.png")
    assert "run folder" in refusal(tmp_path).message


def test_places_that_are_no_storage() -> None:
    for url in ("ssh://host/data", "pipe://cat", "simplecache::s3://bucket/data"):
        with pytest.raises(UsageError, match="not a place"):
            open_dataset(url)
    with pytest.raises(UsageError, match="gs:// needs"):
        open_dataset("gs://bucket/data")
