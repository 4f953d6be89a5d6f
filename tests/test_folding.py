"""Folding batch normalisation: the same answers and gradients, the same names and hooks, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

from cdclean.config import DistillConfig
from cdclean.distillation import distill
from cdclean.folding import fold
from tests.networks import made


def images(count: int = 3) -> Tensor:
    return torch.rand((count, 3, 32, 32), generator=torch.Generator().manual_seed(1))


def norms(module: nn.Module) -> int:
    return sum(isinstance(each, _BatchNorm) for each in module.modules())


def worn(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode, with statistics, scales and shifts as training leaves them: all different."""
    generator = torch.Generator().manual_seed(2)
    ranges = {"running_mean": (-1, 1), "running_var": (0.2, 3), "weight": (-1, 2), "bias": (-1, 1)}
    for each in module.modules():
        for name, limits in ranges.items() if isinstance(each, _BatchNorm) else ():
            tensor = getattr(each, name)
            if tensor is not None:
                tensor.data.uniform_(*limits, generator=generator)
    return module.eval()


def answer_and_gradient(module: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    pixels = pixels.clone().requires_grad_()
    answer = module(pixels)
    weights = torch.linspace(-1, 1, answer[0].numel(), dtype=answer.dtype).view_as(answer[0])
    (gradient,) = torch.autograd.grad((answer * weights).sum(), pixels)
    return answer.detach(), gradient


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def assert_same(module: nn.Module, left: int) -> nn.Module:
    """Fold `module`: `left` normalisations stay, the answers are the same, `module` is as it was. Returns the copy."""
    state = copy.deepcopy(module.state_dict())
    folded = fold(module, images(1))
    assert norms(folded) == left
    assert_close(folded(images()).detach(), module(images()).detach(), 1e-5)
    # In fp64: rounding decides on which side of a ReLU's kink a number falls.
    double = copy.deepcopy(module).double()
    pairs = zip(
        answer_and_gradient(fold(double, images(1).double()), images().double()),
        answer_and_gradient(double, images().double()),
        strict=True,
    )
    for found, expected in pairs:
        assert_close(found, expected, 1e-10)
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(module.state_dict()[key], state[key]) for key in state)
    return folded


# --- Whole networks ---


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_a_network_is_folded_as_a_whole_and_keeps_its_names(name: str) -> None:
    module = made(name)
    folded = assert_same(module, left=0)
    assert dict(module.named_modules()).keys() <= dict(folded.named_modules()).keys()


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_network_without_batch_norm_comes_back_as_it_is(name: str) -> None:
    module = made(name)
    assert fold(module, torch.rand(1, 3, 160, 160)) is module


def test_convolutions_that_pad_like_tensorflow_are_folded() -> None:
    assert_same(made("tf_mobilenetv3_small_minimal_100"), left=0)


def test_hooks_on_normalisations_and_blocks_see_the_same() -> None:
    module = made("test_resnet")
    folded = fold(module, images(1))
    seen: dict[str, list[Tensor]] = {}
    names = ["bn1", "bn1.act", "layer1", "layer2.0.bn2", "layer4.0"]
    names = [name for name in names if name in dict(module.named_modules())]
    for network in (module, folded):
        for name in names:
            network.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, name=name: seen.setdefault(name, []).append(output.detach().clone())
            )
        network(images())
    assert len(names) >= 3
    for name in names:
        assert_close(seen[name][1], seen[name][0], 1e-5)


def test_a_module_in_training_mode_is_folded_in_evaluation_mode_and_left_in_training_mode() -> None:
    module = made("test_resnet").train()
    folded = fold(module, images(1))
    assert all(each.training for each in module.modules())
    assert not any(each.training for each in folded.modules())
    assert_close(folded(images()).detach(), module.eval()(images()).detach(), 1e-5)


def test_frozen_weights_stay_frozen() -> None:
    folded = fold(made("test_resnet").requires_grad_(False), images(1))
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_distillation_finds_the_same_masks() -> None:
    module = made("test_resnet", num_classes=10)
    config = DistillConfig(steps=5, batch_size=4)
    expected = distill(module, images(4), config)
    found = distill(fold(module, images(1)), images(4), config)
    assert_close(found.mask_norm, expected.mask_norm, 1e-2)
    features = replace(config, objective="features", layer="layer4", area_cost=0.5)
    expected = distill(module, images(4), features)
    found = distill(fold(module, images(1)), images(4), features)
    assert_close(found.mask_norm, expected.mask_norm, 1e-2)


# --- Single pairs ---


def conv(inputs: int = 3, **arguments: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, 4, 3, padding=1, **arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [conv(bias=False), nn.BatchNorm2d(4)],
        lambda: [conv(bias=True), nn.BatchNorm2d(4, affine=False), nn.ReLU(inplace=True)],
        lambda: [nn.Flatten(), nn.Linear(3 * 32 * 32, 4, bias=False), nn.BatchNorm1d(4)],
        lambda: [nn.Flatten(2), nn.Conv1d(3, 6, 5, groups=3), nn.BatchNorm1d(6)],
        lambda: [nn.Sequential(conv(), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())), conv(4), nn.SyncBatchNorm(4)],
    ],
    ids=["conv", "conv with bias", "linear", "grouped conv1d", "nested"],
)
def test_a_pair_is_folded(make: Callable[[], list[nn.Module]]) -> None:
    torch.manual_seed(0)
    assert_same(worn(nn.Sequential(*make())), left=0)


