"""The model as a process of a scan has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from cdclean.chunk import classifier_on
from cdclean.config import ModelSpec, Precision
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
