"""ImageFolder: a row for every image and for whatever images may hide behind, in an order that names alone decide."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets.folder import find_classes

from cdclean.datasets import (
    IMAGE_EXTENSIONS,
    Dataset,
    Sample,
    classes,
    open_dataset,
    samples,
    walk,
)
from cdclean.storage import from_text, read_range, to_text


def make(root: Path, *names: str) -> Path:
    """`root` with one small file a name; names that end in '/' are empty folders."""
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return root


def rows(root: Path) -> dict[str, Sample]:
    found = list(samples(open_dataset(str(root))))
    assert len({sample.key for sample in found}) == len(found)
    return {sample.key: sample for sample in found}


# --- samples, classes, order ---


def test_images_at_any_depth_belong_to_their_top_folder(tmp_path: Path) -> None:
    make(tmp_path, "dog/1.png", "cat/a/b/2.JPG", "cat/3.jpeg", "top.webp", "cat/notes.txt", "readme.md")
    found = rows(tmp_path)
    assert list(found) == ["cat/3.jpeg", "cat/a/b/2.JPG", "dog/1.png", "top.webp"]
    assert [sample.class_name for sample in found.values()] == ["cat", "cat", "dog", None]
    for key, sample in found.items():
        assert sample.url == f"{tmp_path.resolve()}/{key}"
        assert sample.problem is None
        assert read_range(sample.url, sample.offset, sample.size) == key.encode()


def test_a_flat_folder_is_a_dataset_without_classes(tmp_path: Path) -> None:
    make(tmp_path, "b.png", "a.png")
    dataset = open_dataset(str(tmp_path))
    assert [(sample.key, sample.class_name) for sample in samples(dataset)] == [("a.png", None), ("b.png", None)]
    assert classes(dataset) == []


def test_every_extension_in_any_case_is_an_image(tmp_path: Path) -> None:
    names = [f"c/x{extension}" for extension in IMAGE_EXTENSIONS]
    make(tmp_path, *names, *(name.upper() for name in names), "c/.png", "c/png", "c/x.png.txt", "c/x.svg")
    assert set(rows(tmp_path)) == {*names, *(name.upper() for name in names), "c/.png"}


def test_the_order_does_not_depend_on_how_files_came_to_be(tmp_path: Path) -> None:
    names = [f"{folder}/{name}.png" for folder in ("b", "B", "a b", "a", "a/z", "é") for name in ("10", "9", "_", "Z")]
    for number in range(3):
        random.Random(number).shuffle(names)
        make(tmp_path / str(number), *names)
    first, *others = [list(rows(tmp_path / str(number))) for number in range(3)]
    assert first == sorted(names, key=lambda name: [part.encode() for part in name.split("/")])
    assert others == [first, first]


def test_classes_are_torchvisions(tmp_path: Path) -> None:
    make(tmp_path, "b/1.png", "B/1.png", "a10/1.png", "a9/x/1.png", "é/1.png", "empty/", "file.txt", "top.png")
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    assert classes(open_dataset(str(tmp_path))) == find_classes(str(tmp_path))[0]


def test_hidden_folders_are_classes_only_with_images_in_them(tmp_path: Path) -> None:
    make(tmp_path, ".git/objects/ab", ".cache/", ".ipynb_checkpoints/x/1.png", "cat/1.png")
    assert classes(open_dataset(str(tmp_path))) == [".ipynb_checkpoints", "cat"]


def test_zero_bytes_are_a_sample_for_the_decoder_to_judge(tmp_path: Path) -> None:
    make(tmp_path, "c/1.png").joinpath("c/0.png").touch()
    assert rows(tmp_path)["c/0.png"].size == 0
    assert rows(tmp_path)["c/0.png"].problem is None


def test_a_run_folder_inside_the_dataset_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.png", "x.cdclean/run.json", "x.cdclean/manifest.parquet", "x.cdclean/show/1.png")
    make(tmp_path, "cat/deep.cdclean/run.json", "cat/deep.cdclean/manifest.parquet", "cat/deep.cdclean/2.png")
    make(tmp_path, "dog.cdclean/run.json", "dog.cdclean/1.png")
    dataset = open_dataset(str(tmp_path))
    assert list(rows(tmp_path)) == ["cat/1.png", "dog.cdclean/1.png"]
    assert classes(dataset) == ["cat", "dog.cdclean"]
    assert [entry.relative for entry in walk(tmp_path)] == [
        "cat",
        "cat/1.png",
        "dog.cdclean",
        "dog.cdclean/1.png",
        "dog.cdclean/run.json",
    ]


def test_walk_shows_everything_a_copy_needs(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.png", "cat/1.txt", "empty/", "labels.csv")
    (tmp_path / "cat/linked.png").symlink_to("1.png")
    (tmp_path / "cat/notes.md").symlink_to("../labels.csv")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    assert [(entry.relative, entry.kind, entry.size) for entry in walk(tmp_path)] == [
        ("cat", "folder", 0),
        ("cat/1.png", "image", len("cat/1.png")),
        ("cat/1.txt", "file", len("cat/1.txt")),
        ("cat/linked.png", "image", len("cat/1.png")),
        ("cat/notes.md", "file", len("labels.csv")),
        ("empty", "folder", 0),
        ("gone.txt", "link", 0),
        ("labels.csv", "file", len("labels.csv")),
    ]
    assert [entry.relative for entry in walk(tmp_path) if entry.problem] == ["gone.txt"]


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    make(tmp_path, *(f"{folder:02}/{name:03}.png" for folder in range(40) for name in range(100)))
    dataset = open_dataset(str(tmp_path))
    tracemalloc.start()
    try:
        count = sum(1 for _ in samples(dataset))
        peak = tracemalloc.get_traced_memory()[1]
        held = list(samples(dataset))
        whole = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == len(held) == 4000
    assert peak < whole / 10


def test_indexing_does_not_import_torch() -> None:
    program = "import sys, cdclean.datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[1]).returncode == 0


# --- names ---

ODD_NAMES = [
    "new\nline.png",
    "tab\t.png",
    "quo\"te'.png",
    "😀.png",
    "back\\slash.png",
    "\\xff.png",
    "%2e.png",
    "-rf.png",
]
ODD_NAMES += [" .png", os.fsdecode(b"\xff\xfe.png"), os.fsdecode(b"caf\xe9.png"), "<script>.png", "a=b;c&d.png"]


def test_odd_names_are_samples(tmp_path: Path) -> None:
    make(tmp_path, *(f"{name}.d/{name}" for name in ODD_NAMES))
    dataset = open_dataset(str(tmp_path))
    found = rows(tmp_path)
    assert {from_text(key) for key in found} == {f"{name}.d/{name}" for name in ODD_NAMES}
    assert classes(dataset) == [to_text(name) for name in sorted(os.fsencode(f"{name}.d") for name in ODD_NAMES)]
    for key, sample in found.items():
        assert read_range(sample.url, 0, sample.size) == os.fsencode(from_text(key))
        assert sample.class_name in classes(dataset)
        key.encode()  # text that any file format can hold


FILE_NAMES = st.binary(min_size=1, max_size=30).filter(lambda name: not {0, ord("/")} & set(name))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(FILE_NAMES, FILE_NAMES), min_size=1, max_size=8))
def test_keys_and_urls_lead_back_to_the_files(names: list[tuple[bytes, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = {b"/".join((top + b"_", name + b".png")) for top, name in names}
        for name in written:
            make(Path(folder), os.fsdecode(name))
        dataset = open_dataset(folder)
        found = list(samples(dataset))
        assert {os.fsencode(from_text(sample.key)) for sample in found} == written
        assert len(found) == len(written)
        known = classes(dataset)
        for sample in found:
            assert read_range(sample.url, sample.offset, sample.size) == os.fsencode(from_text(sample.key))
            assert sample.class_name in known
        keys = [os.fsencode(from_text(sample.key)).split(b"/") for sample in found]
        assert keys == sorted(keys)


@pytest.mark.parametrize("given", [".", "..", "sub/..", "{}", "{}/", "{}/sub/.."])
def test_name_and_location_do_not_depend_on_how_the_folder_was_given(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(tmp_path / "flowers", "sub/1.png")
    monkeypatch.chdir(root / "sub" if given == ".." else root)
    dataset = open_dataset(given.format(root))
    assert dataset == Dataset(str(root.resolve()), "imagefolder", "flowers")
    assert dataset.root == root.resolve()
    assert next(samples(dataset)).url == str(root.resolve() / "sub/1.png")


def test_a_dataset_given_as_a_link_keeps_its_name(tmp_path: Path) -> None:
    make(tmp_path / "v3", "cat/1.png")
    (tmp_path / "flowers").symlink_to("v3")
    dataset = open_dataset(str(tmp_path / "flowers"))
    assert (dataset.name, dataset.root) == ("flowers", (tmp_path / "v3").resolve())


def test_a_dataset_may_have_an_odd_name(tmp_path: Path) -> None:
    root = make(tmp_path / os.fsdecode(b"d\xe9\n"), "1.png")
    dataset = open_dataset(str(root))
    assert dataset.name == "d\\xe9\n"
    assert dataset.root == root.resolve()
