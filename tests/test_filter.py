"""What `cdclean filter` says of the samples that are not in the copy, and where it can keep its decisions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdclean.errors import OutputError
from cdclean.selection import check_place
from tests.runs import FILES, NORMS, write_run, write_tree
from tests.test_cli import cdclean
from tests.test_imagefolder_refused import as_nobody, public

__all__ = ["public"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a run of a dataset: four samples with a score, two without, and an image that is not read."""
    data = write_tree(tmp_path / "data", FILES | {"cat/a.jpg": b"", "cat/b.jpg": b"", "photo.heic": b""})
    write_run(tmp_path / "data.cdclean", NORMS, dataset=data, unreadable={"cat/a.jpg": "empty", "cat/b.jpg": "empty"})
    return tmp_path


def test_every_sample_is_accounted_for(place: Path) -> None:
    command = ["filter", "--quantile", 0.25, "--overwrite"]
    done = cdclean(*command, cwd=place)
    assert "1 of 6 samples dropped" in done.stderr
    assert "2 samples have no score and are left out too (--unreadable keep copies them)" in done.stderr
    kept = cdclean(*command, "--unreadable", "keep", "--json", cwd=place)
    assert "2 samples have no score, and are kept" in kept.stderr
    assert (
        "1 files look like images that cdclean does not read, and are in the copy unscored: photo.heic" in kept.stderr
    )
    assert json.loads(kept.stdout)["unread"] == 1
    (place / "keep.txt").write_text("cat/a.jpg\n")
    some = cdclean(*command, "--keep", "keep.txt", "--dry-run", cwd=place)
    assert "2 samples have no score; 1 of them would be kept, the others would be left out too" in some.stderr


def test_why_an_image_is_not_in_the_run(place: Path) -> None:
    write_tree(place / "data", {"cat/new.jpg": b"new"})
    command = ["filter", "--quantile", 0.25, "--dry-run"]
    later = cdclean(*command, cwd=place)
    assert (
        "1 images of the dataset are not in the run and would be left out: they came after the scan, or" in later.stderr
    )
    description = place / "data.cdclean" / "run.json"
    content = json.loads(description.read_text())
    content["config"]["dataset"] = {"location": "data", "include": ["cat/*", "dog/*"], "exclude": [], "limit": 6}
    description.write_text(json.dumps(content))
    asked = cdclean(*command, cwd=place)
    said = "1 images of the dataset are not in the run (which took include cat/* dog/*, limit 6), and not in the copy"
    assert said in asked.stderr
    assert "after the scan" not in asked.stderr


def test_a_format_without_a_list_is_refused(place: Path) -> None:
    done = cdclean("filter", "--quantile", 0.25, "--format", "parquet", cwd=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--mode list --format parquet" in done.stderr
    listed = cdclean("filter", "--quantile", 0.25, "--mode", "list", cwd=place)
    assert listed.stdout == "data-clean.csv\n"


def test_a_run_folder_that_cannot_be_written_to_is_found_out_first(place: Path, public: Path) -> None:
    run = write_run(public / "data.cdclean", NORMS)
    with as_nobody(), pytest.raises(OutputError, match=r"run folder .* Permission denied"):
        check_place(run)
    check_place(run)
    assert {path.name for path in run.iterdir()} == {
        "_SUCCESS",
        "manifest.parquet",
        "records",
        "run.json",
        "summary.json",
    }
