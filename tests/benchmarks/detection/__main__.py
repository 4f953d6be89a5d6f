"""Does it find backdoors, and does removing them work?

    python -m tests.benchmarks.detection --smoke | --cpu | --full [--only ATTACK,...] [--work FOLDER] [--jobs N]

needs ../shared. Every row plants one attack in a set of photographs (CIFAR-10, unless it says another) as a folder of
images, trains a network on it, scans, filters and trains again on the clean copy, with the command line that users
have. Rows are independent, and done once with the same default settings: a run that was stopped goes on, with the row
it was at from its last finished stage. Results: results/detection-<grid>.json and .md.

    python -m tests.benchmarks.detection --cpu --only wanet     that row alone, with what it needs
    python -m tests.benchmarks.detection --cpu --seed 1         the same on another draw

--smoke  two attacks and a clean control, 5,000 images: minutes
--cpu    every attack and control at 5 %: first on 10,000 images with 0.3 million parameters, then on 20,000 with 1.2
--full   ResNet-18 on 50,000 images with two recipes, and cross-sections; timm's at 224 px on Caltech-101: for a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from cdclean import storage
from tests.benchmarks.detection import table
from tests.benchmarks.detection.attacks import ATTACKS
from tests.benchmarks.detection.rows import Row, run, settings

RESULTS = Path(__file__).parents[1] / "results"
CROSS = ("badnets", "blend-noise", "wanet", "sig")  # attacks of the cross-sections
PHOTOGRAPHS = ("badnets", "blend-noise", "clean")  # whose triggers grow with the image
SMOKE = ("badnets", "blend-noise", "clean")


def smoke() -> Iterator[Row]:
    for attack in SMOKE:
        yield Row(attack, "tiny_resnet", "short", epochs=10, samples=5000, rate=0.1)


def cpu() -> Iterator[Row]:
    for attack in ATTACKS:
        yield Row(attack, "tiny_resnet", "short", epochs=10, samples=10_000)
    for attack in ATTACKS:
        yield Row(attack, "small_resnet", "modern", epochs=12, samples=20_000)


def full() -> Iterator[Row]:
    for recipe, epochs in (("modern", 30), ("plain", 60)):
        for attack in ATTACKS:
            yield Row(attack, "resnet18", recipe, epochs, samples=50_000)
    for attack in CROSS:
        for rate in (0.01, 0.1):
            yield Row(attack, "resnet18", "modern", 30, 50_000, rate)
        for network in ("vgg13", "mobilenet_v2", "small_vit"):
            yield Row(attack, network, "modern", 30, 50_000)
    for attack in PHOTOGRAPHS:
        yield Row(attack, "timm_resnet18", "short", 60, samples=512, rate=0.1, dataset="caltech16")


GRIDS = {"smoke": smoke, "cpu": cpu, "full": full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    for name in GRIDS:
        which.add_argument(f"--{name}", dest="grid", action="store_const", const=name)
    parser.add_argument("--only", help="attacks, separated by commas")
    parser.add_argument("--network", help="rows with this network alone")
    parser.add_argument("--seed", type=int, default=0, help="of images, poison and training; default: 0")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cdclean-detection")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, help="rows at a time; default: one a core, or one on a GPU")
    parser.add_argument("--again", action="store_true", help="rows that have a result too")
    arguments = parser.parse_args()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    jobs = arguments.jobs or (1 if device != "cpu" else os.cpu_count() or 1)
    arguments.results.mkdir(parents=True, exist_ok=True)  # now, not when the first row is done
    place = arguments.results / f"detection-{arguments.grid}.json"
    done: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    rows = [replace(row, seed=arguments.seed) for row in GRIDS[arguments.grid]()]
    if arguments.only:
        rows = [row for row in rows if row.attack in arguments.only.split(",")]
    if arguments.network:
        rows = [row for row in rows if row.network == arguments.network]
    todo = [row for row in rows if arguments.again or done.get(row.name, {}).get("settings") != settings()]
    print(f"{len(todo)} of {len(rows)} rows to do, {jobs} at a time, on {device}; work in {arguments.work}", flush=True)
    failed = 0
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = {pool.submit(run, row, arguments.work, device): row for row in todo}
        for future in as_completed(futures):
            row = futures[future]
            try:
                result = future.result()
            except Exception:
                failed += 1
                print(f"{row.name} failed:\n{traceback.format_exc()}", flush=True)
                continue
            print(f"{row.name}: {result['seconds']} s, {result['scores'].get('default', result['auto'])}", flush=True)
            done[row.name] = result | about(device)
            storage.write_json(place, done)
            place.with_suffix(".md").write_text(table.markdown(arguments.grid, list(done.values())))
    if failed:
        raise SystemExit(f"{failed} rows failed; the same command tries them again")


def about(device: str) -> dict[str, str]:
    machine = torch.cuda.get_device_name() if device != "cpu" else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return {"machine": machine, "versions": versions, "date": datetime.now(UTC).date().isoformat()}


if __name__ == "__main__":
    main()
