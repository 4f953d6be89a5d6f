"""The model as a process of a scan has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from cdclean.chunk import classifier_on, distil_pixels
from cdclean.config import DistillConfig, ModelSpec, Precision
from cdclean.models import load


@pytest.mark.parametrize(
    ("size", "precision", "fused"),
    [(160, "bf16", 0), (288, "bf16", 6), (160, "fp32", 6)],
    ids=["100 tokens", "324 tokens", "fp32"],
)
def test_attention_of_few_tokens_is_written_out_in_bf16(
    size: int, precision: Precision, fused: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    torch.save(timm.create_model("test_vit", num_classes=3, img_size=size).state_dict(), path)
    spec = ModelSpec(str(path), "timm:test_vit", (size, size))
    before, after = load(spec).module, classifier_on(spec, "cpu", precision, "probabilities").module
    assert sum(getattr(each, "fused_attn", False) for each in before.modules()) == 6
    assert sum(getattr(each, "fused_attn", False) for each in after.modules()) == fused
    images = torch.rand(2, 3, size, size, requires_grad=True)
    answers = [module(images) for module in (before, after)]
    slopes = [torch.autograd.grad(answer.square().sum(), images)[0] for answer in answers]
    for left, right in (answers, slopes):
        assert (left - right).abs().max() <= 1e-5 * left.abs().max()


def test_one_output_is_two_classes(tmp_path: Path) -> None:
    """A network that says z scores as one that says 0 for no and z for yes: the sigmoid of z is that softmax."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=1)
    with torch.no_grad():
        network.fc.weight *= 100  # type: ignore[operator, union-attr]
        network.fc.bias.fill_(0.2)  # type: ignore[operator, union-attr]
    one = network.state_dict()
    two = one | {name: torch.cat([torch.zeros_like(one[name]), one[name]]) for name in ("fc.weight", "fc.bias")}
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8) * (torch.arange(8) % 2).view(-1, 1, 1, 1)
    found = []
    for name, state, head in (("one", one, "sigmoid"), ("two", two, "softmax")):
        torch.save(state, tmp_path / f"{name}.pt")
        spec = ModelSpec(str(tmp_path / f"{name}.pt"), "timm:test_resnet", (32, 32))
        model = classifier_on(spec, "cpu", "fp64", "probabilities")
        assert model.classes == 2
        config = DistillConfig(steps=4, head=head, precision="fp64", batch_size=8)  # type: ignore[arg-type]
        found.append(distil_pixels(model, pixels, config, "cpu")[1])
    assert {row["prediction"] for row in found[0]} == {0, 1}
    assert all(row["confidence"] >= 0.5 for row in found[0])
    for left, right in zip(*found, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"embedding"}:
            assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-5), name
