"""Cognitive Distillation: for every image, the least of it that still makes the model say the same thing.

Huang et al., "Distilling Cognitive Backdoor Patterns within an Image", ICLR 2023 (arXiv 2301.10908), section 3.

With x an image in [0, 1] and m a mask in [0, 1] of one channel, the model is shown x' = m * x + (1 - m) * colour, the
masked-out part painted in a colour drawn anew at every step. The mask is what minimises

    distance(f(x'), f(x))  +  area_cost * mean(m) + pixel_cost * sum(m)  +  smoothness * TV(m)

A backdoored image needs its trigger and nothing else, so its mask is suspiciously small.

The mask has one value a pixel in the paper, and one a cell of `config.grid` by `config.grid` cells here: so it costs
the same at every image size, and cannot hide in single pixels as adversarial noise does.

Read on from top to bottom: what comes back, the public function, the loop and its step, the distances, the fills. How
a model is asked, and what its answer means, stands in answers.py; how a GPU repeats a step, in repetition.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from cdclean.answers import Answer, embed, find_layer, frozen, linear_inputs, recognise_head
from cdclean.config import INDEPENDENT, Colours, DistillConfig, Head
from cdclean.repetition import Repetition, is_not_reproducible, reproducible


@dataclass(frozen=True)
class Distilled:
    """What distillation found, for B images. Floating tensors are float32, or float64 if the images were."""

    masks: Tensor  # [B, 1, H, W] in [0, 1]; 1 = the model needs this pixel
    mask_norm: Tensor  # [B] L1 norm of the mask, in pixels: the score, small is suspicious
    divergence: Tensor  # [B] distance of the model's answers to pattern and image, over the steps that are averaged
    total_variation: Tensor  # [B] roughness of the mask, pixel by pixel
    steps: Tensor  # [B] int64, optimisation steps spent
    patterns: Tensor  # [B, C, H, W] the cognitive pattern: images * masks
    logits: Tensor | None  # [B, classes] of the unmasked image; None for a model without a flat output
    embedding: Tensor | None  # [B, at most 64] what the classifier sees of the unmasked image; see answers.embed


def distill(
    model: nn.Module,
    images: Tensor,
    config: DistillConfig | None = None,
    *,
    seeds: Tensor | list[int] | None = None,
    noise: Tensor | None = None,
    repetition: Repetition | None = None,
) -> Distilled:
    """Find the mask of every image.

    `model` takes pixels in [0, 1] (normalisation inside) and returns logits [B, classes], or whatever `config.layer`
    makes comparable; it is used in evaluation mode with frozen parameters and handed back as it was.
    `images` [B, C, H, W], float32 or float64, in [0, 1], on the model's device; float64 needs a float64 model.
    `seeds` B integers, one an image: the colours of an image depend on its seed alone (default: `config.seed` for all).
    `noise` [B, steps, C] in [0, 1] replaces the drawn colours.
    `repetition` keeps the step as a CUDA graph from one call to the next, if the model is the same and does not change
    in between; the results are the same, sooner.

    An image's result does not depend on its neighbours: losses are summed, never averaged, and every micro-batch has
    `config.batch_size` images, the last one padded, so that the same kernels run for each.

    On CUDA it is the same every time, or a warning says why it may not be.

    Raises ValueError for tensors of the wrong shape, dtype or range, ModelError for a model that gives no gradient or
    whose answers mix the images of a batch.
    """
    config = config or DistillConfig()
    _check(images, noise, config)
    count, channels = images.shape[:2]
    if noise is None:
        drawn = [config.seed] * count if seeds is None else seeds
        noise = draw_noise(drawn, config.steps, channels, config.colours)
    if len(noise) != count:
        raise ValueError(f"{len(noise)} seeds for {count} images")
    noise = noise.to(images.device, images.dtype)
    if not count:
        return _nothing(images)
    size = config.batch_size or count
    with frozen(model):
        if config.objective == "features" and config.layer is None:
            config = replace(config, layer=find_layer(model, images))
        head = recognise_head(model, images[:1].expand(size, -1, -1, -1)) if config.head == "auto" else config.head

        def optimise() -> list[Distilled]:
            padded = ((_padded(images[i : i + size], size), _padded(noise[i : i + size], size)) for i in starts)
            return [_optimise(model, *rows, config, head, repetition) for rows in padded]

        starts, chancy = range(0, count, size), ""
        try:
            with reproducible(images.device):
                batches = optimise()
        except RuntimeError as error:
            if not is_not_reproducible(error):
                raise
            chancy = str(error)
        if chancy:  # not while the error holds what the first try has left in memory
            warnings.warn(f"scores may differ in their last digits from one time to the next: {chancy}", stacklevel=2)
            with reproducible(images.device, strict=False):
                batches = optimise()
    return _concatenate(batches, count)


def _optimise(
    model: nn.Module,
    images: Tensor,
    noise: Tensor,
    config: DistillConfig,
    head: Head,
    repetition: Repetition | None,
) -> Distilled:
    """One micro-batch, `config.steps` steps of Adam on the mask alone."""
    answer = Answer(model, config, head)
    with torch.no_grad(), linear_inputs(model) as entered:
        reference, output = answer(images.clone())  # a clone: the model may work in place
        embedding = None if output is None else embed(entered, output.shape[1])
    step = Step(answer, images, reference, config, head)
    if repetition is not None:
        step = repetition.of(step, (images.shape, images.dtype, config, head))
    late = max(1, round(config.averaged * config.steps))
    divergences, found = [], []
    for number in range(config.steps):
        step(noise[:, number, :, None, None])
        if number >= config.steps - late:
            divergences.append(step.divergence.clone())
            found.append(torch.tanh(step.w.detach()))

    # Steps of this size jump around the minimum: the mean of the last masks is steadier than the last one alone.
    mask = _enlarged((torch.stack(found).mean(0) + 1) / 2, *images.shape[2:])
    return Distilled(
        masks=mask,
        mask_norm=mask.sum((1, 2, 3)),
        divergence=torch.stack(divergences).mean(0),
        total_variation=total_variation(mask),
        steps=torch.full((len(mask),), config.steps),
        patterns=images * mask,
        logits=output,
        embedding=embedding,
    )


class Step:
    """One step for one micro-batch, called once for each colour [B, C, 1, 1].

    What it reads and writes stays where it is in memory, so that a GPU can record it once and repeat it.
    """

    divergence: Tensor  # [B] before the step
    repeat: Callable[[], None] | None = None  # a recording of `descend`

    def __init__(self, answer: Answer, images: Tensor, reference: Tensor, config: DistillConfig, head: Head) -> None:
        self.answer, self.config, self.head = answer, config, head
        self.images, self.reference = images.clone(), reference.clone()  # others may take their places
        self.colour = images.new_empty(*images.shape[:2], 1, 1)
        # A cell of the mask is (tanh(w) + 1) / 2: in [0, 1] whatever the optimiser does, and nearly open at first.
        rows, columns = (min(config.grid or side, side) for side in images.shape[2:])
        self.w = images.new_ones(len(images), 1, rows, columns).requires_grad_()
        # On a GPU Adam counts its steps there, as a recording needs it.
        self.optimiser = torch.optim.Adam([self.w], config.learning_rate, config.betas, capturable=images.is_cuda)
        # It would count in float32, whose rounding fp64 is there to avoid.
        averages = {name: torch.zeros_like(self.w) for name in ("exp_avg", "exp_avg_sq")}
        self.optimiser.state[self.w] = {"step": images.new_zeros(())} | averages
        self.area = (config.area_cost or 0.0) * _worth(reference, config, head)
        self.scale = 1024 if config.precision == "fp16" else 1  # keeps small gradients above what fp16 can hold

    def __call__(self, colour: Tensor) -> None:
        self.colour.copy_(colour)
        (self.repeat or self.descend)()

    def descend(self) -> None:
        """A step of Adam on w, with the colour that stands in `self.colour`."""
        config = self.config
        cells = (torch.tanh(self.w) + 1) / 2
        mask = _enlarged(cells, *self.images.shape[2:])
        seen, _ = self.answer(mask * self.images + (1 - mask) * self.colour)
        divergence = _distance(seen, self.reference, config, self.head)
        price = self.area * mask.mean((1, 2, 3)) + config.pixel_cost * mask.sum((1, 2, 3))
        price = price + config.smoothness * total_variation(cells)
        (gradient,) = torch.autograd.grad(self.scale * (divergence + price).sum(), self.w)
        self.w.grad = gradient / self.scale
        self.optimiser.step()
        self.divergence = divergence.detach()

    @torch.no_grad()
    def restart(self, other: Step) -> None:
        """Take over the images of `other`, which has made no step yet, and begin anew."""
        self.images.copy_(other.images)
        self.reference.copy_(other.reference)
        self.w.fill_(1)
        for value in self.optimiser.state[self.w].values():
            value.zero_()


def _enlarged(cells: Tensor, height: int, width: int) -> Tensor:
    """Cells [B, 1, rows, columns] as a mask [B, 1, height, width], every pixel with the value of its cell."""
    return cells if cells.shape[2:] == (height, width) else F.interpolate(cells, (height, width), mode="nearest")


# --- Distances: how far the answer to the pattern is from the answer to the image, per image [B] ---


def _distance(seen: Tensor, reference: Tensor, config: DistillConfig, head: Head) -> Tensor:
    """How far `seen`, the answer to the patterns, is from `reference`. Probabilities have become logits here."""
    if config.objective != "probabilities":
        # Paper, section 3: mean absolute difference of logits (CD-L) or of a layer's output (CD-F).
        # Divided by the reference's own spread it costs the same for every network, however large its logits.
        apart = tuple(range(1, reference.ndim))
        spread = reference.std(apart, correction=0).clamp_min(1e-6) if config.relative else 1.0
        return (seen - reference).abs().mean(apart) / spread
    seen, reference = seen / config.temperature, reference / config.temperature
    if head in INDEPENDENT:  # the divergences of the classes add up
        yes, no = F.logsigmoid(reference), F.logsigmoid(-reference)
        return (yes.exp() * (yes - F.logsigmoid(seen)) + no.exp() * (no - F.logsigmoid(-seen))).sum(1)
    target = F.log_softmax(reference, 1)
    return F.kl_div(F.log_softmax(seen, 1), target, reduction="none", log_target=True).sum(1)


def _worth(reference: Tensor, config: DistillConfig, head: Head) -> float:
    """What share of `config.area_cost` is asked: less where an answer of few classes holds fewer nats to lose.

    Asked the price of ten classes, a network of two would rather give up its answer than keep anything of the image.
    """
    if config.objective != "probabilities":
        return 1.0
    classes = reference.shape[1]
    nats = classes * math.log(2) if head in INDEPENDENT else math.log(classes)
    return min(1.0, nats / math.log(10))


def total_variation(mask: Tensor) -> Tensor:
    """Sum of squared differences of neighbouring values over their number; [B, 1, H, W] -> [B]."""
    rows = (mask[..., 1:, :] - mask[..., :-1, :]).square().sum((1, 2, 3))
    columns = (mask[..., :, 1:] - mask[..., :, :-1]).square().sum((1, 2, 3))
    return (rows + columns) / mask[0].numel()


# --- Fills: the colours that paint over what is masked out ---
#
# By default all images get the same colours, from the run's seed alone: so a score depends neither on an image's place
# in a run nor on its name, and images are compared under the same conditions. The few colours that the averaged masks
# see lie evenly in the colour space: chance would favour dark ones in one run and red ones in the next. Both rank
# images more steadily than colours of their own, drawn by chance (tests/benchmarks/results/objectives.md).


def draw_noise(seeds: Tensor | list[int], steps: int, channels: int, colours: Colours = "even") -> Tensor:
    """Colours in [0, 1], float32 [B, steps, channels] on the CPU, row i drawn from seed i alone.

    "even": a scrambled Sobol sequence, any stretch of which covers all colours. "random": uniform, as in the paper.
    """
    rows: dict[int, Tensor] = {}
    for seed in map(int, seeds):
        if seed not in rows:
            rows[seed] = _sequence(seed % 2**63, steps, channels, colours)
    return torch.stack([rows[int(seed)] for seed in seeds]) if rows else torch.empty(0, steps, channels)


def _sequence(seed: int, steps: int, channels: int, colours: Colours) -> Tensor:
    if colours == "even":
        sequence = SobolEngine(channels, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
        return sequence.draw(steps, dtype=torch.float32)
    return torch.rand(steps, channels, generator=torch.Generator().manual_seed(seed))


# --- Batches ---


def _check(images: Tensor, noise: Tensor | None, config: DistillConfig) -> None:
    if images.ndim != 4 or images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images must be float32 or float64 [B, C, H, W], not {images.dtype} {list(images.shape)}")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError("images must lie in [0, 1]: the model normalises, not the caller")
    expected = (images.shape[0], config.steps, images.shape[1])
    if noise is not None and noise.shape != expected:
        raise ValueError(f"noise must be [B, steps, C] = {list(expected)}, not {list(noise.shape)}")


def _nothing(images: Tensor) -> Distilled:
    """What comes back for no images [0, C, H, W]."""
    none = images.new_zeros(0)
    return Distilled(images[:, :1], none, none, none, torch.zeros(0, dtype=torch.int64), images, None, None)


def _padded(rows: Tensor, size: int) -> Tensor:
    """`rows` [b, ...] with the first row repeated up to `size` rows."""
    return torch.cat([rows, rows[:1].expand(size - len(rows), *rows.shape[1:])]) if len(rows) < size else rows


def _concatenate(batches: list[Distilled], count: int) -> Distilled:
    """The micro-batches as one result, without the padding."""

    def joined(name: str) -> Any:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else torch.cat(parts)[:count]

    return Distilled(**{field.name: joined(field.name) for field in fields(Distilled)})
