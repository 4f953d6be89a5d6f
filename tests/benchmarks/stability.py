"""How much of a score is rounding and chance: other seeds, batch sizes, precisions and image sizes, on known backdoors.

    python -m tests.benchmarks.stability [--images N]

needs ../shared. The two public backdoored networks, N images with the trigger and 2 N without, default settings; each
row changes one thing and compares with the first: rank correlation of the mask norms, and AUROC. For the image sizes
the pictures are enlarged and the network shrinks them again before it looks, so that it gives the same answers at 32,
64 and 224 px: a price per area must then give the same densities. Writes results/stability.json and .md.
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from cdclean import storage
from cdclean.config import DistillConfig, preset
from cdclean.distillation import distill
from cdclean.evaluation import metrics
from tests.benchmarks.public_networks import NETWORKS, RESULTS, load, samples

BATCH = 32
DEFAULT = DistillConfig(batch_size=BATCH, head="softmax", precision="fp32")
THOROUGH = replace(preset("thorough"), batch_size=BATCH, head="softmax", precision="fp32")
CHANGES: dict[str, tuple[DistillConfig, int]] = {  # what is changed -> settings, image size in pixels
    "nothing (fp32, batch 32, seed 0, 32 px)": (DEFAULT, 32),
    "seed 1": (replace(DEFAULT, seed=1), 32),
    "batch 7": (replace(DEFAULT, batch_size=7), 32),
    "batch 64": (replace(DEFAULT, batch_size=64), 32),
    "bf16": (replace(DEFAULT, precision="bf16"), 32),
    "fp16": (replace(DEFAULT, precision="fp16"), 32),
    "fp64": (replace(DEFAULT, precision="fp64"), 32),
    "64 px": (DEFAULT, 64),
    "224 px": (replace(DEFAULT, batch_size=8), 224),
    "thorough": (THOROUGH, 32),
    "thorough, seed 1": (replace(THOROUGH, seed=1), 32),
}


class Shrinking(nn.Module):
    """A network for 32 px behind an area average, so that it sees the same at any larger size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(F.adaptive_avg_pool2d(pixels, 32))  # type: ignore[no-any-return]


def densities(network: nn.Module, images: Tensor, config: DistillConfig, size: int) -> np.ndarray:
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    model = Shrinking(network).to(dtype)
    shown = F.interpolate(images.to(dtype), size, mode="nearest").clamp(0, 1)
    norms = distill(model, shown, config).mask_norm / size**2
    network.float()
    return norms.double().numpy()


def measure(count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, (file, _) in NETWORKS.items():
        network = load(file)
        images, truth = samples(name, count)
        base: dict[str, np.ndarray] = {}
        for what, (config, size) in CHANGES.items():
            found = densities(network, images, config, size)
            against = "thorough" if what.startswith("thorough,") else next(iter(CHANGES))
            base[what] = found
            compared = base[against]
            row: dict[str, Any] = {"network": name, "changed": what}
            row["auroc"] = metrics(-found, truth).auroc
            row["rank_correlation"] = None if found is compared else float(spearmanr(compared, found)[0])
            change = np.abs(found - compared) / np.maximum(compared, 1e-6)
            row |= {"median_change": float(np.median(change)), "largest_change": float(change.max())}
            row["median_density"] = float(np.median(found))
            rows.append(row)
            print(row, flush=True)
    return rows


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [f"# How steady a score is\n\n{about['machine']}, {about['versions']}, {about['date']}.", ""]
    lines += [f"{about['poisoned']} images with the trigger, {about['clean']} without; `thorough, seed 1` is compared "]
    lines[-1] += "with `thorough`, the others with the first row. Goal: rank correlation 0.99, AUROC within 0.003."
    lines += [
        "",
        "| network | changed | AUROC | rank correlation | change of a norm, median | largest | median density |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        rank = "-" if row["rank_correlation"] is None else f"{row['rank_correlation']:.4f}"
        changes = f"{row['median_change']:.2%} | {row['largest_change']:.1%} | {row['median_density']:.4f}"
        lines.append(f"| {row['network']} | {row['changed']} | {row['auroc']:.4f} | {rank} | {changes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40, help="images with the trigger, per network")
    count = parser.parse_args().images
    rows = measure(count)
    about: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "poisoned": count,
        "clean": 2 * count,
    }
    storage.write_json(RESULTS / "stability.json", about | {"rows": rows})
    (RESULTS / "stability.md").write_text(markdown(rows, about))


if __name__ == "__main__":
    main()
