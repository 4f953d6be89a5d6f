"""A probe network for data that no model was trained on: any timm network, fitted on an ImageFolder.

A model can only betray a trigger that it has learned. So the network learns from every image (none is held out, and
all are scored alike afterwards) and sees every image whole: squashed to the input size, nothing cropped away.

Resuming needs no saved random state: order, augmentation and dropout of an epoch are drawn from a seed of its own.
"""

from __future__ import annotations

import io
import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from torch import Tensor

from cdclean import checkpoints, config, datasets, models, networks, storage
from cdclean.config import Augment, Geometry, ModelSpec, Optimizer, TrainPrecision
from cdclean.console import Console, duration
from cdclean.devices import computes_in_bf16, resolve_device
from cdclean.errors import ChangedRunError, DatasetError, ModelError, OutputError, UsageError
from cdclean.examples import CACHE_BYTES, Examples, Loader, flip_crop, list_examples
from cdclean.models import Classifier, Normalized
from cdclean.summary import AGREEMENT

# Peak of the one-cycle schedule and decoupled or L2 weight decay; biases and norms are not decayed.
_LEARNING_RATE: dict[str, float] = {"adamw": 3e-3, "sgd": 0.1}
_WEIGHT_DECAY: dict[str, float] = {"adamw": 0.05, "sgd": 5e-4}


@dataclass(frozen=True)
class TrainConfig:
    """One training. Everything that is None has a default that depends on the optimizer, the network or the machine."""

    dataset: str
    arch: str  # timm:NAME
    out: str = "probe.pt"
    epochs: int = 12
    batch_size: int = 128
    optimizer: Optimizer = "adamw"
    learning_rate: float | None = None  # at the peak of the schedule; None: 0.003 for AdamW, 0.1 for SGD
    weight_decay: float | None = None  # None: 0.05 for AdamW, 0.0005 for SGD
    augment: Augment = "none"
    pretrained: str | None = None  # checkpoint of the same architecture to start from; its head may be another
    input_size: tuple[int, int] | None = None  # height, width in pixels
    mean: tuple[float, ...] | None = None  # per channel, of pixels in [0, 1]
    std: tuple[float, ...] | None = None
    device: str = "auto"
    precision: TrainPrecision = "auto"
    workers: int | None = None  # decoding threads
    seed: int = 0
    overwrite: bool = False  # replace `out`, and forget a training that was begun with other settings

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}")
        for name, choices in (("optimizer", Optimizer), ("augment", Augment), ("precision", TrainPrecision)):
            if getattr(self, name) not in get_args(choices):
                raise UsageError(f"{name} must be one of {', '.join(get_args(choices))}, not {getattr(self, name)!r}")
        for name, minimum, defaults in (("learning_rate", 1e-12, _LEARNING_RATE), ("weight_decay", 0, _WEIGHT_DECAY)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, defaults[self.optimizer])
            if not getattr(self, name) >= minimum:  # NaN neither
                raise UsageError(f"{name} must be at least {minimum:g}, not {getattr(self, name)}")
        if self.input_size is not None and min(self.input_size) < 1:
            raise UsageError(f"input_size must be a height and a width above 0, not {self.input_size}")
        if self.std is not None and min(self.std) <= 0:
            raise UsageError(f"std must be above 0 in every channel, not {self.std}")


@dataclass(frozen=True)
class Trained:
    """What came out of it."""

    path: Path  # the checkpoint, which `models.load` takes without an architecture
    accuracy: float  # on the training images: the share whose label the finished network predicts, in [0, 1]
    epochs: int
    seconds: float  # over all sittings
    images: int  # trained on
    unreadable: int  # left out
    classes: int


