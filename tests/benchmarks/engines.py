"""What chunks and engines cost against a bare loop, and what a second worker process gains.

`python -m tests.benchmarks.engines` runs the variants in turn, several times, and writes results/engines.{json,md}.
The bare loop decodes, distils and draws thumbnails of the same images with the same functions and micro-batches, and
keeps nothing: no manifest, no chunks, no records, no events, no fsync. Every variant uses one thread an operation.
Engines with processes are measured from the start of their first chunk to the end of their last; how long the processes
take to be ready stands beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

import cdclean
from cdclean import events
from cdclean.chunk import classifier_on, distil_pixels
from cdclean.config import DistillConfig, ModelSpec, ScanConfig
from cdclean.images import decode, make_transform
from cdclean.pixels import decoders, pictures
from cdclean.run import scan

RESULTS = Path(__file__).parent / "results"
SIZE, BATCH, CHUNK = 32, 32, 64


def make(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / "abc"[index % 3] / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)


def bare(data: Path, spec: ModelSpec, config: DistillConfig) -> float:
    """Seconds of the loop that keeps nothing."""
    classifier = classifier_on(spec, "cpu", "fp32", "probabilities")
    started = time.perf_counter()
    transform = make_transform(classifier.geometry, classifier.mean)
    paths = sorted(data.rglob("*.png"))

    def read(path: Path) -> torch.Tensor:
        content = path.read_bytes()
        hashlib.sha256(content)  # as every record has one
        return decode(content, transform, 3).pixels

    with decoders() as pool:
        for first in range(0, len(paths), BATCH):
            pixels = tuple(pool.map(read, paths[first : first + BATCH]))
            distilled, _ = distil_pixels(classifier, torch.stack(pixels), config, "cpu")
            list(pictures(pixels, distilled.masks, 96, pool))
    return time.perf_counter() - started


def engine(settings: ScanConfig, run: Path) -> tuple[float, float]:
    """Seconds from the start of the first chunk to the end of the last, and until the first one was begun."""
    scan(replace(settings, out=str(run), overwrite=True))
    begun, chunks = 0.0, []
    for event in events.read(run):
        at = datetime.fromisoformat(event["time"]).timestamp()
        if event["event"] == "start":
            begun = at
        elif event["event"] == "chunk":
            chunks.append((at - event["seconds"], at))
    first = min(start for start, _ in chunks)
    return max(end for _, end in chunks) - first, first - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in ("bare loop", "serial", "1 worker", "2 workers")}
    ready: dict[str, list[float]] = {name: [] for name in times}
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        make(here / "data", options.images)
        torch.manual_seed(0)
        torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), here / "test_resnet.pt")
        spec = ModelSpec(str(here / "test_resnet.pt"), input_size=(SIZE, SIZE))
        config = DistillConfig(batch_size=BATCH, head="softmax", precision="fp32")
        settings = ScanConfig(str(here / "data"), spec, config, device="cpu", chunk_size=CHUNK)
        bare(here / "data", spec, replace(config, steps=1))  # whatever is done once, is done now
        for _ in range(options.repeats):
            times["bare loop"].append(bare(here / "data", spec, config))
            for what, changes in (
                ("serial", {}),
                ("1 worker", {"engine": "local", "workers": 1}),
                ("2 workers", {"engine": "local", "workers": 2}),
            ):
                changed: ScanConfig = replace(settings, **changes)  # type: ignore[arg-type]
                seconds, start = engine(changed, here / "run.cdclean")
                times[what].append(seconds)
                ready[what].append(start)
    rows: list[dict[str, Any]] = []
    for what, seconds_each in times.items():
        ratios = [each / base for each, base in zip(seconds_each, times["bare loop"], strict=True)]
        middle = statistics.median(seconds_each)
        rows.append(
            {
                "what": what,
                "seconds": [round(each, 2) for each in seconds_each],
                "images_per_second": round(options.images / middle, 1),
                "ratio_to_bare_loop": round(statistics.median(ratios), 3),
                "ready_after_seconds": round(statistics.median(ready[what]), 1) if ready[what] else None,
            }
        )
        print(rows[-1])
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cdclean": cdclean.__version__,
        "images": options.images,
        "steps": config.steps,
    }
    (RESULTS / "engines.json").write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
    lines = ["# What chunks and engines cost", "", ", ".join(f"{key} {value}" for key, value in about.items()) + "."]
    lines += ["", "timm:test_resnet at 32 px, chunks of 64, one thread an operation; medians of runs in turn. Made by"]
    lines += ["`python -m tests.benchmarks.engines`, which says what is measured.", ""]
    lines += ["| variant | seconds | images/s | time / bare loop | ready after, s |", "|---|---|---|---|---|"]
    for row in rows:
        seconds = ", ".join(f"{each:.1f}" for each in row["seconds"])
        after = "" if row["ready_after_seconds"] is None else f"{row['ready_after_seconds']:.1f}"
        figures = f"{row['images_per_second']:.1f} | {row['ratio_to_bare_loop']:.3f}"
        lines.append(f"| {row['what']} | {seconds} | {figures} | {after} |")
    (RESULTS / "engines.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
