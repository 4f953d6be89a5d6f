"""Places in a report: where the page may be written, and which dataset its commands name."""

from __future__ import annotations

import bz2
import json
import os
import shlex
from pathlib import Path

import pytest

from cdclean import report
from cdclean.datasets import open_dataset
from cdclean.errors import OutputError, UsageError
from cdclean.report import commands
from cdclean.storage import locate
from tests.runs import FILES, NORMS, snapshot, write_run, write_tree
from tests.tars import png, tar


@pytest.fixture
def run(tmp_path: Path) -> Path:
    data = write_tree(tmp_path / "data", FILES)
    return write_run(tmp_path / "data.cdclean", NORMS, dataset=data)


@pytest.mark.parametrize("place", ["cat/1.jpg", "cat/new.html", "LICENSE", "new/page.html"])
def test_a_page_never_goes_into_the_dataset(run: Path, place: str) -> None:
    data = run.with_name("data")
    link = run.with_name("link")
    link.symlink_to(data)
    before = snapshot(data)
    for root in (data, link):
        with pytest.raises(UsageError, match="which is never written to"):
            report.write(run, root / place)
    assert snapshot(data) == before


def test_shards_that_were_named_one_by_one_are_closed_and_their_folder_is_not(run: Path) -> None:
    folder = write_tree(run.with_name("many"), {"a-0.tar": b"", "other.tar": b""})
    content = json.loads((run / "run.json").read_text())
    content["dataset"] |= {"kind": "webdataset", "name": "a", "location": str(folder), "files": [f"{folder}/a-0.tar"]}
    (run / "run.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="dataset"):
        report.write(run, folder / "a-0.tar")
    assert report.write(run, folder / "page.html").exists()


def test_only_an_earlier_page_is_replaced(run: Path) -> None:
    page, table = run.with_name("page.html"), run.with_name("truth.csv")
    report.write(run, page)
    first = page.read_bytes()
    page.write_bytes(first + b"<!-- of another version -->")
    report.write(run, page)
    assert page.read_bytes() == first
    for data in (b"key,is_backdoor\n", b""):
        table.write_bytes(data)
        with pytest.raises(UsageError, match="is no report of cdclean"):
            report.write(run, table)
        assert table.read_bytes() == data
    with pytest.raises(UsageError, match="is no report of cdclean"):
        report.write(run, run / "manifest.parquet")


def test_the_same_on_remote_storage(run: Path) -> None:
    page = locate("memory://report-places/page.html")
    report.write(run, page)
    report.write(run, page)
    page.write_bytes(b"mine")
    with pytest.raises(UsageError, match="is no report of cdclean"):
        report.write(run, page)
    assert page.read_bytes() == b"mine"


def test_places_where_no_file_can_stand(run: Path) -> None:
    pipe = run.with_name("pipe")
    os.mkfifo(pipe)
    for place in (run, pipe):
        with pytest.raises(UsageError, match="a report is a file"):
            report.write(run, place)
    with pytest.raises(OutputError, match=r"there is no folder .*nodir") as caught:
        report.write(run, run.with_name("nodir") / "page.html")
    assert "finished work" not in caught.value.hint
    with pytest.raises(OutputError, match="Not a directory"):
        report.write(run, run / "run.json" / "page.html")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train-0.tar", "train-1.tar"], 1),
        ([f"train-{number:03}.tar.bz2" for number in range(9, 12)], 1),
        (["8.tar", "9.tar", "10.tar"], 1),
        (["08.tar", "09.tar"], 1),
        (["099.tar", "100.tar"], 1),
        (["98.tar", "99.tar", "100.tar"], 1),
        (["098.tar", "099.tar"], 1),
        (["09.tar", "10.tar", "12.tar"], 3),
        (["a 1.tar", "b.tar"], 2),
        (["it's {1}.tar", "it's {2}.tar"], 2),
        (["one.tar"], 1),
    ],
    ids=str,
)
def test_the_scan_command_names_the_shards_of_the_run_and_no_others(
    names: list[str], words: int, tmp_path: Path
) -> None:
    folder = tmp_path / "up 7" / "shards"
    folder.mkdir(parents=True)
    for number, name in enumerate([*names, "other.tar", "train-2.tar"]):
        data = tar([(f"{number}.png", png(number))])
        (folder / name).write_bytes(bz2.compress(data) if name.endswith(".bz2") else data)
    dataset = open_dataset(*(str(folder / name) for name in names))
    about = {"kind": "webdataset", "location": dataset.location, "name": dataset.name, "files": list(dataset.files)}
    line = commands.scan({"dataset": about, "model": {"source": "net.pt"}, "config": {}}, tmp_path / "x.cdclean")
    found = shlex.split(line.removeprefix("cdclean scan ").partition(" --model ")[0])
    assert len(found) == words
    assert open_dataset(*found).files == dataset.files
