"""Repetition: nothing but on a GPU; what one does with it is tested in tests/gpu."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from cdclean.config import DistillConfig
from cdclean.distillation import distill
from cdclean.repetition import Repetition, reproducible

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CONFIG = DistillConfig(steps=3, batch_size=2, head="softmax")


class Small(nn.Module):
    """Fails as CUDA does, the first times that it is asked with a gradient."""

    def __init__(self, failures: int = 0, message: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(192, 4)
        self.failures, self.message = failures, message

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.failures:
            self.failures -= 1
            raise RuntimeError(self.message)
        logits: Tensor = self.layer(x.flatten(1))
        return logits


def test_without_a_gpu_nothing_is_kept() -> None:
    repetition = Repetition()
    plain = distill(Small(), IMAGES, CONFIG)
    for _ in range(3):
        assert torch.equal(distill(Small(), IMAGES, CONFIG, repetition=repetition).masks, plain.masks)
    assert (repetition.step, repetition.recorded, repetition.refused) == (None, False, False)


def test_without_a_gpu_no_setting_changes() -> None:
    with reproducible(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.deterministic


@pytest.mark.parametrize("asked", ["nothing", "high", "tf32 for all", "one by one"])
def test_settings_are_changed_and_come_back_however_a_precision_was_asked_for(asked: str) -> None:
    """In a process of its own, and without a GPU: torch keeps these settings all the same."""
    code = (
        "import sys, torch\n"
        "from cdclean.repetition import _settings\n"
        "asked = sys.argv[1]\n"
        "new, backends = hasattr(torch.backends, 'fp32_precision'), torch.backends\n"
        "if asked == 'high': torch.set_float32_matmul_precision('high')\n"
        "if asked == 'tf32 for all' and new: backends.fp32_precision = 'tf32'\n"
        "if asked == 'one by one' and new:\n"
        "    backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision = 'ieee', 'tf32'\n"
        "for _ in range(2):\n"
        "    wanted = _settings()\n"
        "    before = [getattr(where, name) for where, name, _ in wanted]\n"
        "    for where, name, value in wanted: setattr(where, name, value)\n"
        "    assert [getattr(where, name) for where, name, _ in wanted] == [value for _, _, value in wanted]\n"
        "    assert not backends.cuda.matmul.allow_tf32\n"  # can be read, too
        "    for (where, name, _), value in zip(wanted, before): setattr(where, name, value)\n"
        "    assert [getattr(where, name) for where, name, _ in wanted] == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_operation_that_does_not_repeat_itself_is_said_and_scored() -> None:
    """The words are torch's, which asks this of CUDA alone."""
    message = "put_cuda does not have a deterministic implementation, but you set deterministic mode"
    with pytest.warns(UserWarning, match="may differ in their last digits.*put_cuda"):
        found = distill(Small(1, message), IMAGES, CONFIG)
    assert torch.equal(found.masks, distill(Small(), IMAGES, CONFIG).masks)


def test_other_failures_are_not_tried_again() -> None:
    with pytest.raises(RuntimeError, match="no luck"):
        distill(Small(1, "no luck"), IMAGES, CONFIG)
