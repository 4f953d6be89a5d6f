"""Networks: an architecture filled with weights, one that came whole out of its file, or one that timm publishes.

Class count and input channels are taken from the weights. Weights must fit to the last tensor: nothing is left at
random, nothing is dropped, nothing is resized.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import timm
import torch
from torch import Tensor, nn

from cdclean import checkpoints
from cdclean.answers import first_tensor
from cdclean.checkpoints import Form, Metadata, first_line
from cdclean.config import ModelSpec
from cdclean.errors import ModelError, UsageError
from cdclean.storage import to_text as shown

_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning


@dataclass(frozen=True)
class Network:
    """A network with its weights, and what it says of itself."""

    module: nn.Module
    architecture: str  # timm:NAME, package.module:factory or class, TorchScript, torch.export
    described: Mapping[str, Any]  # timm's `pretrained_cfg`: input size, mean, std, ...; empty where nobody says
    channels: int | None = None
    headless: bool = False


# --- The three ways to a network ---


def published(kind: str, name: str, spec: ModelSpec) -> Network:
    """A network that timm finds and fills with weights itself; `kind` is timm, hf-hub or local-dir. Raises ModelError.

    A network with position embeddings is taken at its own image size only: interpolated ones are another network's.
    """
    if spec.arch is not None:
        raise UsageError(f"--arch {spec.arch} is for checkpoint files; {spec.source} says what it is")
    if kind == "timm":
        require_timm(name)
    try:
        network: Any = timm.create_model(name if kind == "timm" else f"{kind}:{name}", pretrained=True)
    except Exception as error:  # network, disk, hub and torch each have errors of their own
        where = "Check the folder" if kind == "local-dir" else "Check the name and the connection"
        raise ModelError(
            f"{spec.source} could not be loaded: {first_line(error)}",
            hint=f"{where}, or give a checkpoint file: --model FILE --arch timm:NAME",
        ) from error
    described = dict(network.pretrained_cfg)
    architecture = name if kind == "timm" else described["architecture"]
    channels = getattr(network, "in_chans", None) or described["input_size"][0]
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)  # of the position embeddings
    if isinstance(size, tuple):
        described["input_size"] = (channels, *size)
        if spec.input_size not in (None, size):
            asked, own = ("x".join(map(str, sides)) for sides in (spec.input_size, size))
            raise ModelError(
                f"{spec.source} has position embeddings for images of {own}; at {asked} they would have to be invented",
                hint="Leave out --input-size, or give a checkpoint that was trained at that size.",
            )
    return Network(network, f"timm:{architecture}", described, channels, network.num_classes == 0)


def complete(module: nn.Module, form: Form, spec: ModelSpec) -> Network:
    """A network that came whole out of its file. Raises UsageError if `spec` names an architecture all the same."""
    if spec.arch is not None:
        raise UsageError(f"{spec.source} holds a whole network, so that --arch {spec.arch} has nothing to say")
    if form == "TorchScript":
        return Network(module, form, {}, _channels(module))
    if form == "torch.export":
        return _exported(module, spec.source)
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    kind = type(module)
    return Network(module, f"{kind.__module__}:{kind.__qualname__}", _own_words(module), _channels(module))


def filled(path: Path, state: dict[str, Tensor], metadata: Metadata, spec: ModelSpec) -> Network:
    """The architecture that the user, the checkpoint or the file's name says, filled with `state`.

    Raises ModelError if nobody says, if it cannot be built, and if the weights do not fit it.
    """
    named = spec.arch or metadata.arch or _timm_stem(path)
    if named is None:
        raise ModelError(
            f"{shown(path)} holds weights, but neither it nor its name says of which architecture",
            hint="Say it: --arch timm:NAME, or --arch package.module:factory for a network that is not timm's.",
        )
    name = named.removeprefix("timm:")
    if spec.arch is None and not timm.is_model(name):  # importing what a file names would run code of its choice
        raise ModelError(
            f"{shown(path)} says that its architecture is {named}, which timm does not have; nothing was imported",
            hint="If you have the code: --arch package.module:factory",
        )
    if ":" in name:
        return _factory_network(name, path, state)
    return _timm_network(name, path, state, spec.input_size or metadata.input_size)


def _timm_network(name: str, path: Path, state: dict[str, Tensor], size: tuple[int, int] | None) -> Network:
    described = require_timm(name)
    state = _without_prefixes(state)
    arguments: dict[str, Any] = {"in_chans": described["input_size"][0]}
    heads = [f"{head}.weight" for head in _names(described.get("classifier"))]
    classes = next((state[head].shape[0] for head in heads if head in state and state[head].ndim), 0)
    if heads:
        arguments["num_classes"] = classes
    if size and described.get("fixed_input_size"):
        arguments["img_size"] = size  # a ViT's position embeddings are made for one size
    network = _build(lambda: timm.create_model(name, **arguments), f"timm:{name}", arguments)
    channels = _stem_channels(state, network, described)
    if channels != arguments["in_chans"]:
        arguments["in_chans"] = channels
        network = _build(lambda: timm.create_model(name, **arguments), f"timm:{name}", arguments)
    _fill(network, state, path, f"timm:{name}")
    return Network(network, f"timm:{name}", described, channels, headless=classes == 0)


def _stem_channels(state: dict[str, Tensor], network: nn.Module, described: Mapping[str, Any]) -> int:
    """The image channels that the weights were made for.

    As a ratio to the network built with timm's own count, because some stems first fold pixels into channels.
    """
    usual = int(described["input_size"][0])
    for name in _names(described.get("first_conv")):
        weight, built = state.get(f"{name}.weight"), getattr(network.get_submodule(name), "weight", None)
        if weight is not None and isinstance(built, Tensor) and weight.ndim == built.ndim > 1:
            channels, rest = divmod(usual * weight.shape[1], built.shape[1])
            return usual if rest or not channels else channels
    return usual


def _factory_network(name: str, path: Path, state: dict[str, Tensor]) -> Network:
    """A network that code of the user's makes. The weights' class count is passed on if it takes `num_classes`."""
    factory = _import(name)
    network = _build(factory, name, {})
    if not set(state) & set(network.state_dict()):
        state = _without_prefixes(state)
    classes = _other_class_count(state, network.state_dict())
    if classes is not None and _takes_num_classes(factory):
        network = _build(lambda: factory(num_classes=classes), name, {"num_classes": classes})
    _fill(network, state, path, name)
    return Network(network, name, _own_words(network), _channels(network))


def _takes_num_classes(factory: Callable[..., Any]) -> bool:
    parameters = inspect.signature(factory).parameters.values()
    return any(each.name == "num_classes" or each.kind is each.VAR_KEYWORD for each in parameters)


def _other_class_count(state: dict[str, Tensor], built: Mapping[str, Tensor]) -> int | None:
    """The class count of the weights, where that is all that sets them apart from the network as built.

    So it is when all tensors of another shape differ in their first dimension alone, by the same pair of numbers.
    """
    differing = [(state[name].shape, built[name].shape) for name in state.keys() & built.keys()]
    differing = [(ours, theirs) for ours, theirs in differing if ours != theirs]
    if not differing or any(not ours or ours[1:] != theirs[1:] for ours, theirs in differing):
        return None
    counts = {(ours[0], theirs[0]) for ours, theirs in differing}
    return next(iter(counts))[0] if len(counts) == 1 else None


def _import(name: str) -> Callable[..., Any]:
    """The callable that `package.module:factory` names, looked for in the current folder too."""
    module_name, _, attribute = name.partition(":")
    try:
        with checkpoints.current_folder_importable():
            factory: Any = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:  # whatever the user's module raises
        raise ModelError(
            f"--arch {name}: importing {module_name} failed with {type(error).__name__}: {first_line(error)}",
            hint="It is looked for in the current folder and among the installed packages.",
        ) from error
    if callable(factory):
        return factory  # type: ignore[no-any-return]
    raise ModelError(f"--arch {name}: {module_name} has no function or class {attribute!r}")


def _build(make: Callable[[], Any], name: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        with checkpoints.current_folder_importable():
            network = make()
    except Exception as error:  # a user's factory or one of timm's, each with errors of its own
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ModelError(f"{name}({given}) failed with {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"{name} returned a {type(network).__name__}, not a torch.nn.Module")
    return network


# --- Weights ---


def _fill(network: nn.Module, state: dict[str, Tensor], path: Path, architecture: str) -> None:
    """Load `state` into `network`, every tensor of both. Raises ModelError naming those that do not fit."""
    built = network.state_dict()
    counts = {name for name in built if name.endswith("num_batches_tracked")}  # no answer depends on these
    missing = list(built.keys() - state.keys() - counts)
    unexpected = list(state.keys() - built.keys())
    others = [name for name in state.keys() & built.keys() - counts if _kind(state[name]) != _kind(built[name])]
    shapes = [f"{name} ({_kind(state[name])} in the file, {_kind(built[name])} in the network)" for name in others]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    listed = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    if not listed:
        network.load_state_dict(state, strict=True)
        return
    hint = "Give the architecture that these weights were trained with: --arch timm:NAME or package.module:factory"
    if any("pos_embed" in name or "position" in name for name in others):
        hint = "They look trained at another image size. Give it: --input-size HEIGHT (or HEIGHTxWIDTH)"
    raise ModelError(f"{shown(path)} does not fit {architecture}. Keys {'; '.join(listed)}", hint=hint)


def _kind(tensor: object) -> str:
    """Shape, and dtype where it is not floating: quantised weights must not be taken for numbers."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return shape if tensor.is_floating_point() else f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without what wrappers put before every one of its keys."""
    for prefix in _PREFIXES * 2:  # they wrap each other in any order
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _channels(network: nn.Module) -> int | None:
    """Image channels of a network that is not timm's: what it says, else those of its first convolution."""
    said = getattr(network, "in_chans", None)
    if isinstance(said, int):
        return said
    weights = (value for value in network.state_dict().values() if isinstance(value, Tensor) and value.ndim == 4)
    return next((weight.shape[1] for weight in weights), None)


