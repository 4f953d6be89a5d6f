"""A model's answer to an image, as distillation compares it: which tensor is meant, what its numbers mean, which layer.

Also how to ask without leaving a trace: evaluation mode, frozen parameters, and everything back as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cdclean.config import DistillConfig, Head, Precision
from cdclean.errors import ModelError

EMBEDDED = 64  # numbers of an embedding, at most
_PROBES = 8  # images that tell what the outputs are


class Answer:
    """Calls the model; gives what the objective compares, and the flat output as logits (None if there is none)."""

    def __init__(self, model: nn.Module, config: DistillConfig, head: Head) -> None:
        self.model, self.head, self.precision = model, head, config.precision
        self.layer = find_layer_by_name(model, config.layer) if config.objective == "features" else None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        captured: list[Tensor] = []
        mine = threading.get_ident()  # threads may share a model, each with images of its own

        def capture(_module: nn.Module, _inputs: object, output: object) -> None:
            if threading.get_ident() == mine:
                captured.append(first_tensor(output))

        hook = self.layer.register_forward_hook(capture) if self.layer else None
        try:
            with autocast(images.device.type, self.precision):
                output = first_tensor(self.model(images)).to(images.dtype)
        finally:
            if hook:
                hook.remove()
        logits = _as_logits(output, self.head) if output.ndim == 2 else None
        compared = captured[-1].to(images.dtype) if self.layer else logits
        if compared is None:
            raise ModelError(
                f"the model's output has shape {list(output.shape)}, not [batch, classes]",
                hint="It has no classifier: compare its features instead, with --objective features.",
            )
        if torch.is_grad_enabled() and not compared.requires_grad:
            raise ModelError(
                "the model gives no gradient with respect to its input",
                hint="It was exported or scripted without one. Give the weights and --arch instead.",
            )
        return compared, logits


def _as_logits(output: Tensor, head: Head) -> Tensor:
    """Probabilities back to logits, up to the constant that softmax ignores; anything else is returned as it is."""
    tiny = torch.finfo(output.dtype).tiny
    if head == "probabilities":
        return output.clamp_min(tiny).log()
    if head == "sigmoid-probabilities":
        return output.clamp_min(tiny).log() - (1 - output).clamp_min(torch.finfo(output.dtype).eps / 2).log()
    return output


@contextmanager
def linear_inputs(model: nn.Module) -> Iterator[list[tuple[int, Tensor]]]:
    """What enters the linear layers of `model` inside, one vector an image, with the number of their outputs."""
    entered: list[tuple[int, Tensor]] = []

    mine = threading.get_ident()  # threads may share a model, each with images of its own

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs and inputs[0].ndim == 2 and threading.get_ident() == mine:
            entered.append((layer.out_features, inputs[0].detach()))  # type: ignore[arg-type]

    hooks = [module.register_forward_pre_hook(note) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


def embed(entered: list[tuple[int, Tensor]], classes: int) -> Tensor | None:
    """What the classifier, the last linear layer with `classes` outputs, is given, [B, D], as at most 64 numbers each.

    More than these are projected on as many random directions, the same for every network of that width: distances
    between images are kept, but for chance (Johnson and Lindenstrauss 1984). float32, rounded to what bfloat16 holds.
    None where there is no such layer: a model without a classifier, a convolution as one, an exported program.
    """
    found = [features for outputs, features in entered if outputs == classes]
    if not found:
        return None
    features = found[-1].float()
    width = features.shape[1]
    if width > EMBEDDED:
        directions = torch.randn(width, EMBEDDED, generator=torch.Generator().manual_seed(0))
        features = features @ (directions / EMBEDDED**0.5).to(features.device)
    return features.bfloat16().float()


@torch.no_grad()
def recognise_head(model: nn.Module, like: Tensor) -> Head:
    """What the numbers of `model`'s output mean, from its answers to a few fixed images of noise.

    `like` [B, C, H, W] gives shape (programs may be exported for one batch size), dtype and device. Outputs inside
    [0, 1] are probabilities: of exclusive classes where they sum to 1, of independent ones where not. A single output
    outside [0, 1] is a yes/no logit. The answer to many logits is "softmax": a multi-label network that returns
    logits must be told (`head="sigmoid"`).
    """
    generator = torch.Generator().manual_seed(0)
    probes = [torch.rand(like.shape, generator=generator) for _ in range(-(-_PROBES // len(like)))]
    output = torch.cat([first_tensor(model(probe.to(like.device, like.dtype))) for probe in probes])
    if output.ndim != 2:
        return "softmax"  # no classifier: never asked
    if ((output >= 0) & (output <= 1)).all():
        exclusive = output.shape[1] > 1 and torch.allclose(output.sum(1), torch.ones_like(output[:, 0]), atol=1e-3)
        return "probabilities" if exclusive else "sigmoid-probabilities"
    return "sigmoid" if output.shape[1] == 1 else "softmax"


@torch.no_grad()
def find_layer(model: nn.Module, like: Tensor) -> str:
    """The name of the last module that puts out a map, [B, C, H, W] or tokens [B, N, D], with more than one position.

    Found by a forward pass over one image shaped like `like` [B, C, H, W]. Raises ModelError where there is none.
    """
    names: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            shape = first_tensor(output).shape
            if (len(shape) == 4 and shape[2] * shape[3] > 1) or (len(shape) == 3 and shape[1] > 1):
                names.append(name)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        with frozen(model):
            model(torch.full_like(like[:1], 0.5))
    finally:
        for hook in hooks:
            hook.remove()
    if not names:
        raise ModelError(
            "no module of the model puts out a feature map",
            hint="Name the module whose output to compare, with --layer; its modules are the keys of the checkpoint.",
        )
    return names[-1]


def find_layer_by_name(model: nn.Module, name: str | None) -> nn.Module:
    """The module called `name`, or the only one whose name ends in `.name`. Raises ModelError, with near names."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name is not None and name in modules:
        return modules[name]
    ending = [full for full in modules if name and full.endswith(f".{name}")]
    if len(ending) != 1:
        known = ", ".join(full for full in modules if 0 < full.count(".") <= 1) or "none"
        raise ModelError(f"the model has no module {name!r}", hint=f"--layer takes a name such as: {known}")
    return modules[ending[0]]


def first_tensor(output: object) -> Tensor:
    """The tensor a model means: itself, `logits` or the first value of a dict, `.logits`, the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return first_tensor(output["logits"] if "logits" in output else next(iter(output.values()), None))
    if isinstance(output, list | tuple) and output:
        return first_tensor(output[0])
    if isinstance(getattr(output, "logits", None), Tensor):
        return first_tensor(getattr(output, "logits", None))
    raise ModelError(
        f"the model returns {type(output).__name__}, not a tensor", hint="Wrap it so that it returns logits."
    )


def autocast(device: str, precision: Precision) -> torch.autocast:
    """The model's precision. The mask, the optimiser and the objective always run in the dtype of the images."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; outside, everything as it was.

    Flags are set one by one: exported programs refuse `eval()`, and a caller may have frozen parts himself.
    """
    training = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ModelError(
                f"{name} normalises by the batch, so that every score would depend on its neighbours",
                hint="Keep running statistics (track_running_stats=True), or use another model.",
            )
    try:
        for module, _ in training:
            module.training = False
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
