"""Classes differ in the size of their masks without any shortcut: what is then tested, and what only described."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cdclean import bias
from cdclean.bias import analyse, comparisons
from tests.test_bias import N, keys, make_run, row, write_csv


@pytest.fixture
def uneven(tmp_path: Path) -> tuple[Path, Path]:
    """Dogs have smaller masks than cats and that is all: neither tone nor size goes with the masks or the class."""
    generator = np.random.default_rng(0)
    dog = np.arange(N) % 2 == 1
    norms = np.where(dog, 60, 100) + 40 * generator.random(N)
    run = make_run(tmp_path, norms, predictions=dog.astype(int).tolist())
    table = {"key": keys(), "tone": generator.choice(list("abc"), N), "size": generator.random(N)}
    return run, write_csv(tmp_path / "attributes.csv", table)


def test_classes_with_masks_of_different_size_are_nothing_significant(uneven: tuple[Path, Path]) -> None:
    found = comparisons(*uneven)
    assert [each.within for each in found] == ["prediction", None]
    assert not any(each.significant for each in found)
    assert all(bias.sentence(each).startswith("None of ") for each in found)
    assert len(found[1].tested) == 8
    (alone,) = comparisons(uneven[0])[1:]  # without a file nothing is left to test
    assert not alone.tested
    assert not alone.significant
    assert alone.described == found[1].described


def test_class_and_prediction_are_described_after_what_is_tested(uneven: tuple[Path, Path]) -> None:
    found = analyse(*uneven)
    assert found.rows == (*found.tested, *found.described)
    assert {(r.attribute, r.value) for r in found.described} == {
        (attribute, value) for attribute in ("class", "prediction") for value in ("cat", "dog")
    }
    dogs = row(found, "prediction", "dog")
    assert (dogs.samples, dogs.small, dogs.support, dogs.observed, dogs.expected) == (400, 40, 200, 40, 20.0)
    assert 1 < dogs.low < dogs.effect < dogs.high
    for item in found.described:
        assert (item.p_value, item.q_value, item.significant) == (None, None, False)
    plain = json.loads(json.dumps(bias.as_dict(found), allow_nan=False))["rows"]
    assert [(r["tested"], r["q_value"] is None) for r in plain] == [(True, False)] * 8 + [(False, True)] * 4
    lines = [line.split() for line in bias.table(found).splitlines()]
    assert [line[-1] for line in lines if line[:1] == ["prediction"]] == ["-", "-"]
    assert ["q", "-:", "described,", "not", "tested."] in lines


def test_what_goes_with_a_class_may_be_significant_in_the_whole_run(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    dog = np.arange(N) % 2 == 1
    run = make_run(tmp_path, np.where(dog, 60, 100) + 40 * generator.random(N), dog.astype(int).tolist())
    outdoors = np.where(generator.random(N) < np.where(dog, 0.9, 0.1), "yes", "no")
    within, whole = comparisons(run, write_csv(tmp_path / "a.csv", {"key": keys(), "outdoors": outdoors}))
    assert {item.attribute for item in whole.significant} == {"outdoors"}
    assert not within.significant
    assert "can be significant for that alone" in whole.caveat


def test_within_the_prediction_the_class_is_described_too(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    taken = np.arange(N) % 8 == 0  # cats that are taken for dogs, and have the smallest masks
    predictions = ((np.arange(N) % 2 == 1) | taken).astype(int)
    run = make_run(tmp_path, np.where(taken, 10, 100) + generator.random(N), predictions.tolist())
    found = analyse(run, within="prediction")
    assert (found.rows[0].attribute, found.rows[0].value, found.rows[0].within) == ("class", "cat", "dog")
    assert found.described == found.rows
    assert not found.significant


def test_a_sure_but_small_effect_is_not_significant() -> None:
    """20 % of the small masks and 14.9 % of the others: an odds ratio of 1.4, far beyond chance in 20,000 samples."""
    counts = [np.array([number]) for number in (20_000, 2000, 3082, 400)]
    (p_value,) = bias.two_sided(*counts)
    effect, low, _ = (float(value[0]) for value in bias.odds_ratio(*counts))
    assert p_value < 1e-6
    assert 1 < low < effect < bias.LEAST_EFFECT


def test_what_counts_is_the_end_of_the_interval_that_is_nearer_to_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, np.arange(N) + 1.0)  # the first 40 are the smallest

    def found(observed: int) -> bias.Enrichment:
        marked = [*["yes"] * observed, *["no"] * (40 - observed), *["yes", "no", "no", "no"] * 90]
        return row(analyse(run, write_csv(tmp_path / "a.csv", {"key": keys(), "mark": marked})), "mark", "yes")

    weak, strong = found(18), found(30)
    assert weak.q_value is not None
    assert weak.q_value < 0.05
    assert 1 < weak.low < bias.LEAST_EFFECT < weak.effect
    assert not weak.significant
    assert strong.low > bias.LEAST_EFFECT
    assert strong.significant
