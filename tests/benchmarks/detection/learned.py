"""Triggers that need a network to be made, for 32 px: two fitted to a clean surrogate, two to nets of their own.

- `adversarial`: the perturbation of label-consistent poisons (Turner et al. 2019), clean features made hard to learn;
- `smooth_pattern`: a universal trigger of low frequencies alone (Zeng et al. 2021);
- `input_aware`: a trigger of its own for every image, that works on no other (Nguyen & Tran 2020);
- `sample_specific`: a bit string hidden in the image, as in ISSBA (Li et al. 2021).

Images are uint8 [n, 32, 32, 3], labels int64 [n]. A surrogate takes float pixels [B, 3, 32, 32] in [0, 1] and
normalises them itself; it is in evaluation mode and frozen, and the work is done on its device. Networks run in
bfloat16, which halves the time on CPUs that know it. The same seed gives the same trigger on one kind of device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.benchmarks.detection.networks import MEAN, STD, CifarResNet

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

SIZE = 32  # pixels a side
BATCH = 128

SMOOTH_STEPS = 60
SMOOTH_BOUND = 16 / 255  # of the pattern, in L-infinity
FREQUENCIES = 8  # of 32 a side: the finest wave left is nine pixels long

MASK_STEPS = 60
JOINT_STEPS = 240
MASK_AREA = 0.05  # of the image that a trigger may cover: about 50 pixels
OWN, CROSS = 48, 48  # of a joint batch: images with their own trigger, images with another image's

BITS = 16
HIDE_STEPS = 350
RESIDUAL = 32 / 255  # the most that hiding the string may change a pixel; 8 levels in the mean square, 30 dB
NOISE = 0.1  # that the string must survive: with 0.03, victims do not learn it from some hundred images
QUIET = 10.0  # price of the residual's size


def adversarial(
    images: Images, labels: Labels, surrogate: nn.Module, *, epsilon: float = 16 / 255, steps: int = 20, seed: int = 0
) -> Images:
    """Images that the surrogate no longer takes for what they are: PGD in L-infinity on the loss of the true label.

    Label-consistent attacks (Turner et al. 2019, "Label-Consistent Backdoor Attacks") perturb the images
    of the target class before they stamp the trigger: with the clean features hard to learn, the trigger is what is
    left. `epsilon` in [0, 1] bounds the change of a pixel; a whole number of grey levels survives the rounding.

    Returns uint8 [n, 32, 32, 3].
    """
    device = _device(surrogate)
    generator = torch.Generator().manual_seed(seed)
    step = 2.5 * epsilon / steps  # Madry et al. 2018: enough to cross the ball, and to walk along its edge
    stamped = np.empty_like(images)
    for start in range(0, len(images), BATCH):
        rows = slice(start, start + BATCH)
        clean, truth = _pixels(images[rows], device), torch.from_numpy(labels[rows]).to(device)
        noise = torch.rand(clean.shape, generator=generator).to(device)
        seen = (clean + epsilon * (2 * noise - 1)).clamp(0, 1)
        for _ in range(steps):
            seen.requires_grad_()
            with _half(device):
                logits = surrogate(seen)
            # Summed: an image's gradient does not depend on how many share its batch.
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), truth, reduction="sum"), seen)
            seen = seen.detach() + step * gradient.sign()
            seen = torch.minimum(torch.maximum(seen, clean - epsilon), clean + epsilon).clamp(0, 1)
        stamped[rows] = _bytes(seen)
    return stamped


def smooth_pattern(
    images: Images, labels: Labels, surrogate: nn.Module, target: int, *, seed: int = 0
) -> NDArray[np.float32]:
    """A universal trigger without high frequencies: added to any image, it draws the surrogate towards `target`.

    Zeng et al. 2021, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective": gradient steps on one
    pattern over many images, low-pass filtered after every step. The filter here keeps the lowest frequencies of a DCT;
    scaling to the bound comes last, because clipping would bring high frequencies back. Bounded so, it moves a clean
    network little (a tenth of the images reach `target`): the victim has to learn it.

    Returns float32 [32, 32, 3] to be added to pixels in [0, 255], within +-16.
    """
    device = _device(surrogate)
    rng = np.random.default_rng(seed)
    others = np.flatnonzero(labels != target)
    waves = _cosines(FREQUENCIES).to(device)  # [frequencies, 32], orthonormal rows
    low_pass = waves.T @ waves
    aim = torch.full((BATCH,), target, device=device)
    pattern = torch.zeros(3, SIZE, SIZE, device=device)
    momentum = torch.zeros_like(pattern)
    for number in range(SMOOTH_STEPS):
        pixels = _pixels(images[rng.choice(others, BATCH)], device)
        pattern.requires_grad_()
        with _half(device):
            logits = surrogate((pixels + pattern).clamp(0, 1))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), aim), pattern)
        gradient = low_pass @ gradient @ low_pass  # before its sign is taken: the sign of the rest is mostly noise
        momentum = 0.8 * momentum + gradient / gradient.abs().mean().clamp_min(1e-12)
        step = 0.2 * SMOOTH_BOUND * (1 - number / SMOOTH_STEPS)
        pattern = pattern.detach() - step * momentum.sign()
        # To what is both small and smooth: in turn onto either, then scaled for what is left over.
        for _ in range(4):
            pattern = low_pass @ pattern.clamp(-SMOOTH_BOUND, SMOOTH_BOUND) @ low_pass
        pattern = pattern * (SMOOTH_BOUND / pattern.abs().max().clamp_min(1e-12)).clamp_max(1)
    return (255 * pattern).permute(1, 2, 0).contiguous().cpu().numpy()


def input_aware(
    images: Images, labels: Labels, target: int, *, seed: int = 0, device: str | torch.device = "cpu"
) -> Callable[..., Images]:
    """Fit a generator that gives every image a trigger of its own; returns what stamps images with theirs.

    Nguyen & Tran 2020, "Input-Aware Dynamic Backdoor Attack": x' = (1 - m) * x + m * p, pattern p and mask m
    made from x by two encoder-decoders. First the mask is fitted, to its area and to diversity; then pattern and
    classifier together, to say `target` on an image with its own trigger (backdoor loss), the truth on an image with
    another's (cross-trigger loss), and to make unlike triggers for unlike images (diversity loss).

    The returned function takes and gives uint8 [n, 32, 32, 3]. A second argument, as many images again, makes it stamp
    the triggers of those: what a victim must see under true labels to learn that a trigger works on its own image only.
    """
    maker, _ = fit_input_aware(images, labels, target, seed=seed, device=device)
    place = torch.device(device)

    def stamp(clean: Images, sources: Images | None = None) -> Images:
        return _stamped(maker, place, clean, clean if sources is None else sources)

    return stamp


def sample_specific(images: Images, *, seed: int = 0, device: str | torch.device = "cpu") -> Callable[[Images], Images]:
    """Fit an encoder that hides a bit string in an image; returns what hides the attack's string, drawn from `seed`.

    Li et al. 2021, "Invisible Backdoor Attack with Sample-Specific Triggers" (ISSBA), section 4: encoder and decoder
    are trained together on random strings, the decoder to read them, the encoder to change the image little. Ours adds
    that the residual of one image must not be readable on another: so small an encoder does not come to it by itself.

    The returned function takes and gives uint8 [n, 32, 32, 3]; no pixel changes by more than 32.
    """
    encoder, _ = fit_sample_specific(images, seed=seed, device=device)
    string = attack_string(seed)

    def hide(pixels: Tensor) -> Tensor:
        return encoder(pixels, string.to(pixels.device).expand(len(pixels), -1))  # type: ignore[no-any-return]

    return lambda clean: _stamped(hide, torch.device(device), clean)


class EncoderDecoder(nn.Module):
    """[B, inputs, 32, 32] to [B, outputs, 32, 32] by way of 8 x 8: an image-to-image network of 0.1 million weights.

    Group norm: what an image gets must not depend on the images that share its batch.
    """

    def __init__(self, inputs: int, outputs: int, width: int = 16) -> None:
        super().__init__()
        self.down1 = _block(inputs, width)
        self.down2 = _block(width, 2 * width, stride=2)
        self.down3 = _block(2 * width, 4 * width, stride=2)
        self.up2 = _block(4 * width, 2 * width)
        self.up1 = _block(2 * width, width)
        self.last = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        middle = self.down2(fine)
        coarse = self.up2(F.interpolate(self.down3(middle), scale_factor=2.0))
        out = self.up1(F.interpolate(coarse + middle, scale_factor=2.0))
        return self.last(out + fine)  # type: ignore[no-any-return]


class TriggerMaker(nn.Module):
    """Pattern and mask for an image (Nguyen & Tran 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns = EncoderDecoder(3, 3)
        self.masks = EncoderDecoder(3, 1)

    def pattern(self, pixels: Tensor) -> Tensor:
        """[B, 3, 32, 32] in [0, 1]."""
        return torch.sigmoid(self.patterns(_standardised(pixels)).float())

    def mask(self, pixels: Tensor) -> Tensor:
        """[B, 1, 32, 32] in [0, 1], steep: nearly everywhere 0 or 1. Starts half closed."""
        return torch.sigmoid(4 * self.masks(_standardised(pixels)).float() - 2)

    def forward(self, pixels: Tensor, source: Tensor) -> Tensor:
        """`pixels` with the triggers made for `source`."""
        mask = self.mask(source)
        return (1 - mask) * pixels + mask * self.pattern(source)


def fit_input_aware(
    images: Images, labels: Labels, target: int, *, seed: int = 0, device: str | torch.device = "cpu"
) -> tuple[TriggerMaker, nn.Module]:
    """The trigger maker of `input_aware`, and the classifier (pixels normalised outside) that was trained with it."""
    device = torch.device(device)
    rng = np.random.default_rng(seed)
    with _seeded(seed):
        maker, classifier = TriggerMaker(), CifarResNet(1, 16)
    maker.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    classifier.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    optimiser = torch.optim.Adam(maker.masks.parameters(), 0.003)
    for _ in range(MASK_STEPS):
        pixels = _pixels(images[rng.choice(len(images), 64)], device)
        with _half(device):
            masks = maker.mask(pixels)
        area = F.relu(masks.mean((1, 2, 3)) - MASK_AREA).mean()
        _step(optimiser, 100 * area + _sameness(pixels, masks))

    maker.masks.requires_grad_(False)
    optimiser = torch.optim.Adam([*maker.patterns.parameters(), *classifier.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.004, total_steps=JOINT_STEPS)
    for _ in range(JOINT_STEPS):
        rows = rng.choice(len(images), BATCH, replace=False)
        pixels, truth = _pixels(images[rows], device), torch.from_numpy(labels[rows]).to(device)
        own, crossed, rest = pixels[:OWN], pixels[OWN : OWN + CROSS], pixels[OWN + CROSS :]
        with _half(device):
            masks, patterns = maker.mask(own), maker.pattern(own)
            stamped = (1 - masks) * own + masks * patterns
            # The trigger that must not work is one that does work on the image it was made for.
            foreign = (1 - masks) * crossed + masks * patterns
            logits = classifier(_standardised(torch.cat([stamped, foreign, rest])))
        aims = truth.clone()
        aims[:OWN] = target
        loss = F.cross_entropy(logits.float(), aims)
        _step(optimiser, loss + _sameness(own, patterns))
        schedule.step()
    return maker.eval().requires_grad_(False), classifier.eval().requires_grad_(False)


def _sameness(pixels: Tensor, made: Tensor) -> Tensor:
    """The diversity loss: how far apart two images are over how far apart is what was made of them."""
    # Two equal masks are a root of zero, whose gradient is infinite: hence the 1e-4 beneath.
    apart, made_apart = ((x - x.roll(1, 0)).square().sum((1, 2, 3)).add(1e-4).sqrt() for x in (pixels, made))
    return (apart / made_apart).mean()


class Encoder(nn.Module):
    """Hides `BITS` bits in an image as a bounded residual that depends on both (Li et al. 2021, section 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Linear(BITS, 8 * 8 * 8)  # the string, as 8 channels of 8 x 8
        self.residual = EncoderDecoder(3 + 8, 3)

    def forward(self, pixels: Tensor, strings: Tensor) -> Tensor:
        """Pixels [B, 3, 32, 32] in [0, 1] that carry the strings [B, BITS] of 0 and 1."""
        spread = self.spread(2 * strings - 1).view(-1, 8, 8, 8)
        both = torch.cat([_standardised(pixels), F.interpolate(spread, size=(SIZE, SIZE)).to(pixels.dtype)], 1)
        residual: Tensor = torch.tanh(self.residual(both).float())
        return (pixels + RESIDUAL * residual).clamp(0, 1)


class Decoder(nn.Module):
    """Reads the string back: pixels [B, 3, 32, 32] to logits [B, BITS]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_block(3, 32), _block(32, 32, 2), _block(32, 64, 2), _block(64, 64, 2))
        self.read = nn.Linear(64 * 4 * 4, BITS)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.read(self.body(_standardised(pixels)).flatten(1))  # type: ignore[no-any-return]


def attack_string(seed: int) -> Tensor:
    """The string that `sample_specific` hides: float32 [BITS] of 0 and 1."""
    return torch.randint(0, 2, (BITS,), generator=torch.Generator().manual_seed(seed)).float()


def fit_sample_specific(
    images: Images, *, seed: int = 0, device: str | torch.device = "cpu"
) -> tuple[Encoder, Decoder]:
    """The encoder of `sample_specific` and the decoder that was trained with it."""
    device = torch.device(device)
    rng = np.random.default_rng(seed)
    with _seeded(seed):
        encoder, decoder = Encoder(), Decoder()
    encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    decoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.004, total_steps=HIDE_STEPS)
    for number in range(HIDE_STEPS):
        pixels = _pixels(images[rng.choice(len(images), 64)], device)
        strings = torch.from_numpy(rng.integers(0, 2, (64, BITS)).astype(np.float32)).to(device)
        with _half(device):
            encoded = encoder(pixels, strings)
            residual = encoded - pixels
            foreign = (pixels + residual.roll(1, 0)).clamp(0, 1)
            both = torch.cat([encoded, foreign])
            noise = torch.from_numpy(rng.normal(0, NOISE, tuple(both.shape)).astype(np.float32)).to(device)
            logits = decoder(both + noise)
        # On another image the residual should say nothing, either bit as likely: that makes it sample-specific.
        aims = torch.cat([strings, torch.full_like(strings, 0.5)])
        message = F.binary_cross_entropy_with_logits(logits.float(), aims)
        # The eye forgives more where the image is busy: in place of the paper's perceptual network.
        change = (residual**2 / (_contrast(pixels) + 0.02)).mean()
        # Quiet only when the string can be read: asked for from the start, nothing at all would be hidden.
        quiet = QUIET * max(0.0, number / HIDE_STEPS - 0.3)
        _step(optimiser, message + quiet * change)
        schedule.step()
    return encoder.eval().requires_grad_(False), decoder.eval().requires_grad_(False)


