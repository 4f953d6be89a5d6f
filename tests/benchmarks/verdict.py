"""What `--auto` drops: of the poison and of the clean images, on two public backdoored networks and a clean one.

    python -m tests.benchmarks.verdict [--images N]

needs ../shared. Writes results/verdict.json and .md beside this file. The networks were trained by others on CIFAR-10,
two of them with a backdoor (poison rate 20 %). Each image is scored once with the default settings; datasets of several
poison rates are then put together from the scores, the images with the trigger drawn anew for each of several draws.
The poisoned ones carry the target's label and were images of other classes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cdclean.config import DistillConfig
from cdclean.distillation import distill
from cdclean.evaluation import metrics
from cdclean.verdict import decide
from tests.benchmarks.public_networks import NETWORKS, RESULTS, SHARED, load, picture, stamped
from tests.networks import resnet20

RATES = (0.0, 0.01, 0.02, 0.05, 0.1)
DRAWS = 10
GOAL = "at least 90 % of the poison with at most 2 % of the clean images; of a clean dataset at most 0.5 %"
CLEAN = "ResNet-20, clean"


class Normalised(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1))
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def clean_network() -> nn.Module:
    network = resnet20()
    network.load_state_dict(load_file(SHARED / "models" / "cifar10-resnet20-clean.safetensors"))
    return Normalised(network).eval()


def score(network: nn.Module, images: Tensor) -> dict[str, np.ndarray]:
    found = distill(network, images, DistillConfig(batch_size=32, head="softmax", precision="fp32"))
    assert found.logits is not None
    assert found.embedding is not None
    best = found.logits.topk(2, 1).values
    return {
        "embedding": found.embedding.numpy(),
        "density": (found.mask_norm / (images.shape[2] * images.shape[3])).double().numpy(),
        "classes": found.logits.argmax(1).numpy(),
        "margin": (best[:, 0] - best[:, 1]).double().numpy(),
    }


def measure(count: int) -> list[dict[str, object]]:
    table = pq.read_table(SHARED / "data" / "cifar10-lossless-test1k.parquet").slice(0, count)
    pixels = torch.from_numpy(np.stack([picture(data) for data in table["image"].to_pylist()]))
    pixels = pixels.permute(0, 3, 1, 2).float() / 255
    labels = np.array(table["label"].to_pylist())
    rows = [row(CLEAN, 0.0, [score(clean_network(), pixels)], len(labels))]
    for name, (file, target) in NETWORKS.items():
        network, random = load(file), np.random.default_rng(0)
        most = round(max(RATES) / (1 - max(RATES)) * len(labels))
        chosen = random.permutation(np.flatnonzero(labels != target))[:most]
        scores = score(network, torch.cat([pixels, stamped(pixels[chosen], name)]))
        for rate in RATES:
            poison = round(rate / (1 - rate) * len(labels))
            draws = []
            for _ in range(DRAWS if 0 < poison < most else 1):
                drawn = len(labels) + random.permutation(most)[:poison]
                draws.append({k: v[np.r_[: len(labels), drawn]] for k, v in scores.items()})
            rows.append(row(name, rate, draws, len(labels)))
    return rows


def row(name: str, rate: float, draws: list[dict[str, np.ndarray]], clean: int) -> dict[str, object]:
    """What the verdict does to datasets whose first `clean` samples are clean, and what a fixed quantile would do."""
    verdicts = [decide(draw["density"], draw["classes"], draw["margin"], (), draw["embedding"]) for draw in draws]
    poison = len(draws[0]["density"]) - clean
    found = [verdict.suspects[clean:].mean() if poison else None for verdict in verdicts]
    lost = [verdict.suspects[:clean].mean() for verdict in verdicts]
    tenth = [draw["density"] <= np.quantile(draw["density"], 0.1) for draw in draws]
    auroc = [metrics(-draw["density"], np.arange(len(draw["density"])) >= clean).auroc for draw in draws if poison]
    good = [
        bool(a is None and b <= 0.005) or bool(a is not None and a >= 0.9 and b <= 0.02)
        for a, b in zip(found, lost, strict=True)
    ]
    result: dict[str, object] = {
        "network": name,
        "poison_rate": rate,
        "poisoned": poison,
        "draws": len(draws),
        "outcomes": {kind: sum(v.outcome == kind for v in verdicts) for kind in ("clean", "unclear", "backdoor")},
        "poison_dropped": [float(np.mean(found)), float(np.min(found))] if poison else None,
        "clean_dropped": [float(np.mean(lost)), float(np.max(lost))],
        "goal_met": sum(good),
        "auroc": [round(float(pick(auroc)), 4) for pick in (np.mean, np.min)] if poison else None,
        "tenth_poison": float(np.mean([kept[clean:].mean() for kept in tenth])) if poison else None,
        "tenth_clean": float(np.mean([kept[:clean].mean() for kept in tenth])),
    }
    print(result, flush=True)
    return result


def share(value: object) -> str:
    return "-" if value is None else f"{100 * float(value):.1f} %"  # type: ignore[arg-type]


def markdown(rows: list[dict[str, object]], about: dict[str, object]) -> str:
    lines = [f"# The verdict of `--auto`\n\n{about['machine']}, {about['versions']}, {about['date']}.", ""]
    lines += [f"{about['clean']} clean CIFAR-10 test images (original pixels), scored with the default settings; goal:"]
    lines += [f"{GOAL}. AUROC and shares are means over the draws, the worst draw in brackets; on the right what", ""]
    lines[-2] += " `--quantile 0.1` drops of the same datasets. Thresholds were chosen with these networks in view."
    lines += [
        "| network | poison | AUROC | verdicts | poison dropped | clean dropped | goal met | 10 %: poison | clean |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for each in rows:
        poison, clean, outcomes = each["poison_dropped"], each["clean_dropped"], each["outcomes"]
        assert isinstance(clean, list)
        assert isinstance(outcomes, dict)
        kinds = ", ".join(f"{kind} {n}" for kind, n in outcomes.items() if n)
        dropped = f"{share(poison[0])} ({share(poison[1])})" if isinstance(poison, list) else "-"
        auroc = f"{each['auroc'][0]:.3f} ({each['auroc'][1]:.3f})" if isinstance(each["auroc"], list) else "-"
        lines.append(
            f"| {each['network']} | {share(each['poison_rate'])} ({each['poisoned']}) | {auroc} | {kinds} | "
            f"{dropped} | {share(clean[0])} ({share(clean[1])}) | {each['goal_met']} of {each['draws']} | "
            f"{share(each['tenth_poison'])} | {share(each['tenth_clean'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="clean images, up to 1000")
    count = parser.parse_args().images
    about: dict[str, object] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, scikit-learn {version('scikit-learn')}, "
        f"Python {platform.python_version()}",
        "clean": count,
        "goal": GOAL,
    }
    rows = measure(count)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "verdict.json").write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    (RESULTS / "verdict.md").write_text(markdown(rows, about))


if __name__ == "__main__":
    main()
