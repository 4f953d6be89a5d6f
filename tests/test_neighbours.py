"""The other detectors of the detection benchmark, on a network whose features are known: which images come first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from tests.benchmarks.detection.neighbours import activation_clustering, confidence, observe, scores

CLASSES, TRIGGER = 4, 15  # class k shows in cells 2k and 2k + 1 of a 4 x 4 grid, the trigger in the last cell
TARGET = 0
DIM = 40  # grey level of a cell where nothing shows


def network() -> nn.Module:
    """Features: the mean of each of the 16 cells. A trigger adds more to the target's logit than any class's cells."""
    linear = nn.Linear(16, CLASSES)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
        for label in range(CLASSES):
            linear.weight[label, 2 * label : 2 * label + 2] = 4.0
        linear.weight[TARGET, TRIGGER] = 12.0
        linear.bias[TARGET] = -12.0 * DIM / 255  # so the cell says nothing where there is no trigger
    to_grey = nn.Conv2d(3, 1, 1, bias=False)
    nn.init.constant_(to_grey.weight, 1 / 3)
    return nn.Sequential(to_grey, nn.AvgPool2d(8), nn.Flatten(), linear).eval().requires_grad_(False)


def drawn(labels: Tensor, triggered: Tensor, seed: int) -> Tensor:
    """uint8 [n, 3, 32, 32]: dim noise, the cells of the class brighter, and those of the trigger where there is one."""
    generator = torch.Generator().manual_seed(seed)
    cells = DIM + 12 * torch.randn(len(labels), 16, generator=generator)
    for half in (0, 1):
        cells[torch.arange(len(labels)), 2 * labels + half] += 80
    cells[triggered, TRIGGER] += 160
    grid = cells.clamp(0, 255).view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return grid.expand(-1, 3, -1, -1).to(torch.uint8)


def poisoned(triggered: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Scores of 400 images, 30 of them of class 1 labelled TARGET, with or without a trigger; and which they are."""
    shown = torch.arange(400) % CLASSES
    wrong = torch.zeros(400, dtype=torch.bool)
    wrong[shown.eq(1).nonzero().flatten()[:30]] = True
    images = drawn(shown, wrong & triggered, 1)
    trusted_labels = torch.arange(120) % CLASSES
    trusted = drawn(trusted_labels, torch.zeros(120, dtype=torch.bool), 2)
    labels = torch.where(wrong, TARGET, shown)
    return scores(network(), images, labels, trusted, trusted_labels, batch=128, blends=4), wrong.numpy()


@pytest.fixture(scope="module")
def backdoored() -> tuple[dict[str, np.ndarray], np.ndarray]:
    return poisoned(True)


@pytest.mark.parametrize("method", ["confidence", "margin", "spectral signatures", "STRIP", "SCAn"])
def test_a_backdoor_ranks_first(backdoored: tuple[dict[str, np.ndarray], np.ndarray], method: str) -> None:
    found, wrong = backdoored
    assert roc_auc_score(wrong, found[method]) > 0.98


def test_activation_clustering_suspects_the_smaller_cluster() -> None:
    # In few dimensions: whitened, one that separates is worth no more than nine of noise, which a split may follow.
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 400)
    features = generator.normal(size=(1200, 3)).astype(np.float32)
    wrong = np.arange(1200) < 120
    features[wrong, 0] += 20
    found = activation_clustering(features, labels, 0)
    assert roc_auc_score(wrong[:400], found[:400]) == 1
    assert roc_auc_score(wrong, found) > 0.95  # clean classes are split as well


def test_a_wrong_label_among_images_of_another_class_is_found_by_its_neighbours() -> None:
    found, wrong = poisoned(False)
    assert roc_auc_score(wrong, found["feature kNN, label"]) > 0.98
    # The network has not learned these labels: its own answer agrees with the neighbours' labels.
    assert found["feature kNN, prediction"][wrong].max() < 0.5


def test_each_score_is_a_finite_float64_an_image_whatever_the_batch(
    backdoored: tuple[dict[str, np.ndarray], np.ndarray],
) -> None:
    for values in backdoored[0].values():
        assert values.shape == (400,)
        assert values.dtype == np.float64
        assert np.isfinite(values).all()
    images = drawn(torch.arange(10) % CLASSES, torch.zeros(10, dtype=torch.bool), 3)
    for whole, parted in zip(observe(network(), images, 10), observe(network(), images, 3), strict=True):
        np.testing.assert_allclose(whole, parted, rtol=1e-5)


def test_the_gradient_statistics_are_those_of_the_margin() -> None:
    images = drawn(torch.tensor([1]), torch.tensor([True]), 4)
    _, _, ((norm, concentration),) = observe(network(), images)
    # The margin of target over class 1: weights 4 (2 cells), -4 (2 cells) and 12 (1 cell), each over its 64 pixels.
    assert norm == pytest.approx(4 * 4 + 12, rel=1e-5)
    assert concentration == pytest.approx((4 * 4**2 + 12**2) ** 0.5 / 8 / (4 * 4 + 12), rel=1e-5)


def test_confidence_has_no_ties_where_the_probability_is_one() -> None:
    sure = confidence(np.array([[60.0, 0.0], [61.0, 0.0], [1.0, 0.0]]))
    assert sure[2] < sure[0] < sure[1] < 0
    assert sure[2] == pytest.approx(np.log(1 / (1 + np.exp(-1))))


def test_a_class_of_few_images_scores_zero_where_it_is_not_taken_apart() -> None:
    shown = torch.cat([torch.zeros(40, dtype=torch.int64), torch.ones(3, dtype=torch.int64)])
    images = drawn(shown, torch.zeros(43, dtype=torch.bool), 5)
    found = scores(network(), images, shown, images, shown)
    for method in ("activation clustering", "spectral signatures", "SCAn"):
        assert not found[method][40:].any()
        assert found[method][:40].any()
