"""Classes that fall into two groups: planted ones are found, honest ones of one kind are not, in whatever order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdclean.separation import SMALLEST, separate

Samples = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # embedding, class, density, margin


def one_kind(random: np.random.Generator, sizes: list[int], dimensions: int = 16) -> Samples:
    """Classes about centres of their own, spread more along some directions than along others, in all alike."""
    classes = np.repeat(np.arange(len(sizes)), sizes)
    centres = random.normal(0, 10, (len(sizes), dimensions))
    spread = np.geomspace(3, 0.1, dimensions)
    points = centres[classes] + random.normal(0, 1, (len(classes), dimensions)) * spread
    density = np.exp(random.normal(-1.5, 0.4, len(classes))).clip(0, 1)
    return points.astype(np.float32), classes, density, np.exp(random.normal(1, 0.4, len(classes)))


def moved(samples: Samples, rows: np.ndarray, by: float, smaller: float = 1.0) -> Samples:
    """`rows` as another kind of thing: `by` standard deviations away where classes vary least, with smaller masks."""
    points, classes, density, margin = (column.copy() for column in samples)
    points[rows, -1] += np.float32(0.1 * by)
    density[rows] *= smaller
    return points, classes, density, margin


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(SMALLEST, 200), min_size=1, max_size=8))
def test_classes_of_one_kind_do_not_fall_apart(seed: int, sizes: list[int]) -> None:
    embedding, classes, density, margin = one_kind(np.random.default_rng(seed), sizes)
    assert all(split.least < 0.05 for split in separate(embedding, classes, density, margin))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.floats(0.1, 0.6), st.booleans())
def test_another_kind_is_found_by_what_the_network_sees_alone(
    seed: int, count: int, share: float, with_margin: bool
) -> None:
    random = np.random.default_rng(seed)
    samples = one_kind(random, [150] * count)
    of = int(random.integers(count))
    planted = of * 150 + random.permutation(150)[: round(share * 150)]
    embedding, classes, density, margin = moved(samples, planted, by=12, smaller=0.7)
    first = separate(embedding, classes, density, margin if with_margin else None)[0]
    assert first.of == of
    assert first.least > 0.2
    assert (first.rows == np.sort(first.rows)).all() or set(first.rows) == set(np.flatnonzero(classes == of))
    assert set(planted) <= set(first.members)
    assert len(set(first.members) - set(planted)) <= 0.02 * 150


def test_of_two_groups_the_suspect_has_the_smaller_masks() -> None:
    samples = one_kind(np.random.default_rng(0), [200] * 3)
    planted = np.arange(200, 300)
    small = separate(*moved(samples, planted, by=12, smaller=0.6))[0]
    assert set(small.members) == set(planted)
    large = separate(*moved(samples, planted, by=12, smaller=1.5))[0]
    assert set(large.members) == set(range(300, 400))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_the_order_of_the_samples_changes_nothing(seed: int, alike: bool) -> None:
    random = np.random.default_rng(seed)
    embedding, classes, density, margin = moved(one_kind(random, [60, 80, 70]), np.arange(70, 90), by=9, smaller=0.5)
    if alike:  # copies of images
        for column in (embedding, density, margin):
            column[100:110] = column[100]
    order = random.permutation(len(classes))
    found = separate(embedding, classes, density, margin)
    again = separate(embedding[order], classes[order], density[order], margin[order])
    assert [(split.of, split.gain, split.least) for split in found] == [
        (split.of, split.gain, split.least) for split in again
    ]
    for split, other in zip(found, again, strict=True):
        assert set(split.members) == set(order[other.members])


@pytest.mark.parametrize("value", [0.0, 1.0, 1e30])
def test_images_that_are_all_alike_do_not_fall_apart(value: float) -> None:
    classes = np.arange(400) % 4
    embedding = np.full((400, 8), value, np.float32)
    found = separate(embedding, classes, np.full(400, 0.2), np.full(400, 2.0))
    assert all(np.isfinite([split.gain, split.least]).all() and split.least <= 0.05 for split in found)


def test_classes_of_a_handful_are_passed_over() -> None:
    embedding, classes, density, margin = one_kind(np.random.default_rng(0), [SMALLEST - 1] * 5)
    assert separate(embedding, classes, density, margin) == []
    assert separate(embedding[:0], classes[:0], density[:0], margin[:0]) == []


def test_a_large_class_is_fitted_in_part_and_assigned_whole() -> None:
    random = np.random.default_rng(0)
    embedding, classes, density, margin = moved(one_kind(random, [9000, 500]), np.arange(1500), by=12, smaller=0.7)
    first = separate(embedding, classes, density, margin)[0]
    assert len(first.rows) == 9000
    assert len(set(first.members) ^ set(range(1500))) <= 20
