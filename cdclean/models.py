"""Models: from what `--model` and `--arch` say to a network that takes pixels and can be asked.

What a network must be shown (image size, mean, std, crop) is what the user says, else what the checkpoint says, else
what timm says. It is never guessed: a wrongly normalised image gets a score that looks like any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from cdclean import checkpoints, config, networks
from cdclean.answers import first_tensor
from cdclean.checkpoints import Metadata, first_line
from cdclean.config import Geometry, ModelSpec
from cdclean.errors import ModelError, UsageError
from cdclean.networks import Network
from cdclean.repetition import Repetition


@dataclass(frozen=True)
class Classifier:
    """A network ready to be asked, and what a run records of it."""

    module: nn.Module  # pixels [B, C, H, W] in [0, 1], float -> the network's raw output; frozen, in evaluation mode
    geometry: Geometry
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]; applied inside `module`
    std: tuple[float, ...]
    classes: int  # 0: no classifier; 2 where one output says yes or no
    class_names: tuple[str, ...] | None  # in the order of the outputs; no before yes
    architecture: str  # timm:NAME, package.module:factory, or the form of a file that brings its own
    weights: str  # as `checkpoints.identity` gives it
    repetition: Repetition = field(default_factory=Repetition, compare=False)  # of its distillation, on a GPU

    def describe(self) -> dict[str, Any]:
        """The model as run.json holds it, in plain JSON types."""
        return {
            "architecture": self.architecture,
            "weights": self.weights,
            "geometry": config.to_dict(self.geometry),
            "mean": list(self.mean),
            "std": list(self.std),
            "classes": self.classes,
            "class_names": None if self.class_names is None else list(self.class_names),
        }


class Normalized(nn.Module):
    """`network` behind the normalisation it was trained with, so that whoever calls it works in pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Any:
        return self.network((pixels - self.mean) / self.std)


def load(spec: ModelSpec) -> Classifier:
    """The model that `spec` means, on the CPU, in float32.

    Raises ModelError for whatever cannot be found, read, built, filled with its weights or asked; UsageError for
    settings outside their range or at odds with the network.
    """
    kind, name = checkpoints.split_source(spec.source)
    if kind == "file":
        path = checkpoints.find(name)
        found = checkpoints.read(path, trust=spec.trust_checkpoint)
        metadata = found.metadata
        if isinstance(found.content, nn.Module):
            network = networks.complete(found.content, found.form, spec)
        else:
            network = networks.filled(path, found.content, metadata, spec)
    else:
        metadata = Metadata()
        network = networks.published(kind, name, spec)
    geometry, mean, std = _preprocessing(spec, metadata, network)
    module = Normalized(network.module, mean, std).float().eval().requires_grad_(False)
    width = _try(module, geometry, spec.source)
    classes = 0 if network.headless else 2 if width == 1 else width
    return Classifier(
        module=module,
        geometry=geometry,
        mean=mean,
        std=std,
        classes=classes,
        class_names=_class_names(spec.source, metadata, network, classes),
        architecture=network.architecture,
        weights=checkpoints.identity(spec),
    )


