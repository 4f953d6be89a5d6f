"""What enters the classifier, as a few numbers an image: the right layer's, the same for any neighbours, or none."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from cdclean.answers import EMBEDDED, embed, linear_inputs
from cdclean.config import DistillConfig
from cdclean.distillation import distill
from cdclean.folding import fold

TINY = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"]
SIZE = 32
STEPS = DistillConfig(steps=1, batch_size=4)


def made(name: str, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    extra = {"img_size": SIZE} if "vit" in name else {}
    model: nn.Module = timm.create_model(name, num_classes=classes, **extra)
    return model.eval()


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_it_is_what_the_classifier_is_given(name: str, folded: bool) -> None:
    model, images = made(name), pictures(6)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    if expected.shape[1] > EMBEDDED:
        expected = embed([(10, expected)], 10)
    scored = fold(model, images[:1]) if folded else model
    with torch.enable_grad():
        found = distill(scored, images, STEPS).embedding
    assert found is not None
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1 / 128, atol=1e-3)  # bfloat16 has eight bits
    assert torch.equal(found, found.bfloat16().float())


def test_wide_ones_keep_their_distances() -> None:
    torch.manual_seed(0)
    features = torch.randn(200, 2048)
    classifier = nn.Sequential(nn.Linear(2048, 7))
    with linear_inputs(classifier) as entered:
        classifier(features)
    found = embed(entered, 7)
    assert found is not None
    assert found.shape == (200, EMBEDDED)
    ratio = torch.pdist(found) / torch.pdist(features)
    assert 0.98 < ratio.mean() < 1.02
    assert ratio.min() > 0.6
    assert ratio.max() < 1.4
    assert torch.equal(found, embed(entered, 7))


def test_the_last_layer_with_as_many_outputs_as_classes_counts() -> None:
    class Gated(nn.Module):
        """A gate of linear layers, as in squeeze and excitation, used before and after the classifier."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.classifier, self.scale = nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            pooled = x.mean((2, 3))
            logits = self.classifier(pooled * self.gate(pooled).sigmoid())
            return logits * self.scale(logits).exp()

    torch.manual_seed(0)
    model, images = Gated().eval(), pictures(4)
    pooled = images.mean((2, 3))
    expected = (pooled * model.gate(pooled).sigmoid()).detach()
    found = distill(model, images, STEPS).embedding
    assert found is not None
    assert torch.allclose(found, expected, rtol=1 / 128)


def test_models_without_such_a_layer_have_none() -> None:
    images = pictures(4)
    convolution = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert distill(convolution, images, STEPS).embedding is None
    program = torch.export.export(made("test_resnet"), (images,)).module()
    assert distill(program, images, STEPS).embedding is None
    headless = timm.create_model("test_resnet", num_classes=0, global_pool="").eval()
    features = DistillConfig(objective="features", layer="layer4", steps=1)
    assert distill(headless, images, features).embedding is None


def test_the_model_keeps_no_trace() -> None:
    model = made("test_vit")
    distill(model, pictures(2), STEPS)
    assert not any(module._forward_pre_hooks for module in model.modules())
