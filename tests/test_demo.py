"""The embedded default: its data are what they say, and the whole of it finds most of what was planted."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdclean.demo import PATCH, POISON_RATE, SIZE, TARGET, add_patch, make_dataset, run
from cdclean.errors import UsageError
from cdclean.evaluation import evaluate
from cdclean.verdict import judge


def test_the_dataset_is_what_its_truth_says(tmp_path: Path) -> None:
    planted = make_dataset(tmp_path / "digits")
    files = {str(path.relative_to(tmp_path / "digits")): path for path in (tmp_path / "digits").rglob("*.png")}
    with (tmp_path / "truth.csv").open(newline="") as file:
        truth = {row["key"]: row["is_backdoor"] == "1" for row in csv.DictReader(file)}
    assert truth.keys() == files.keys()
    assert len(files) == 1797
    assert sorted(key for key, value in truth.items() if value) == planted
    assert len(planted) == round(POISON_RATE * 1797)
    assert {key.split("/")[0] for key in files} == set("0123456789")
    for key in planted:
        with Image.open(files[key]) as image:
            pixels = np.asarray(image)
        assert key.startswith(f"{TARGET}/")
        assert pixels.shape == (SIZE, SIZE, 3)
        assert (add_patch(pixels) == pixels).all()
    clean = [path for key, path in files.items() if not truth[key]]
    for path in clean[::50]:
        with Image.open(path) as image:
            pixels = np.asarray(image)
        assert (add_patch(pixels) != pixels).any()
        changed = (add_patch(pixels) != pixels).any(2)
        assert changed.sum() <= PATCH**2


def test_the_same_seed_gives_the_same_dataset(tmp_path: Path) -> None:
    first, second = make_dataset(tmp_path / "one" / "digits"), make_dataset(tmp_path / "two" / "digits")
    assert first == second
    for key in first:
        assert (tmp_path / "one/digits" / key).read_bytes() == (tmp_path / "two/digits" / key).read_bytes()
    assert make_dataset(tmp_path / "three" / "digits", seed=1) != first


def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="something else"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_most_of_what_was_planted_is_found_and_removed(tmp_path: Path) -> None:
    result = run(tmp_path / "demo")
    assert (result.images, result.planted, result.dropped) == (1797, 90, 89)
    assert result.auroc == evaluate(result.run, tmp_path / "demo" / "truth.csv").auroc
    assert result.auroc > 0.95
    assert judge(result.run).outcome == "backdoor"
    assert result.found > 45
    assert sum(1 for _ in result.clean_copy.rglob("*.png")) == 1797 - 89
    assert run(tmp_path / "demo") == result  # nothing is done twice
