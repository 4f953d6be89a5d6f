"""Images a second: a scan against the published loop, on a GPU against its peak, and as the work grows.

`python -m tests.benchmarks.throughput [--quick] [--full] [--device cuda]` writes results/throughput.{json,md}, and
results/throughput-gpu.{json,md} on a GPU.

The yardstick is the published method, written out plainly: eager fp32, 100 steps on the L1 distance of the logits, the
loss averaged over the batch, colours drawn on the host and moved at every step. It decodes the same files and writes
its scores to Parquet, with torch's default number of threads. The scan has its default settings, thumbnails included,
and then those of --preset fast. Each run is a process of its own, the three in turn. Rates are without start-up: the
yardstick's from its first file to its last, the scan's from the start of its first chunk to the end of its last. The
start-up of the scan with its default settings, from its launch to its first chunk, stands beside them. Where a run
takes fewer steps than it would, its seconds are multiplied: the yardstick's for distillation alone, the scan's as a
whole, so that the rest of a scan counts too often.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

import cdclean
from cdclean import events
from cdclean.chunk import classifier_on
from cdclean.config import DistillConfig, ModelSpec, Precision, Preset, batch_size, preset
from cdclean.distillation import distill
from cdclean.models import load
from cdclean.repetition import Repetition
from tests.benchmarks.detection import networks

ROOT = Path(__file__).parents[2]
PUBLISHED_STEPS, PUBLISHED_BATCH, STEPS = 100, 128, DistillConfig().steps
Figures = dict[str, Any]
BUDGETS: dict[str, Preset] = {"scan": "default", "fast": "fast"}


@dataclass(frozen=True)
class Network:
    name: str
    arch: str  # as --arch takes it
    size: int  # of the input, pixels


RESNET18 = Network("ResNet-18, CIFAR stem", "tests.benchmarks.detection.networks:resnet18", 32)
RESNET50 = Network("ResNet-50", "timm:resnet50", 224)
VIT = Network("ViT-B/16", "timm:vit_base_patch16_224", 224)
SMALLEST = Network("timm's test_resnet", "timm:test_resnet", 32)


@dataclass(frozen=True)
class Load:
    """How much each side does: images, and steps of those that it would take, at most."""

    yardstick_images: int
    yardstick_steps: int
    scan_images: int
    scan_steps: int
    chunk: int | None  # samples; so small that all cores have some


CPU = {RESNET18: Load(64, 40, 64, STEPS, 32), RESNET50: Load(8, 20, 16, STEPS, 8), VIT: Load(8, 8, 16, 12, 8)}
QUICK = {RESNET18: Load(16, 4, 64, 3, 32), RESNET50: Load(2, 2, 16, 1, 8), VIT: Load(2, 2, 16, 1, 8)}
GPU = {RESNET18: Load(512, 100, 16384, STEPS, None), RESNET50: Load(128, 50, 2048, STEPS, None)}
GPU |= {VIT: Load(64, 40, 2048, STEPS, None)}


# --- Data and models ---


def make_images(folder: Path, count: int, size: int) -> None:
    """Clouds of colour: PNG up to 64 px, JPEG above, in two classes."""
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / "ab"[index % 2] / f"{index:06d}.{'png' if size <= 64 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)


def make_model(path: Path, network: Network) -> tuple[str, str, int]:
    """Random weights as a checkpoint; what `spec` takes."""
    torch.manual_seed(0)
    kind, _, name = network.arch.partition(":")
    module = timm.create_model(name, num_classes=10) if kind == "timm" else getattr(networks, name)()
    torch.save(module.state_dict(), path)
    return str(path), network.arch, network.size


def spec(path: str, arch: str, size: int) -> ModelSpec:
    return ModelSpec(path, arch, (size, size), networks.MEAN, networks.STD, crop=1.0)


# --- What runs in a process of its own: arguments in, figures out, both JSON ---


def published(model: nn.Module, images: Tensor, steps: int) -> Tensor:
    """Masks [B, 1, H, W] of `images` [B, C, H, W] in [0, 1] by the published CD-L (Huang et al. 2023, section 3)."""
    with torch.no_grad():
        logits = model(images)
    weight = nn.Parameter(torch.ones_like(images[:, :1]))
    optimizer = torch.optim.Adam([weight], lr=0.1, betas=(0.1, 0.1))
    for _ in range(steps):
        mask = (torch.tanh(weight) + 1) / 2
        colour = torch.rand(len(images), images.shape[1], 1, 1).to(images.device)
        distance = (model(mask * images + (1 - mask) * colour) - logits).abs().mean(1)
        rows = (mask[:, :, 1:] - mask[:, :, :-1]).square().sum((1, 2, 3))
        columns = (mask[:, :, :, 1:] - mask[:, :, :, :-1]).square().sum((1, 2, 3))
        loss = distance + 0.01 * mask.abs().sum((1, 2, 3)) + 10 * (rows + columns) / images[0].numel()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return ((torch.tanh(weight) + 1) / 2).detach()


def run_yardstick(data: str, model: list[Any], out: str, steps: int, device: str) -> Figures:
    module = load(spec(*model)).module.to(device)
    workers = 0 if device == "cpu" else min(8, os.cpu_count() or 1)
    folder = ImageFolder(data, ToTensor())
    batches = DataLoader(folder, min(PUBLISHED_BATCH, len(folder)), num_workers=workers, pin_memory=device != "cpu")
    published(module, next(iter(batches))[0].to(device), 1)  # whatever is done once, is done now
    began, norms, distilling = time.perf_counter(), [], 0.0
    for images, _ in batches:
        started = time.perf_counter()
        norms += published(module, images.to(device), steps).sum((1, 2, 3)).tolist()
        distilling += time.perf_counter() - started
    pq.write_table(pa.table({"key": [path for path, _ in folder.samples], "mask_norm": norms}), out)
    seconds = time.perf_counter() - began + distilling * (PUBLISHED_STEPS / steps - 1)
    return {"rate": len(folder) / seconds, "threads": torch.get_num_threads()}


def run_loop(
    model: list[Any], threads: int, batches: int, steps: int, precision: Precision = "fp32", fused: bool | None = None
) -> Figures:
    """Distillation alone, on noise, with so many threads an operation, and with torch's fused attention or without."""
    classifier = classifier_on(spec(*model), "cpu", "fp32", "probabilities")
    torch.set_num_threads(threads)
    for block in classifier.module.modules():
        if fused is not None and hasattr(block, "fused_attn"):
            block.fused_attn = fused  # type: ignore[assignment]
    config, images = _noise(classifier, "cpu", steps)
    config = replace(config, precision=precision)
    distill(classifier.module, images, replace(config, steps=1))
    began = time.time()
    for _ in range(batches):
        distill(classifier.module, images, config)
    return {"rate": batches * len(images) / (time.time() - began)}