def _preprocessing(
    spec: ModelSpec, metadata: Metadata, network: Network
) -> tuple[Geometry, tuple[float, ...], tuple[float, ...]]:
    """Geometry, mean and std: as the user says, else as the checkpoint does, else as timm does."""
    given = {
        "input_size": spec.input_size or metadata.input_size,
        "mean": spec.mean or metadata.mean,
        "std": spec.std or metadata.std,
        "crop_pct": metadata.crop_pct if spec.crop is None else spec.crop,
        "crop_mode": spec.resize or metadata.crop_mode,
        "interpolation": metadata.interpolation,
    }
    given = {name: value for name, value in given.items() if value is not None}
    known = {"crop_pct": 1.0, **network.described, **given}
    channels = network.channels or metadata.in_chans or len(known.get("mean") or ()) or 3
    missing = [name for name in ("input_size", "mean", "std") if not known.get(name)]
    if missing:
        options = " ".join("--" + name.replace("_", "-") for name in missing)
        zeros, ones = ",".join("0" * channels), ",".join("1" * channels)
        raise ModelError(
            f"nothing says what images {network.architecture} takes ({options} missing), and a guess would score "
            "wrongly without a sign of it",
            hint="Say what it was trained with; for images of 32 pixels that were not normalised: "
            f"--input-size 32 --mean {zeros} --std {ones}",
        )
    known["input_size"] = (channels, *known["input_size"][-2:])
    if channels == 1:  # timm's numbers are for colour; a grey copy of the network was trained with their average
        known |= {name: (math.fsum(known[name]) / len(known[name]),) for name in ("mean", "std") if name not in given}
    resolved = resolve_data_config({}, pretrained_cfg=known)  # type: ignore[no-untyped-call]
    mean, std = (_per_channel(name, resolved[name], channels, spec) for name in ("mean", "std"))
    for name, values, limit in (("mean", mean, 1), ("std", std, 10)):
        if max(values) > limit:
            error = UsageError if getattr(spec, name) else ModelError
            raise error(
                f"{name} is that of pixels in [0, 1], and not {', '.join(map(str, values))}",
                hint=f"Divide it by 255: --{name} {','.join(f'{value / 255:.4g}' for value in values)}",
            )
    if min(std) <= 0:
        raise UsageError(f"std must be above 0 in every channel, not {', '.join(map(str, std))}")
    height, width = (int(side) for side in known["input_size"][1:])
    crop = float(known["crop_pct"])
    if min(height, width) < 1 or not 0 < crop <= 1:
        raise UsageError(f"input size {height}x{width} and crop {crop} must be above 0, and crop at most 1")
    return Geometry(channels, height, width, resolved["interpolation"], crop, resolved["crop_mode"]), mean, std


def _per_channel(name: str, values: Any, channels: int, spec: ModelSpec) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) == 1:
        numbers *= channels
    if len(numbers) != channels or not all(map(math.isfinite, numbers)):
        error = UsageError if getattr(spec, name) else ModelError
        raise error(
            f"{name} has the values {', '.join(map(str, numbers))}, but the network takes {channels} channels",
            hint=f"Give one number, or one a channel: --{name} {','.join(['0.5'] * channels)}",
        )
    return numbers


def _class_names(source: str, metadata: Metadata, network: Network, classes: int) -> tuple[str, ...] | None:
    if metadata.class_names is not None and len(metadata.class_names) != classes:
        raise ModelError(f"{source} names {len(metadata.class_names)} classes, but its network has {classes}")
    labels = network.described.get("label_names")
    if metadata.class_names is None and isinstance(labels, list | tuple) and len(labels) == classes:
        return tuple(map(str, labels))
    return metadata.class_names


@torch.no_grad()
def _try(module: nn.Module, geometry: Geometry, source: str) -> int:
    """Ask the model once; gives the width of its output, 0 if that is not one row of numbers an image.

    Raises ModelError if it fails, answers with numbers that are not finite, or lets an image's neighbour in the batch
    (or chance) into its answer, as programs exported in training mode do.
    """
    shape = (geometry.channels, geometry.height, geometry.width)
    image, other = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
    size = "x".join(map(str, shape))
    try:
        answer, again = (first_tensor(module(torch.stack([image, second]))) for second in (other, image))
    except ModelError:
        raise
    except Exception as error:  # the network's own code
        raise ModelError(
            f"{source} fails on an image of {size} (channels, height, width): {type(error).__name__}: "
            f"{first_line(error)}",
            hint="Give the image size it was trained at: --input-size HEIGHT (or HEIGHTxWIDTH)",
        ) from error
    if answer.ndim < 2 or len(answer) != 2:
        raise ModelError(f"{source} answers two images with a tensor of shape {list(answer.shape)}, not [2, ...]")
    if not answer.isfinite().all():
        raise ModelError(f"{source} answers with numbers that are not finite: its weights are unusable")
    if not torch.allclose(answer[0], again[0], rtol=0, atol=0.01 * float(answer.abs().max())):
        raise ModelError(
            f"{source} answers differently to one image, depending on its neighbours in the batch or on chance",
            hint="It was probably exported in training mode: call model.eval() before exporting.",
        )
    return answer.shape[1] if answer.ndim == 2 else 0