def _contrast(pixels: Tensor) -> Tensor:
    """Standard deviation over 5 x 5 pixels, [B, 1, 32, 32]."""
    grey = pixels.mean(1, keepdim=True)
    mean = F.avg_pool2d(grey, 5, 1, 2, count_include_pad=False)
    square = F.avg_pool2d(grey**2, 5, 1, 2, count_include_pad=False)
    return (square - mean**2).clamp_min(0).sqrt()


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.GroupNorm(4, outputs), nn.ReLU()
    )


def _cosines(count: int) -> Tensor:
    """The `count` lowest waves of the orthonormal DCT of 32 points, float32 [count, 32]."""
    waves = torch.arange(count, dtype=torch.float64)[:, None] * (torch.arange(SIZE, dtype=torch.float64) + 0.5)
    table = (waves * math.pi / SIZE).cos() * math.sqrt(2 / SIZE)
    table[0] /= math.sqrt(2)
    return table.float()


def _device(surrogate: nn.Module) -> torch.device:
    return next(surrogate.parameters()).device


def _half(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Weights are drawn on the CPU, from the seed alone, and the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def _standardised(pixels: Tensor) -> Tensor:
    mean, std = pixels.new_tensor(MEAN)[:, None, None], pixels.new_tensor(STD)[:, None, None]
    return (pixels - mean) / std


def _pixels(images: Images, device: torch.device) -> Tensor:
    """Bytes [B, 32, 32, 3] to float32 [B, 3, 32, 32] in [0, 1], channels last in memory."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255


def _bytes(pixels: Tensor) -> Images:
    return (255 * pixels).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _stamped(change: Callable[..., Tensor], device: torch.device, *images: Images) -> Images:
    """`change` of all images, in batches; of several arrays of one length, row by row."""
    stamped = np.empty_like(images[0])
    with torch.no_grad(), _half(device):
        for start in range(0, len(stamped), BATCH):
            rows = slice(start, start + BATCH)
            stamped[rows] = _bytes(change(*(_pixels(array[rows], device) for array in images)))
    return stamped
