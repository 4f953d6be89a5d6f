"""Where a page may be written: not into the dataset, and over nothing but an earlier page."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cdclean import report
from cdclean.errors import OutputError, UsageError
from cdclean.storage import locate
from tests.runs import FILES, NORMS, snapshot, write_run, write_tree


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