# --- Programs of torch.export ---


class _Exported(nn.Module):
    """An exported program for batches of any size, though it may have been exported for one."""

    def __init__(self, program: nn.Module, batch: int | None) -> None:
        super().__init__()
        self.program = program
        self.batch = batch
        self.training = False

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        return self  # a program stays in the mode it was exported in, and refuses to be asked

    def forward(self, images: Tensor) -> Tensor:
        if self.batch is None:
            return first_tensor(self.program(images))
        outputs = []
        for part in torch.split(images, self.batch):
            filling = part[-1:].expand(self.batch - len(part), *part.shape[1:])
            outputs.append(first_tensor(self.program(torch.cat([part, filling])))[: len(part)])
        return torch.cat(outputs)


def _exported(module: Any, source: str) -> Network:
    inputs = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].ndim != 4:
        raise ModelError(f"the program in {source} does not take one tensor [batch, channels, height, width]")
    batch, channels = inputs[0].shape[:2]
    fixed = batch if isinstance(batch, int) else None
    return Network(_Exported(module, fixed), "torch.export", {}, channels if isinstance(channels, int) else None)


# --- Names ---


def require_timm(name: str) -> dict[str, Any]:
    """What timm says of its network `name` (a tag may follow a dot). Raises ModelError that suggests near names."""
    if not timm.is_model(name):
        raise checkpoints.unknown(name, f"timm has no network {name!r}")
    try:
        described = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tagged = timm.list_models(f"{name.partition('.')[0]}.*", include_tags=True)
        raise ModelError(f"timm has no weights {name!r}", hint=f"It has: {', '.join(tagged[:8])}") from error
    if described is None:
        raise ModelError(
            f"timm's {name} says nothing of the images it takes", hint="Give --arch package.module:factory"
        )
    return dict(described.to_dict())  # type: ignore[no-untyped-call]


def _timm_stem(path: Path) -> str | None:
    """The timm network that a file is named after: resnet50.pt, resnet50.a1_in1k.safetensors, resnet50.best.pth.tar."""
    architecture = path.name.partition(".")[0]
    if not timm.is_model(architecture):
        return None
    return path.stem if path.stem in timm.list_models(f"{architecture}.*", include_tags=True) else architecture


def _names(value: Any) -> tuple[str, ...]:
    """timm gives one name, several, or none."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def _own_words(network: nn.Module) -> Mapping[str, Any]:
    """What a network says of its input in the attribute that timm's have."""
    described = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None)
    return described if isinstance(described, Mapping) else {}