def train(settings: TrainConfig, console: Console | None = None) -> Trained:
    """Train a network on the classes of `settings.dataset`, or go on with a training that was stopped.

    One-cycle schedule, cross entropy. After every epoch the state is written to `<out>.partial`; the same command goes
    on from there and ends with bitwise the same weights, on one kind of device with one number of threads.

    Raises UsageError (2) for settings that do not fit, ChangedRunError (2) if the training was begun with others,
    DatasetError (3) for data with less than two classes or without a readable image, ModelError (3) for a network
    that cannot be built or started from, or whose loss is not a number, OutputError (3) if `out` is taken or cannot
    be written.
    """
    console = console or Console(quiet=True)
    dataset = datasets.open_dataset(settings.dataset)
    out = _place(settings, dataset)
    partial = out.with_name(f"{out.name}.partial")
    examples = list_examples(dataset, console)
    total, classes = len(examples.samples), len(examples.classes)
    device = resolve_device(settings.device)
    precision = _resolve_precision(settings.precision, device)
    with _seeded(device):
        torch.manual_seed(settings.seed)
        start = _build(settings, tuple(examples.classes), console)
        fit = _Fit(start, settings, -(-total // settings.batch_size), device, precision)
        asked = _asked(settings, examples, start.geometry, device, precision)
        epoch, seconds = _resume(partial, asked, fit, settings.overwrite, console)
        started = time.monotonic() - seconds
        console.say(
            f"training {settings.arch}, {start.geometry.width} x {start.geometry.height} px, on {total} images of "
            f"{classes} classes: {settings.epochs} epochs, {precision} on {device}"
        )
        with (
            ThreadPoolExecutor(settings.workers or min(8, os.cpu_count() or 1)) as pool,
            console.progress("training", settings.epochs * total, epoch * total) as advance,
        ):
            loader = Loader(examples, start.geometry, start.mean, pool, CACHE_BYTES)
            for number in range(epoch, settings.epochs):
                _run_epoch(fit, loader, settings, number, advance, console)
                _save_partial(partial, asked, fit, number + 1, time.monotonic() - started)
            accuracy, count = _accuracy(fit, loader, settings.batch_size)
    _save(out, start)
    partial.unlink(missing_ok=True)
    if accuracy < AGREEMENT:  # a scan would warn of the model
        console.warn(
            f"the network gives {accuracy:.0%} of its training images their label: too little for a scan to say much. "
            "More --epochs, another --arch or --pretrained weights may help."
        )
    seconds = time.monotonic() - started
    return Trained(out, accuracy, settings.epochs, seconds, count, len(loader.unreadable), classes)


# --- The network ---


def _build(settings: TrainConfig, names: tuple[str, ...], console: Console) -> Classifier:
    """A classifier of the classes `names`, on the CPU, with weights as they are at the start."""
    name = settings.arch.removeprefix("timm:")
    described = networks.require_timm(name)
    if settings.pretrained is None:
        channels, *own_size = described["input_size"]
        size = settings.input_size or tuple(own_size)
        arguments: dict[str, Any] = {"img_size": size} if described.get("fixed_input_size") else {}
        network = _attempt(lambda: timm.create_model(name, num_classes=len(names), **arguments), settings.arch)
        mean, std = (_per_channel(settings, field, described, channels) for field in ("mean", "std"))
        geometry = Geometry(channels, size[0], size[1], described.get("interpolation", "bicubic"), 1.0, "squash")
        start = Classifier(Normalized(network, mean, std), geometry, mean, std, len(names), names, f"timm:{name}", "")
    else:
        start = _pretrained(settings, f"timm:{name}", names, console)
    shape = (start.geometry.channels, start.geometry.height, start.geometry.width)
    with torch.no_grad():
        answer = _attempt(lambda: start.module.eval()(torch.zeros(1, *shape)), f"{settings.arch} on {shape}")
    if not isinstance(answer, Tensor) or answer.shape != (1, len(names)):
        raise ModelError(f"{settings.arch} does not classify, so it cannot learn classes", hint="Take another --arch.")
    return start


def _pretrained(settings: TrainConfig, arch: str, names: tuple[str, ...], console: Console) -> Classifier:
    path = cast(str, settings.pretrained)
    spec = ModelSpec(path, arch, settings.input_size, settings.mean, settings.std, crop=1.0, resize="squash")
    start = models.load(spec)
    start.module.requires_grad_(True)
    if start.classes != len(names):
        cast(Any, start.module).network.reset_classifier(len(names))
        console.say(f"{path} has {start.classes} classes, the dataset {len(names)}: its head is replaced by a new one")
    return replace(start, classes=len(names), class_names=names)


def _per_channel(settings: TrainConfig, field: str, described: dict[str, Any], channels: int) -> tuple[float, ...]:
    values = tuple(getattr(settings, field) or described[field])
    values *= channels if len(values) == 1 else 1
    if len(values) != channels:
        raise UsageError(f"{field} has {len(values)} values, but {settings.arch} takes {channels} channels")
    return values


def _attempt(make: Callable[[], Any], what: str) -> Any:
    try:
        return make()
    except Exception as error:  # timm's networks each have errors of their own
        raise ModelError(
            f"{what} fails with {type(error).__name__}: {checkpoints.first_line(error)}",
            hint="Give an image size that the network takes: --input-size HEIGHT (or HEIGHTxWIDTH)",
        ) from error


# --- Fitting ---


class _Fit:
    """What changes while a network is fitted, and how to save it."""

    def __init__(self, start: Classifier, settings: TrainConfig, steps: int, device: str, precision: str) -> None:
        self.module = start.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device, self.precision = device, precision
        rate, decay = cast(float, settings.learning_rate), cast(float, settings.weight_decay)
        self.optimizer: torch.optim.Optimizer = create_optimizer_v2(
            self.module.network, opt=settings.optimizer, lr=rate, weight_decay=decay, momentum=0.9
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=rate, total_steps=settings.epochs * steps
        )

    def answer(self, pixels: Tensor) -> Tensor:
        """Logits, float32 [B, classes], of uint8 `pixels` [B, C, H, W] on the device."""
        shown = (pixels.float() / 255).contiguous(memory_format=torch.channels_last)
        kind = self.device.split(":")[0]
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            logits: Tensor = self.module(shown)
        return logits.float()

    def _parts(self) -> dict[str, Any]:
        return {"network": self.module.network, "optimizer": self.optimizer, "schedule": self.schedule}

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


def _run_epoch(
    fit: _Fit, loader: Loader, settings: TrainConfig, epoch: int, advance: Callable[[int], object], console: Console
) -> None:
    """One pass over the data in a new order. Raises DatasetError or ModelError if there is nothing to go on with."""
    torch.manual_seed(settings.seed + (epoch + 1) * 1_000_003)  # an epoch's draws depend on nothing before it
    started = time.monotonic()
    total = len(loader.examples.samples)
    order = torch.randperm(total).tensor_split(-(-total // settings.batch_size))  # of even size: no tiny last batch
    loss_sum = torch.zeros((), device=fit.device)
    correct = torch.zeros((), dtype=torch.int64, device=fit.device)
    seen: set[int] = set()
    count = 0
    fit.module.train()
    for indices, (pixels, labels) in zip(order, loader.batches(order), strict=True):
        if len(labels) > 1:  # one image alone cannot be normalised by its batch
            seen.update(labels.tolist())
            pixels, labels = pixels.to(fit.device), labels.to(fit.device)
            logits = fit.answer(flip_crop(pixels) if settings.augment == "flip-crop" else pixels)
            loss = F.cross_entropy(logits, labels)
            fit.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            fit.optimizer.step()
            fit.schedule.step()
            loss_sum += loss.detach() * len(labels)
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
        advance(len(indices))
    if epoch == 0 and loader.unreadable:
        first = loader.unreadable[min(loader.unreadable)]
        console.warn(f"{len(loader.unreadable)} of {total} images cannot be read and are left out, such as {first}")
    if len(seen) < 2:
        raise DatasetError(
            f"only {len(seen)} of the classes in {settings.dataset} have images that can be read",
            hint="The warnings above name the first that could not be read, and why.",
        )
    if not loss_sum.isfinite():
        raise ModelError(
            f"the loss is not a number any more in epoch {epoch + 1}: the training has diverged",
            hint=f"Take a smaller --learning-rate than {settings.learning_rate:g}, and --overwrite to start anew.",
        )
    console.say(
        f"epoch {epoch + 1}/{settings.epochs}: loss {float(loss_sum) / count:.4f}, "
        f"accuracy {float(correct) / count:.1%}, {duration(time.monotonic() - started)}"
    )


@torch.no_grad()
def _accuracy(fit: _Fit, loader: Loader, batch_size: int) -> tuple[float, int]:
    """The share of the readable images whose label the network predicts, and their number."""
    fit.module.eval()
    correct = count = 0
    total = len(loader.examples.samples)
    for pixels, labels in loader.batches(torch.arange(total).tensor_split(-(-total // batch_size))):
        if len(labels):
            correct += int((fit.answer(pixels.to(fit.device)).argmax(1).cpu() == labels).sum())
            count += len(labels)
    return correct / count, count


@contextmanager
def _seeded(device: str) -> Iterator[None]:
    """Leave the caller's random state as it was; inside, cuDNN repeats itself."""
    indices = [torch.device(device).index or 0] if device.startswith("cuda") else []
    with torch.random.fork_rng(indices), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


def _resolve_precision(precision: str, device: str) -> str:
    """`auto` is bf16 where the hardware computes in it, which takes down training time by a third or more."""
    if precision != "auto":
        return precision
    return "bf16" if computes_in_bf16(device.split(":")[0]) else "fp32"


# --- Files ---


def _place(settings: TrainConfig, dataset: datasets.Dataset) -> Path:
    """Where the checkpoint goes, its folder made. Raises UsageError inside the dataset, OutputError if it is taken."""
    out = storage.local_path(settings.out)
    shown = storage.to_text(out)
    if isinstance(dataset.root, Path) and out.resolve().is_relative_to(dataset.root.resolve()):
        raise UsageError(f"{shown} would lie inside the dataset, which is never written to", hint="Name another --out.")
    if out.is_dir():
        raise OutputError(f"{shown} is a folder", hint="Name the file: --out probe.pt")
    if out.exists() and not settings.overwrite:
        raise OutputError(f"{shown} is there already", hint="Use it, name another with --out, or add --overwrite.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {storage.to_text(out.parent)}: {error.strerror}") from error
    return out


def _asked(settings: TrainConfig, examples: Examples, shown: Geometry, device: str, precision: str) -> dict[str, Any]:
    """All that the finished weights depend on."""
    asked = config.to_dict(settings)
    for name in ("out", "overwrite", "workers"):
        del asked[name]
    if settings.pretrained is not None:
        asked["pretrained"] = checkpoints.identity(ModelSpec(settings.pretrained))
    asked["dataset"] = {"samples": len(examples.samples), "digest": examples.digest}
    asked |= {"device": device.split(":")[0], "precision": precision, "geometry": config.to_dict(shown)}
    return asked


def _resume(partial: Path, asked: dict[str, Any], fit: _Fit, overwrite: bool, console: Console) -> tuple[int, float]:
    """Epochs done and seconds spent: of the training that `partial` holds, else of one that begins here.

    With `overwrite` too a training with the same settings is gone on with: it ends with the same weights.
    """
    shown = storage.to_text(partial)
    if not partial.exists():
        _save_partial(partial, asked, fit, 0, 0.0)  # a place that cannot be written to shows before the work
        return 0, 0.0
    try:
        saved = torch.load(partial, map_location="cpu", weights_only=True)
        lines = config.difference(saved["config"], asked)
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        lines = [f"it cannot be read: {checkpoints.first_line(error)}"]
    if lines and not overwrite:
        raise ChangedRunError(
            f"{shown} holds a training that was begun with something else:\n  " + "\n  ".join(lines),
            hint="Name another file with --out, or start anew with --overwrite.",
        )
    if lines:
        _save_partial(partial, asked, fit, 0, 0.0)
        return 0, 0.0
    try:
        fit.restore(saved)
    except (RuntimeError, KeyError, ValueError) as error:  # the settings are the same: so torch or timm is not
        reason = checkpoints.first_line(error)
        raise OutputError(f"{shown} does not fit this version: {reason}", hint="Delete it to start anew.") from error
    console.say(f"going on after epoch {saved['epoch']}, from {shown}")
    return int(saved["epoch"]), float(saved["seconds"])


def _save_partial(partial: Path, asked: dict[str, Any], fit: _Fit, epoch: int, seconds: float) -> None:
    buffer = io.BytesIO()  # torch's own writer can abort the process on a full disk
    torch.save({"config": asked, "epoch": epoch, "seconds": seconds, **fit.state()}, buffer)
    with storage.atomic_write(partial) as file:
        file.write(buffer.getbuffer())


def _save(out: Path, trained: Classifier) -> None:
    geometry = trained.geometry
    metadata = checkpoints.Metadata(
        arch=trained.architecture,
        class_names=trained.class_names,
        input_size=(geometry.height, geometry.width),
        in_chans=geometry.channels,
        mean=trained.mean,
        std=trained.std,
        crop_pct=geometry.crop_pct,
        crop_mode=geometry.crop_mode,
        interpolation=geometry.interpolation,
    )
    checkpoints.save_checkpoint(out, cast(Any, trained.module).network.state_dict(), metadata)
