"""The mask: its cells, the mean of its last iterates, its price at other image sizes, and the colours around it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdclean.config import DistillConfig
from cdclean.distillation import distill, draw_noise
from tests.test_distillation import pictures, tiny


@pytest.mark.parametrize(("size", "grid", "cells"), [(32, 16, 16), (28, 16, 16), (12, 16, 12), (32, 5, 5)])
def test_a_mask_has_one_value_a_cell(size: int, grid: int, cells: int) -> None:
    masks = distill(tiny("test_resnet"), pictures(2, size=size), DistillConfig("logits", steps=12, grid=grid)).masks
    assert masks.shape == (2, 1, size, size)
    for axis in (2, 3):
        changes = (masks.diff(dim=axis) != 0).any(dim=5 - axis).flatten(1).sum(1)
        assert (changes <= cells - 1).all()
    assert masks.unique().numel() > cells  # it is not flat either


def test_without_a_grid_every_pixel_has_its_own_value() -> None:
    masks = distill(tiny("test_resnet"), pictures(1), DistillConfig("logits", steps=12, grid=None)).masks
    assert (masks.diff(dim=3) != 0).float().mean() > 0.9


def test_the_mask_is_the_mean_of_the_last_ones() -> None:
    model, images, noise = tiny("test_resnet"), pictures(2), draw_noise([0, 1], 10, 3)

    def found(steps: int, averaged: float) -> Tensor:
        config = DistillConfig("logits", steps=steps, averaged=averaged)
        return distill(model, images, config, noise=noise[:, :steps]).masks

    last = torch.stack([found(steps, 0.0) for steps in (8, 9, 10)])
    assert not torch.equal(last[0], last[2])
    assert torch.allclose(found(10, 0.3), last.mean(0), rtol=0, atol=1e-6)


class Shrinking(nn.Module):
    """Sees 32 x 32 pixels of an image of any multiple of that size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(F.adaptive_avg_pool2d(pixels, 32))


@pytest.mark.parametrize("size", [64, 224])
def test_a_price_per_area_is_the_same_at_every_image_size(size: int) -> None:
    model = Shrinking(tiny("test_resnet").double())
    images = pictures(3, dtype=torch.float64)
    config = DistillConfig("logits", steps=10, precision="fp64")
    small = distill(model, images, config)
    large = distill(model, F.interpolate(images, size, mode="nearest"), config)
    assert torch.allclose(large.mask_norm / size**2, small.mask_norm / 32**2, rtol=0, atol=1e-9)
    assert small.mask_norm.std() > 0


class Classes(nn.Module):
    """The first two classes of a network, far apart, and others that it never predicts."""

    def __init__(self, network: nn.Module, others: int) -> None:
        super().__init__()
        self.network, self.others = network, others

    def forward(self, pixels: Tensor) -> Tensor:
        return F.pad(100 * self.network(pixels)[:, :2], (0, self.others), value=-500.0)


def test_a_full_mask_costs_less_where_there_are_few_classes() -> None:
    network, images = tiny("test_resnet").double(), pictures(3, dtype=torch.float64)
    config = DistillConfig(steps=10, precision="fp64", head="softmax")
    assert config.area_cost == 6.0
    cheaper = replace(config, area_cost=6.0 * math.log(2) / math.log(10))
    two, ten, thirty = (distill(Classes(network, others), images, cheaper).masks for others in (0, 8, 28))
    assert torch.allclose(ten, thirty, rtol=0, atol=1e-9)
    assert (two - ten).abs().max() > 0.01
    assert torch.allclose(distill(Classes(network, 0), images, config).masks, ten, rtol=0, atol=1e-9)


def test_images_share_their_colours_unless_they_have_seeds() -> None:
    model, images = tiny("test_resnet"), pictures(1)
    twice = images.expand(2, -1, -1, -1)
    config = DistillConfig(objective="logits", steps=12)
    found = distill(model, twice, config).divergence
    assert found[0] == found[1]
    apart = distill(model, twice, config, seeds=[0, 1]).divergence
    assert apart[0] == found[0]
    assert apart[1] != found[1]
