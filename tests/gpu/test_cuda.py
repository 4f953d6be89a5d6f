"""What a GPU has to keep: the same score whatever the neighbours, the order, the processes, the point of resuming."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cdclean import records
from cdclean.config import DistillConfig, paper
from cdclean.distillation import Distilled, distill
from cdclean.models import Normalized
from cdclean.repetition import Repetition, reproducible
from tests.networks import SHARED, ResNet20
from tests.packings import folder, pictures

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROOT = Path(__file__).parents[2]
CUDA = "cuda:0"
TINY = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"]


def tiny(name: str, device: str = CUDA) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 64} if "vit" in name else {}
    network = timm.create_model(name, num_classes=5, **size)
    return Normalized(network, (0.5,) * 3, (0.25,) * 3).to(device).eval()


def noise_images(count: int, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(first: Distilled, second: Distilled, rows: Any = slice(None)) -> bool:
    """Bit by bit, `rows` of the first and all of the second."""
    names = ("masks", "mask_norm", "divergence", "total_variation", "logits", "embedding")
    pairs = [(getattr(first, name), getattr(second, name)) for name in names]
    return all(torch.equal(a[rows], b) for a, b in pairs if a is not None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", TINY)
def test_a_score_does_not_depend_on_neighbours_or_recording(name: str, precision: Any) -> None:
    model, images = tiny(name), noise_images(11).to(CUDA)
    config = DistillConfig(steps=8, batch_size=4, precision=precision, head="softmax")
    plain = distill(model, images, config)
    assert same(plain, distill(model, images, config)), "another time, another score"
    order = torch.tensor([7, 2, 10, 0, 5])
    assert same(plain, distill(model, images[order.to(CUDA)], config), order.to(CUDA)), "other neighbours"
    repetition = Repetition()
    for _ in range(2):
        assert same(plain, distill(model, images, config, repetition=repetition)), "recorded"
    assert repetition.recorded
    assert not repetition.refused


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_gpu_gives_the_same() -> None:
    images, config = noise_images(6), DistillConfig(steps=6, batch_size=2, head="softmax")
    found = [
        distill(tiny("test_resnet", device), images.to(device), config, repetition=Repetition())
        for device in ("cuda:1", "cuda:0", "cuda:1")
    ]
    for each in found[1:]:
        assert torch.equal(each.mask_norm.cpu(), found[0].mask_norm.cpu())


@pytest.mark.parametrize("objective", ["logits", "features"])
def test_other_objectives_are_recorded(objective: Any) -> None:
    model, images = tiny("test_resnet"), noise_images(6).to(CUDA)
    config, repetition = replace(paper(objective), steps=6, batch_size=2), Repetition()
    plain = distill(model, images, config)
    assert same(plain, distill(model, images, config, repetition=repetition))
    assert repetition.recorded
    assert same(plain, distill(model, images, config, repetition=repetition))


def test_what_a_recording_gave_stays_as_it_was() -> None:
    model, repetition = tiny("test_resnet"), Repetition()
    first, second = noise_images(4).to(CUDA).split(2)
    config = DistillConfig(steps=4, batch_size=2)
    given = first.clone()
    found = [distill(model, images, config, repetition=repetition) for images in (first, second, first)]
    assert torch.equal(first, given)
    assert same(found[0], found[2])
    assert not same(found[0], found[1])
    assert same(distill(model, second, config), found[1])


class Chancy(nn.Module):
    """Pools to a size that the map is no multiple of, which CUDA adds up in the order of chance on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(200, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


def test_a_model_that_cannot_repeat_itself_is_scored_and_said_to_be_so() -> None:
    torch.manual_seed(0)
    model, images = Chancy().to(CUDA), noise_images(4).to(CUDA)
    with pytest.warns(UserWarning, match="may differ in their last digits"):
        found = distill(model, images, DistillConfig(steps=4, batch_size=2, head="softmax"))
    assert found.mask_norm.isfinite().all()


class Waits(nn.Module):
    """Looks at its own answer on the way, which no recording can."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny("test_resnet")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits if float(logits.detach().sum()) != 0.125 else logits * 2


def test_a_model_that_cannot_be_recorded_is_scored_all_the_same() -> None:
    images, config, repetition = noise_images(4).to(CUDA), DistillConfig(steps=4, batch_size=2), Repetition()
    with pytest.warns(UserWarning, match="cannot be recorded"):
        found = distill(Waits(), images, config, repetition=repetition)
    assert repetition.refused
    assert same(found, distill(tiny("test_resnet"), images, config))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # said once
        assert same(found, distill(Waits(), images, config, repetition=repetition))


def test_settings_of_the_process_come_back() -> None:
    before = (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32)
    with reproducible(torch.device(CUDA)):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize("objective", ["logits", "features", "probabilities"])
def test_float64_masks_are_those_of_the_cpu(objective: Any) -> None:
    """Where rounding is small; the CPU's are compared with the published loop. Single images may part ways."""
    place = SHARED / "golden" / "reference-cd-resnet20.npz"
    if not place.exists():
        pytest.skip("needs ../shared")
    stored, network = np.load(place), ResNet20()
    network.load_state_dict(load_file(SHARED / "models" / "cifar10-resnet20-clean.safetensors"))
    model = Normalized(network, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).double()
    images = torch.from_numpy(stored["images_uint8"]).permute(0, 3, 1, 2).double() / 255
    budget = DistillConfig() if objective == "probabilities" else replace(paper(objective), steps=30)
    config = replace(budget, precision="fp64", batch_size=8)
    cpu = distill(model, images, config)
    cuda = distill(model.to(CUDA), images.to(CUDA), config)
    apart = (cuda.masks.cpu() - cpu.masks).abs().amax((1, 2, 3))
    assert apart.median() < 1e-6, apart
    assert np.corrcoef(cuda.mask_norm.cpu(), cpu.mask_norm)[0, 1] > 0.999, apart


def cdclean(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cdclean", *map(str, arguments)]


def scan(data: str, model: Path, out: Path, *more: object) -> list[str]:
    size = ("--input-size", 64, "--mean", 0.5, "--std", 0.25, "--chunk-size", 16, "--batch-size", 8, "--steps", 12)
    return cdclean("scan", data, "--model", model, "--out", out, *size, "--device", "cuda", *more)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done


def table(run: Path) -> Any:
    return records.read_aligned(run, ["status", "mask_norm", "divergence", "margin", "embedding"])


def test_scans_agree_however_they_ran(tmp_path: Path, checkpoint: Path) -> None:
    """At once, in two processes on one GPU, and killed and gone on with."""
    data = folder(tmp_path / "data", pictures(60))
    run(scan(data, checkpoint, tmp_path / "whole", "--engine", "serial"))
    whole = table(tmp_path / "whole")
    assert whole["status"].to_pylist() == ["ok"] * 180
    run(scan(data, checkpoint, tmp_path / "two", "--workers", 2))
    assert table(tmp_path / "two").equals(whole)

    command = scan(data, checkpoint, tmp_path / "killed")
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    parts = tmp_path / "killed" / "records"
    while process.poll() is None and not list(parts.glob("part-*.parquet")):
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = run(command)
    assert "resuming" in resumed.stderr or "complete already" in resumed.stderr
    assert table(tmp_path / "killed").equals(whole)


def test_a_micro_batch_that_does_not_fit_is_halved(tmp_path: Path, checkpoint: Path) -> None:
    """In a process that may use a small part of the GPU's memory."""
    data = folder(tmp_path / "data", pictures(100))
    code = (
        "from cdclean import memory; shrink = memory.Room.shrink\n"
        "memory.Room.shrink = lambda room: (print('halved', file=sys.stderr), shrink(room))[1]\n"
        "import sys, torch; torch.cuda.set_per_process_memory_fraction(float(sys.argv.pop(1)), 0)\n"
        "from cdclean.cli import main; main()"
    )
    total = torch.cuda.get_device_properties(0).total_memory
    arguments = scan(data, checkpoint, tmp_path / "run", "--engine", "serial", "--chunk-size", 300)[3:]
    arguments[arguments.index("--batch-size") + 1] = "256"
    arguments[arguments.index("--input-size") + 1] = "512"
    assert "halved" in run([sys.executable, "-c", code, str(3e9 / total), *arguments]).stderr
    found = table(tmp_path / "run")
    assert found["status"].to_pylist() == ["ok"] * 300


def test_training_repeats_itself(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", pictures(20))
    for name in ("one.pt", "two.pt"):
        given = ("--arch", "timm:test_resnet", "--input-size", 32, "--epochs", 2, "--device", "cuda")
        run(cdclean("train", data, "--out", tmp_path / name, *given))
    one, two = (torch.load(tmp_path / name, weights_only=True)["state_dict"] for name in ("one.pt", "two.pt"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_parts_are_as_on_any_device(tmp_path: Path, checkpoint: Path) -> None:
    run(scan(folder(tmp_path / "data", pictures(5)), checkpoint, tmp_path / "run"))
    part = pq.read_table(next((tmp_path / "run" / "records").glob("part-*.parquet")))
    assert all(value["bytes"] for value in part["mask_thumbnail"].to_pylist())