def run_device(model: list[Any], device: str) -> Figures:
    """FLOP/s achieved over the measured peak of bf16 matrix products, and the share of time the device has no work.

    Steps are recorded, as in a scan, but for `plain`. A kernel's time is taken from a profiled run, the whole time from
    one without the profiler.
    """
    classifier = classifier_on(spec(*model), device, "bf16", "probabilities")
    config, images = _noise(classifier, device, STEPS)
    with FlopCounterMode(display=False) as counter:
        distill(classifier.module, images, config)

    def once(repetition: Repetition | None = classifier.repetition) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        distill(classifier.module, images, config, repetition=repetition)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    plain = statistics.median(once(None) for _ in range(2))
    for _ in range(2):
        once()
    seconds = statistics.median(once() for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        once()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    work, peak = counter.get_total_flops(), matmul_peak(device)
    figures = {"images_per_second": len(images) / seconds, "tflops": work / seconds / 1e12}
    figures |= {"peak_tflops": peak / 1e12, "of_peak": work / seconds / peak, "kernels_a_step": len(spans) / STEPS}
    figures["plain_images_per_second"] = len(images) / plain
    return figures | {"waiting": max(0.0, 1 - covered(spans) / 1e6 / seconds)}


def _noise(classifier: Any, device: str, steps: int) -> tuple[DistillConfig, Tensor]:
    """The settings a scan would have, and one micro-batch."""
    shape = classifier.geometry
    size, precision = batch_size(shape, device.split(":")[0]), "fp32" if device == "cpu" else "bf16"
    images = torch.rand(size, shape.channels, shape.height, shape.width, device=device)
    config = DistillConfig(steps=steps, batch_size=size, head="softmax", precision=precision)
    return config, images.contiguous(memory_format=torch.channels_last)


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of the spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def matmul_peak(device: str, size: int = 8192) -> float:
    """FLOP/s of bf16 matrix products."""
    from torch.utils.benchmark import Timer  # which warns where there is no CUDA

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / Timer("a @ b", globals={"a": a, "b": b}).blocked_autorange(min_run_time=2).median


RUNS = {"yardstick": run_yardstick, "loop": run_loop, "device": run_device}


class Child:
    """A command in a process of its own, its output kept."""

    def __init__(self, *command: str) -> None:
        self.launched, self.output = time.time(), tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stdout=self.output)

    def wait(self) -> Figures:
        """Whole time and peak memory."""
        peak = 0
        while self.process.poll() is None:
            peak = max(peak, memory(self.process.pid))
            time.sleep(0.1)
        if self.process.returncode:
            raise RuntimeError(f"{self.process.args} ended with {self.process.returncode}")
        return {"total": time.time() - self.launched, "peak_mib": peak // 1024}

    def figures(self) -> Figures:
        """What one of RUNS has found."""
        self.wait()
        self.output.seek(0)
        found: Figures = json.loads(self.output.readlines()[-1])
        return found


def child(what: str, **arguments: Any) -> Child:
    """One of RUNS."""
    return Child("tests.benchmarks.throughput", "--child", what, json.dumps(arguments))


def scan(data: Path, model: list[Any], device: str, steps: int, budget: Preset = "default", **flags: Any) -> Figures:
    """A scan by the command line, with no more steps than `steps`; `share` of the budget's."""
    whole, run = preset(budget), data.with_suffix(".cdclean")
    path, arch, size = model
    steps = min(steps, whole.steps)
    flags |= {"model": path, "arch": arch, "input-size": size, "device": device, "out": run}
    flags |= {"mean": ",".join(map(str, networks.MEAN)), "std": ",".join(map(str, networks.STD))}
    flags |= {"preset": budget, "steps": steps, "crop": 1.0}
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    scanning = Child("cdclean", "scan", str(data), *given, "--overwrite", "--quiet")
    figures = scanning.wait()
    summary, plan = (json.loads((run / name).read_text()) for name in ("summary.json", "run.json"))
    if summary["status"] != {"ok": summary["samples"]}:
        raise RuntimeError(f"not every sample has a score: {summary['status']}")
    log = [event | {"at": datetime.fromisoformat(event["time"]).timestamp()} for event in events.read(run)]
    chunks = [event for event in log if event["event"] == "chunk"]
    began = min(chunk["at"] - chunk["seconds"] for chunk in chunks)
    seconds = max(chunk["at"] for chunk in chunks) - began
    figures |= {name: plan["plan"][name] for name in ("precision", "batch_size")}
    figures["processes"] = next(len(event["devices"]) for event in log if event["event"] == "start")
    figures |= {"startup": began - scanning.launched, "share": steps / whole.steps}
    return figures | {"rate": summary["samples"] / seconds}


def memory(pid: int) -> int:
    """KiB of a process and its descendants; what they share is counted once. 0 where Linux's /proc is not."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except (OSError, StopIteration):  # it has just ended
        return 0
    return own + sum(memory(int(child)) for child in children)


# --- The questions: rows of figures ---


def against_the_published(here: Path, device: str, loads: dict[Network, Load], repeats: int) -> Iterator[Figures]:
    """The scan against the yardstick, in turn."""
    for number, (network, load_) in enumerate(loads.items()):
        common: Figures = {"model": make_model(here / "model.pt", network), "device": device}
        theirs, ours = (here / f"{side}-{number}" for side in ("yardstick", "scan"))
        make_images(theirs, load_.yardstick_images, network.size)
        make_images(ours, load_.scan_images, network.size)
        runs: dict[str, list[Figures]] = {"yardstick": [], "scan": [], "fast": []}
        # As many processes as a large scan has, though so few images would not be worth starting them.
        how = {"chunk-size": load_.chunk, "workers": os.cpu_count() if device == "cpu" else None}
        for _ in range(repeats):
            asked = {"data": str(theirs), "out": str(here / "yardstick.parquet"), "steps": load_.yardstick_steps}
            runs["yardstick"].append(child("yardstick", **common, **asked).figures())
            for side, budget in BUDGETS.items():
                found = scan(ours, **common, steps=load_.scan_steps, budget=budget, **how)
                runs[side].append(found | {"rate": found["rate"] * found["share"]})
        row = {"network": network.name, "px": network.size}
        row |= {f"{side}_images_per_second": middle(run["rate"] for run in each) for side, each in runs.items()}
        for side in BUDGETS:
            both = zip(runs["yardstick"], runs[side], strict=True)
            ratios = [after["rate"] / before["rate"] for before, after in both]
            row |= {f"{side}_over_yardstick": middle(ratios), f"{side}_ratios": [short(ratio) for ratio in ratios]}
        row["scan_startup_seconds"] = middle(run["startup"] for run in runs["scan"])
        row |= {f"scan_{name}": runs["scan"][0][name] for name in ("processes", "precision", "batch_size")}
        yield row | {"yardstick_threads": runs["yardstick"][0]["threads"], **vars(load_)}


def on_the_device(here: Path, device: str, chosen: list[Network]) -> Iterator[Figures]:
    """Distillation alone, of micro-batches as a scan has them."""
    kept = (
        "images_per_second",
        "plain_images_per_second",
        "tflops",
        "peak_tflops",
        "of_peak",
        "waiting",
        "kernels_a_step",
    )
    for network in chosen:
        found = child("device", model=make_model(here / "model.pt", network), device=device).figures()
        yield {"network": network.name} | {name: short(found[name]) for name in kept}


def as_it_grows(here: Path, device: str, counts: list[int], steps: int = 2) -> Iterator[Figures]:
    """Whole scans of more and more small images, of so few steps that all the rest shows."""
    common: Figures = {"model": make_model(here / "model.pt", SMALLEST), "device": device, "steps": steps}
    for count in counts:
        make_images(here / str(count), count, SMALLEST.size)
        found = scan(here / str(count), **common)
        row = {"images": count, "steps": steps, "processes": found["processes"], "peak_mib": found["peak_mib"]}
        row |= {"seconds": short(found["total"]), "startup_seconds": short(found["startup"])}
        yield row | {"images_per_second": short(found["rate"])}


def processes_or_threads(here: Path, chosen: list[Network], steps: int, repeats: int) -> Iterator[Figures]:
    """Distillation alone: the images a second of two processes of one thread over those of one process of two."""
    for network in chosen:
        common = {"model": make_model(here / "model.pt", network), "steps": steps}
        ratios = []
        for _ in range(repeats):
            one = child("loop", **common, threads=2, batches=2).figures()["rate"]
            two = [child("loop", **common, threads=1, batches=1) for _ in range(2)]
            ratios.append(sum(each.figures()["rate"] for each in two) / one)
        yield {"network": network.name, "ratio": middle(ratios), "ratios": [short(ratio) for ratio in ratios]}


def attention(here: Path, repeats: int) -> Iterator[Figures]:
    """Distillation alone, one thread: attention written out, as a scan has it on a CPU, over torch's fused."""
    for precision in ("bf16", "fp32"):
        common = {"model": make_model(here / "model.pt", VIT), "threads": 1, "batches": 1, "steps": 4}
        ratios = []
        for _ in range(repeats):
            both = (child("loop", **common, precision=precision, fused=fused) for fused in (True, False))
            fused, plain = (each.figures()["rate"] for each in both)
            ratios.append(plain / fused)
        yield {"network": VIT.name, "precision": precision, "ratio": middle(ratios), "ratios": list(map(short, ratios))}


def short(value: float) -> float:
    return float(f"{value:.3g}")


def middle(values: Iterable[float]) -> float:
    return short(statistics.median(values))


# --- The page ---

CAPTIONS = {
    "against_the_published": "The published loop and the scan",
    "on_the_device": "Distillation on the device: share of the peak of bf16 products, share of time without work",
    "as_it_grows": "Small images through timm's test_resnet: seconds with start-up, memory of all processes",
    "processes_or_threads": "Distillation in two processes of one thread over one process of two threads",
    "attention": "Distillation with attention written out over torch's fused attention, one thread",
}


def page(found: Figures) -> str:
    about = ", ".join(f"{key} {value}" for key, value in found["about"].items())
    lines = ["# Throughput", "", f"{about}.", "", "Made by `python -m tests.benchmarks.throughput`, which says how."]
    for what, caption in CAPTIONS.items():
        if rows := found.get(what):
            names = [name for name in rows[0] if name not in Load.__annotations__]
            heads = [name.replace("_", " ").replace(" per second", "/s").replace(" seconds", ", s") for name in names]
            lines += ["", f"## {caption}", "", f"| {' | '.join(heads)} |", "|---" * len(names) + "|"]
            lines += ["| " + " | ".join(str(row[name]).strip("[]") for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute or two: does it work?")
    parser.add_argument("--full", action="store_true", help="100,000 images too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/benchmarks/results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(RUNS[options.child[0]](**json.loads(options.child[1]))))
        return
    device, cpu, quick = options.device, options.device == "cpu", options.quick
    loads, repeats = QUICK if quick else CPU if cpu else GPU, 1 if quick else options.repeats
    options.out.mkdir(exist_ok=True)
    about = {"date": datetime.now(UTC).date().isoformat(), "python": platform.python_version()}
    about |= {"torch": torch.__version__, "timm": timm.__version__, "cdclean": cdclean.__version__}
    about["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    about |= {"device": device if cpu else torch.cuda.get_device_name(device)}
    about |= {"only": "a quick try, not figures"} if quick else {}
    found: Figures = {"about": about}
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        parts = {"against_the_published": against_the_published(here, device, loads, repeats)}
        if cpu or options.full:
            parts["as_it_grows"] = as_it_grows(here, device, [1000, *[10_000] * (not quick), *[100_000] * options.full])
        if cpu:
            some = [RESNET18] if quick else [RESNET18, RESNET50]
            parts["processes_or_threads"] = processes_or_threads(here, some, 2 if quick else 6, repeats)
            parts["attention"] = attention(here, repeats)
        else:
            parts = {"on_the_device": on_the_device(here, device, list(loads))} | parts
        for what, rows in parts.items():
            for row in rows:
                print(what, row, flush=True)
                found.setdefault(what, []).append(row)
                name = "throughput" if cpu else "throughput-gpu"
                (options.out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
                (options.out / f"{name}.md").write_text(page(found))


if __name__ == "__main__":
    main()