class Calls(nn.Module):
    """A convolution and a normalisation, called as `how` says."""

    def __init__(self, how: Callable[[Calls, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.how = conv(), nn.BatchNorm2d(4), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def used_twice(self: Calls, x: Tensor) -> Tensor:
    x = self.conv(x)
    return self.norm(x) + x


def called_twice(self: Calls, x: Tensor) -> Tensor:
    return self.norm(self.conv(x)) + self.conv(-x)


def normalised_twice(self: Calls, x: Tensor) -> Tensor:
    return self.norm(self.norm(self.conv(x)))


def weight_is_read(self: Calls, x: Tensor) -> Tensor:
    return self.norm(self.conv(x)) * self.conv.weight.mean()


def statistics_are_computed_with(self: Calls, x: Tensor) -> Tensor:
    return self.norm(self.conv(x)) + self.norm.running_mean.square().sum()


def only_tensors_are_used_twice(self: Calls, x: Tensor) -> Tensor:
    x = self.conv(x)
    return self.norm(x) + x if isinstance(x, Tensor) else self.norm(x)


@pytest.mark.parametrize(
    "how",
    [
        used_twice,
        called_twice,
        normalised_twice,
        weight_is_read,
        statistics_are_computed_with,
        only_tensors_are_used_twice,
    ],
)
def test_a_pair_that_something_else_depends_on_is_left(how: Callable[[Calls, Tensor], Tensor]) -> None:
    assert_same(worn(Calls(how)), left=1)


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019): whatever scale is put into the weight is taken out again."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight / weight.std((1, 2, 3), keepdim=True), self.bias, padding=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [nn.BatchNorm2d(3), conv()],
        lambda: [conv(), nn.ReLU(), nn.BatchNorm2d(4)],
        lambda: [Standardised(3, 4, 3), nn.BatchNorm2d(4)],
        lambda: [parametrizations.weight_norm(conv()), nn.BatchNorm2d(4)],
        lambda: [nn.Flatten(2), nn.Linear(1024, 3), nn.BatchNorm1d(3)],
        lambda: [nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)],
    ],
    ids=["nothing before it", "an activation between", "standardised", "parametrised", "tokens", "transposed"],
)
def test_a_pair_that_cannot_be_folded_is_left(make: Callable[[], list[nn.Module]]) -> None:
    torch.manual_seed(0)
    assert_same(worn(nn.Sequential(*make())), left=1)


def test_the_others_are_folded_all_the_same() -> None:
    torch.manual_seed(0)
    pairs = [conv(), nn.BatchNorm2d(4), Standardised(4, 4, 3), nn.BatchNorm2d(4), conv(4), nn.BatchNorm2d(4)]
    assert_same(worn(nn.Sequential(*pairs)), left=1)


def test_hooks_on_a_pair_keep_it() -> None:
    module = worn(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    module[0].register_forward_hook(lambda _module, _inputs, output: output + 1)
    assert_same(module, left=1)


def test_normalisation_by_the_batch_is_left() -> None:
    module = nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert fold(module, images(1)) is module


# --- What fx cannot follow ---


def depends_on_values(self: Calls, x: Tensor) -> Tensor:
    x = self.norm(self.conv(x))
    return x if x.sum() > 0 else -x


def remembers(self: Calls, x: Tensor) -> Tensor:
    self.last = self.__dict__.get("last", x)
    return self.norm(self.conv(x)) + 0 * self.last.sum()


def test_a_module_that_cannot_be_traced_comes_back_as_it_is() -> None:
    module = worn(Calls(depends_on_values))
    assert fold(module, images(1)) is module


def test_what_cannot_be_traced_inside_of_a_module_is_left_alone() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Calls(depends_on_values), conv(4), nn.BatchNorm2d(4))
    assert_same(worn(module), left=1)


def test_a_module_that_is_also_called_where_nobody_can_follow_is_left() -> None:
    inner = Calls(depends_on_values)
    assert_same(worn(nn.Sequential(inner.conv, inner.norm, nn.Conv2d(4, 3, 1), inner)), left=1)


def test_what_a_module_stores_while_it_is_traced_is_forgotten() -> None:
    assert_same(worn(Calls(remembers)), left=0)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_programs_come_back_as_they_are() -> None:
    module = worn(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    traced = torch.jit.trace(module, images(1))
    assert fold(traced, images(1)) is traced
    exported = torch.export.export(module, (images(1),)).module()
    assert fold(exported, images(1)) is exported


def test_a_module_that_cannot_be_copied_comes_back_as_it_is() -> None:
    module = worn(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    module.kept = module[0].weight * 2  # no leaf of the graph: torch refuses to copy it
    assert fold(module, images(1)) is module
