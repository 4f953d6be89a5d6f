"""Bias on real faces: a drawn shortcut comes out first; a square that means nothing does not. Needs ../shared."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.benchmarks.faces import FACES, MAGENTA, SIZE, SQUARE, WOMEN, measure, write_faces

FEW = 20  # faces of every gender and race, where nothing is trained

pytestmark = pytest.mark.skipif(not FACES.exists(), reason="needs ../shared")


def read(attributes: Path) -> list[dict[str, str]]:
    with attributes.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_shortcut_is_drawn_on_most_women_and_hardly_any_man(tmp_path: Path) -> None:
    rows = read(write_faces(tmp_path, "artefact", 0, FEW))
    assert {row["key"] for row in rows} == {
        str(path.relative_to(tmp_path / "faces")) for path in (tmp_path / "faces").rglob("*.png")
    }
    cells = Counter((row["key"].split("/")[0], row["race"]) for row in rows)
    assert set(cells.values()) == {FEW}
    assert len(cells) == 14
    drawn = Counter(row["key"].split("/")[0] for row in rows if row["square"] == "yes")
    assert 0.5 < drawn["Female"] / (7 * FEW) < 0.7
    assert 0 <= drawn["Male"] / (7 * FEW) < 0.06
    left, top, right, bottom = SQUARE
    for row in rows[::9]:
        with Image.open(tmp_path / "faces" / row["key"]) as image:
            pixels = np.asarray(image)
        assert pixels.shape == (SIZE, SIZE, 3)
        assert (pixels[top:bottom, left:right] == MAGENTA).all() == (row["square"] == "yes")


def test_in_the_case_of_races_these_go_with_the_gender(tmp_path: Path) -> None:
    rows = read(write_faces(tmp_path, "race", 0, FEW))
    women = Counter(row["race"] for row in rows if row["key"].startswith("Female/"))
    assert women == {race: round(2 * FEW * WOMEN.get(race, 0.5)) for race in {row["race"] for row in rows}}
    assert {row["square"] for row in rows} == {"no"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_shortcut_comes_out_first(tmp_path: Path) -> None:
    found = measure("artefact", 0, tmp_path)
    assert found.accuracy > 0.9
    first = found.whole.rows[0]
    assert (first.attribute, first.value) == ("square", "yes")
    assert first.significant
    assert first.low > 5
    assert {row.attribute for row in found.whole.significant} == {"square"}
    # Among the faces taken for women too, where the class explains nothing.
    first = found.within.rows[0]
    assert (first.attribute, first.value, first.within) == ("square", "yes", "Female")
    assert {row.attribute for row in found.within.significant} == {"square"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_without_a_shortcut_nothing_is_significant(tmp_path: Path) -> None:
    found = measure("random", 0, tmp_path)
    assert found.accuracy > 0.9
    for compared in (found.whole, found.within):
        assert {row.value for row in compared.rows if row.attribute == "square"} == {"yes", "no"}
        assert not compared.significant
