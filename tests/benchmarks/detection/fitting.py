"""Training the victims on arrays in memory: two recipes, small enough to read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdclean.examples import flip_crop
from cdclean.models import Normalized
from tests.benchmarks.detection.data import Labels, Pixels


@dataclass(frozen=True)
class Recipe:
    """How a victim is trained: SGD with Nesterov momentum 0.9 and weight decay 0.0005, learning rate 0.1 at most."""

    epochs: int
    batch_size: int
    augment: bool  # mirrored and shifted by up to an eighth of its sides, at random
    one_cycle: bool  # otherwise the rate is divided by ten after 3/4 and 7/8 of the epochs


def modern(epochs: int) -> Recipe:
    return Recipe(epochs, 128, augment=True, one_cycle=True)


def plain(epochs: int) -> Recipe:
    """No augmentation, and long, so that logits grow large: as Huang et al. 2023 train."""
    return Recipe(epochs, 128, augment=False, one_cycle=False)


def short(epochs: int) -> Recipe:
    """For few images: a patch of three pixels in 500 of 10,000 is not learned if it is shifted out half of the time."""
    return Recipe(epochs, 64, augment=False, one_cycle=True)


def fit(
    build: Callable[[], Normalized], images: Pixels, labels: Labels, recipe: Recipe, seed: int, device: str
) -> Normalized:
    """What `build` gives, trained on the images: pixels in [0, 1] -> logits; frozen, in evaluation mode."""
    torch.manual_seed(seed)
    module: Normalized = build().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = to_tensor(images).to(device)
    wanted = torch.from_numpy(labels).to(device)
    per_epoch = math.ceil(len(labels) / recipe.batch_size)
    total = recipe.epochs * per_epoch
    optimiser = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule: torch.optim.lr_scheduler.LRScheduler
    if recipe.one_cycle:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total, pct_start=0.25)
    else:
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [total * 3 // 4, total * 7 // 8])
    module.train()
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(labels)).tensor_split(per_epoch):
            shown = pixels[rows]
            answer = _ask(module, flip_crop(shown) if recipe.augment else shown)
            loss = F.cross_entropy(answer, wanted[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return module.eval().requires_grad_(False)


def to_tensor(images: Pixels) -> Tensor:
    """uint8 [n, H, W, 3] -> uint8 [n, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@torch.no_grad()
def predict(module: nn.Module, images: Pixels) -> Labels:
    device = next(module.buffers()).device
    answers = [_ask(module, batch.to(device)).argmax(1).cpu() for batch in to_tensor(images).split(512)]
    return torch.cat(answers).numpy()


def _ask(module: nn.Module, pixels: Tensor) -> Tensor:
    """Logits, float32; in bf16 where the hardware has it, as training takes half the time then."""
    shown = (pixels.float() / 255).contiguous(memory_format=torch.channels_last)
    with torch.autocast(pixels.device.type, dtype=torch.bfloat16):
        answer: Tensor = module(shown)
    return answer.float()
