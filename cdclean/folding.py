"""Batch normalisation folded into the layer before it: the same answers in fewer passes over the feature maps.

In evaluation mode batch normalisation is a fixed scale and shift per channel (Ioffe and Szegedy 2015, section 3.1),
which a convolution or linear layer takes into its weight and bias. Every step of a distillation then leaves out one
reading and writing of every map, forward and backward.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from cdclean.answers import first_tensor

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_TOLERANCE = 1e-4  # of the largest number compared: the rounding of fp32, with room for cancellation


@torch.no_grad()
def fold(module: nn.Module, like: Tensor) -> nn.Module:
    """A copy of `module` in evaluation mode, its batch normalisations folded into convolutions and linear layers.

    `like` [B, C, H, W], float32 or float64, gives shape, dtype and device of the input. A normalisation is folded where
    torch.fx finds that it alone takes what the layer puts out, and where the two answer noise as before. The module's
    answers agree to about 1e-5 of their size and its gradient with respect to the input is kept. `module` itself comes
    back where there is nothing to fold, where fx cannot follow it, and where its answer to noise would be another.

    Modules keep their names and code: a folded normalisation becomes what it does besides (timm's bring their
    activation along), so that a hook on it sees the same. One on the layer before it sees the normalised map.
    """
    if not any(isinstance(each, _BatchNorm) for each in module.modules()):
        return module
    noise = torch.rand(like.shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    try:
        pairs = _pairs(copy.deepcopy(module).eval())  # a copy of its own: what a forward stores now is no tensor
        folded = copy.deepcopy(module).eval()
        expected = _replace(folded, pairs, noise)
        return folded if pairs and _agree(first_tensor(folded(noise)), expected) else module
    except Exception:  # control flow on values, weights that cannot be copied, whatever else a module may do
        return module


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of layers and of the normalisations that alone take what these put out, each called once."""
    tracer = _Tracer()
    nodes = list(tracer.trace(module).nodes)
    named: dict[str, nn.Module] = dict(module.named_modules())
    called = {node: named[str(node.target)] for node in nodes if node.op == "call_module"}
    calls = Counter(called.values())
    # What an opaque module holds may be called in there; weights that are read by name may be needed as they are.
    unsure = {inner for outer in tracer.opaque for inner in outer.modules()}
    unsure |= {named[str(node.target).rpartition(".")[0]] for node in nodes if node.op == "get_attr"}
    found = []
    for node, norm in called.items():
        before = _only_input(node)
        layer = called.get(before) if before else None
        if not before or layer is None or not _only_input(before) or len(before.users) > 1:
            continue
        if _can_fold(layer, norm) and all(calls[each] == 1 and each not in unsure for each in (layer, norm)):
            found.append((str(before.target), str(node.target)))
    return found


class _Tracer(fx.Tracer):
    """Follows the calls of a module. One that cannot be followed inside is a single call, and noted as opaque."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_LAYERS, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before, stack = len(self.graph.nodes), self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.module_stack = stack
            self.opaque.append(m)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _only_input(call: fx.Node) -> fx.Node | None:
    first = call.args[0] if call.args else None
    return first if isinstance(first, fx.Node) and len(call.args) == 1 and not call.kwargs else None


def _can_fold(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether both hold the plain tensors that folding needs, and nobody listens to either."""
    listeners = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        isinstance(layer, _LAYERS)
        and isinstance(norm, _BatchNorm)
        and layer._parameters.get("weight") is not None  # it is elsewhere where it is parametrised
        and norm.running_mean is not None
        and not any(getattr(each, name) for each in (layer, norm) for name in listeners)
    )


@dataclass
class _Trial:
    """A layer and its normalisation, what would stand for each, and whether that agreed in every call."""

    layer: nn.Module
    norm: nn.Module
    fused: nn.Module
    rest: nn.Module
    agreed: list[bool] = field(default_factory=list)

    def compare(self, _layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.agreed.append(_agree(self.rest(self.fused(*inputs)), self.norm(output)))


def _replace(module: nn.Module, pairs: list[tuple[str, str]], noise: Tensor) -> Tensor:
    """Fold the pairs that answer as before to what reaches them from `noise`; returns the module's answer before.

    So a layer that does as it likes with its weight is found out, and a linear layer before a normalisation that
    takes tokens for channels.
    """
    trials = [_trial(*map(module.get_submodule, names)) for names in pairs]
    hooks = [trial.layer.register_forward_hook(trial.compare) for trial in trials]
    answer = first_tensor(module(noise)).clone()
    for hook in hooks:
        hook.remove()
    new: dict[nn.Module | None, nn.Module] = {}
    for trial in trials:
        if trial.agreed == [True]:
            new |= {trial.layer: trial.fused, trial.norm: trial.rest}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return answer


def _trial(layer: Any, norm: Any) -> _Trial:
    fused = copy.deepcopy(layer)
    fused.weight, fused.bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    rest = nn.Sequential(OrderedDict(norm.named_children())).eval()  # nothing: an identity
    return _Trial(layer, norm, fused, rest)


def _agree(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())
