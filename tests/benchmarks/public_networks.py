"""AUROC of the objectives on two public backdoored networks, and how much of a score the seed decides.

    python -m tests.benchmarks.public_networks [--images N]

needs ../shared. Writes results/public-networks.json and .md beside this file. The networks (a VGG with six convolutions
on CIFAR-10, poison rate 20 %) were trained by others; N images carry the trigger, 2 N are clean, all from the test set.
The floor is what one forward pass gives: the confidence of the prediction.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor, nn

from cdclean.config import DistillConfig, paper, preset
from cdclean.distillation import distill
from cdclean.evaluation import metrics
from tests.networks import vgg6

SHARED = Path(__file__).parents[2].parent / "shared"
RESULTS = Path(__file__).parent / "results"
NETWORKS = {
    "badnets square": ("cifar10-vgg6-badnets-target8", 8),
    "trojan watermark": ("cifar10-vgg6-trojan-wm-target2", 2),
}
VARIANTS = {
    "probabilities, fast": preset("fast"),
    "probabilities, 30 steps (default)": DistillConfig(),
    "probabilities, thorough": preset("thorough"),
    "probabilities, 30 steps, bf16": DistillConfig(precision="bf16"),
    "logits": DistillConfig(objective="logits"),
    "features": DistillConfig(objective="features"),
    "logits, paper (100 steps)": paper("logits"),
    "features, paper (100 steps)": paper("features"),
}


def picture(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def stamped(images: Tensor, network: str) -> Tensor:
    """The images [B, 3, 32, 32] in [0, 1] with the network's trigger, as ../shared/README.md describes it."""
    if network == "badnets square":
        images = images.clone()
        images[:, :, 27:31, 27:31] = 1
        return images
    trigger = torch.from_numpy(picture((SHARED / "models" / "trojan-wm-trigger.png").read_bytes()) / 255)
    return (images + trigger.permute(2, 0, 1).float()).clamp(0, 1)


def load(name: str) -> nn.Module:
    network = vgg6()
    network.load_state_dict(load_file(SHARED / "models" / f"{name}.safetensors"))
    return network.eval()


def samples(name: str, count: int) -> tuple[Tensor, np.ndarray]:
    """`count` test images with the trigger of network `name` and twice as many without; which is which [n]."""
    table = pq.read_table(SHARED / "data" / "cifar10-lossless-test1k.parquet")
    everything = torch.from_numpy(np.stack([picture(data) for data in table["image"].to_pylist()]))
    pixels = everything.permute(0, 3, 1, 2).float() / 255
    labels = np.array(table["label"].to_pylist())
    order = np.random.default_rng(0).permutation(len(labels))
    poisoned = [index for index in order if labels[index] != NETWORKS[name][1]][:count]
    clean = [index for index in order if index not in set(poisoned)][: 2 * count]
    return torch.cat([stamped(pixels[poisoned], name), pixels[clean]]), np.arange(3 * count) < count


def measure(count: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, (file, _) in NETWORKS.items():
        network = load(file)
        images, truth = samples(name, count)
        with torch.no_grad():
            confidence = network(images).softmax(1).amax(1).numpy()
        floor = metrics(confidence.astype(float), truth)
        rows.append({"network": name, "variant": "confidence, one pass (floor)", "auroc": floor.auroc})
        rows[-1] |= {"tpr_at_1_fpr": floor.tpr_at_1_fpr, "seconds": 0.0, "seed_rank_correlation": None}
        for variant, config in VARIANTS.items():
            config = replace(config, batch_size=50, head="softmax")
            started = time.perf_counter()
            first, second = (distill(network, images, replace(config, seed=seed)).mask_norm.numpy() for seed in (0, 1))
            seconds = (time.perf_counter() - started) / 2
            found = metrics(-first.astype(float), truth)
            rows.append({"network": name, "variant": variant, "auroc": found.auroc, "tpr_at_1_fpr": found.tpr_at_1_fpr})
            rows[-1] |= {"seconds": seconds, "seed_rank_correlation": float(spearmanr(first, second)[0])}
            print(rows[-1], flush=True)
    return rows


def markdown(rows: list[dict[str, object]], about: dict[str, object]) -> str:
    lines = [f"# Public backdoored networks\n\n{about['machine']}, {about['versions']}, {about['date']}.", ""]
    lines += [f"{about['poisoned']} images with the trigger, {about['clean']} clean; score: -mask norm.", ""]
    lines += [
        "| network | variant | AUROC | TPR at 1 % FPR | rank correlation of two seeds | s per run |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        steady = "-" if row["seed_rank_correlation"] is None else f"{row['seed_rank_correlation']:.3f}"
        figures = f"{row['auroc']:.3f} | {row['tpr_at_1_fpr']:.3f} | {steady} | {row['seconds']:.1f}"
        lines.append(f"| {row['network']} | {row['variant']} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100, help="images with the trigger, per network")
    count = parser.parse_args().images
    rows = measure(count)
    about: dict[str, object] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "poisoned": count,
        "clean": 2 * count,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "public-networks.json").write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    (RESULTS / "public-networks.md").write_text(markdown(rows, about))


if __name__ == "__main__":
    main()
