"""One row of the benchmark: plant a backdoor, train on it, scan with the command line, clean, train again, count.

Every stage leaves its result in the row's folder, so that a row that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cdclean import evaluation, margins, records, schema, separation, storage, verdict
from cdclean.config import DistillConfig, fingerprint, to_dict
from cdclean.models import Normalized
from tests.benchmarks.detection import data, fitting, neighbours, networks, table
from tests.benchmarks.detection.attacks import ATTACKS, TARGET, Site
from tests.benchmarks.detection.fitting import Recipe

ROOT = Path(__file__).parents[3]
SCORED = 100  # poisoned samples that the slower objectives are measured on, beside twice as many clean ones
OBJECTIVES = {
    "logits, paper": ["--preset", "paper", "--objective", "logits"],
    "features, paper": ["--preset", "paper", "--objective", "features"],
}


@dataclass(frozen=True)
class Row:
    """What is done, all of it drawn from `seed`."""

    attack: str
    network: str  # factory in networks.py
    recipe: str  # "modern" or "plain"
    epochs: int
    samples: int  # training images
    rate: float = 0.05
    seed: int = 0
    dataset: str = "cifar10"  # in data.py

    @property
    def name(self) -> str:
        drawn = f"{self.epochs}x{self.samples}-{self.rate:g}-{self.seed}{self.suffix}"
        return f"{self.attack}-{self.network}-{self.recipe}-{drawn}"

    @property
    def suffix(self) -> str:
        """Of names of files: none for CIFAR-10, whose rows were named when there was nothing else."""
        return "" if self.dataset == "cifar10" else f"-{self.dataset}"


def run(row: Row, work: Path, device: str) -> dict[str, Any]:
    """All stages of a row; the numbers that the table is made from."""
    if device == "cpu":
        torch.set_num_threads(1)  # a process a core, each with a row of its own
    started = time.monotonic()
    folder = work / row.name
    folder.mkdir(parents=True, exist_ok=True)
    _forget_other_settings(folder)
    recipe: Recipe = getattr(fitting, row.recipe)(row.epochs)
    dataset = data.DATASETS[row.dataset]
    build = partial(_untrained, row.network, dataset)
    poisoned = _plant(row, work, recipe, device)
    data.write_folder(folder / "train", poisoned.images, poisoned.labels, poisoned.is_backdoor)
    keys, images, labels = data.read_folder(folder / "train")
    truth = data.read_truth(folder / "train.csv")
    is_backdoor = np.array([truth[key] for key in keys])

    victim = _trained(folder / "victim.safetensors", build, images, labels, recipe, row.seed, device)
    found: dict[str, Any] = {"row": vars(row), "half": ATTACKS[row.attack].half, "poison": int(is_backdoor.sum())}
    found["before"] = _attacked(victim, poisoned, dataset)
    storage.write_json(folder / "before.json", found["before"])
    if is_backdoor.any():
        honest = _honest(row, work, recipe, device)
        found["chance"] = _attacked(honest, poisoned, dataset)["attack_success"]

    scan = Scanner(folder, row, device)
    whole = scan("train", "default", [])
    found["scores"] = {"default": _measured(whole, folder / "train.csv")}
    found["auto"] = _filtered(whole, folder, ["--auto"], is_backdoor, keys)
    dropped = found["auto"]
    if is_backdoor.any():
        found["scores"][table.AUTO] = _suspects_first(whole, folder / "train.csv")
        if dropped["verdict"] != "backdoor":
            dropped = _filtered(whole, folder, _by_eye(whole, folder / "train.csv"), is_backdoor, keys)
        found["cleaned"] = {name: dropped[name] for name in ("rule", "poison_dropped", "clean_dropped")}
        kept, kept_images, kept_labels = data.read_folder(folder / "clean")
        place = folder / f"again-{fingerprint(list(kept))[:12]}.safetensors"  # another copy, another network
        again = _trained(place, build, kept_images, kept_labels, recipe, row.seed, device)
        found["after"] = _attacked(again, poisoned, dataset)
        _write_part(folder, keys, is_backdoor, row.seed)
        for title, flags in OBJECTIVES.items():
            found["scores"][title] = _measured(scan("part", title.replace(", ", "-"), flags), folder / "train.csv")
        _write_attacked(folder / "test", poisoned, dataset, row.seed)
        found["scores"]["default, test set"] = _measured(scan("test", "test", []), folder / "test.csv")
        found["scores"] |= _neighbours(victim, images, labels, is_backdoor, row, whole, keys)
    else:
        found["density"] = _quantiles(whole)
    found |= {"seconds": round(time.monotonic() - started), "settings": settings()}
    return found


def settings() -> str:
    """What scans and verdicts of a row depend on beside the row; with other defaults it has to be done again."""
    thresholds = {
        f"{room.__name__}.{name}": value
        for room in (verdict, separation, margins)
        for name, value in vars(room).items()
        if name.isupper() and isinstance(value, int | float | tuple)
    }
    return fingerprint([scan_settings(), thresholds])[:12]


def scan_settings() -> str:
    """What scans of a row depend on beside the row."""
    return fingerprint([to_dict(DistillConfig()), schema.RECORDS.names])[:12]


def _forget_other_settings(folder: Path) -> None:
    """Remove scans that were made with other settings; data and networks do not depend on them."""
    stamp = folder / "settings"
    if not stamp.exists() or stamp.read_text() != scan_settings():
        for run in folder.glob("*.cdclean"):
            shutil.rmtree(run)
        stamp.write_text(scan_settings())


# --- Plant and train ---


def _plant(row: Row, work: Path, recipe: Recipe, device: str) -> data.Poisoned:
    dataset = data.DATASETS[row.dataset]
    images, labels = data.load(dataset, "train", row.samples, row.seed)

    def surrogate() -> nn.Module:
        place = work / f"surrogate-{row.samples}-{row.recipe}-{row.epochs}-{row.seed}{row.suffix}.safetensors"
        build = partial(_untrained, "tiny_resnet", dataset)
        return _trained(place, build, images, labels, recipe, row.seed + 1, device)

    site = Site(images, labels, dataset.classes, row.rate, row.seed, device, surrogate)
    return ATTACKS[row.attack].plant(site)


def _honest(row: Row, work: Path, recipe: Recipe, device: str) -> nn.Module:
    """The network of the row's clean control: what it does when it sees the trigger is chance."""
    control = replace(row, attack="clean")
    folder = work / control.name
    folder.mkdir(parents=True, exist_ok=True)
    clean = _plant(control, work, recipe, device)
    data.write_folder(folder / "train", clean.images, clean.labels, clean.is_backdoor)
    _, images, labels = data.read_folder(folder / "train")
    build = partial(_untrained, row.network, data.DATASETS[row.dataset])
    return _trained(folder / "victim.safetensors", build, images, labels, recipe, row.seed, device)


def _untrained(network: str, dataset: data.Dataset) -> Normalized:
    return Normalized(getattr(networks, network)(dataset.classes), dataset.mean, dataset.std)


def _trained(
    place: Path,
    build: Callable[[], Normalized],
    images: data.Pixels,
    labels: data.Labels,
    recipe: Recipe,
    seed: int,
    device: str,
) -> nn.Module:
    """The network whose weights are at `place`, trained now if there are none."""
    if not place.exists():
        network = fitting.fit(build, images, labels, recipe, seed, device).network
        unfinished = place.with_suffix(f".{os.getpid()}")
        save_file({name: value.contiguous().cpu() for name, value in network.state_dict().items()}, unfinished)
        unfinished.rename(place)
    module = build()
    module.network.load_state_dict(load_file(place))
    return module.to(device).eval().requires_grad_(False)


def _attacked(victim: nn.Module, poisoned: data.Poisoned, dataset: data.Dataset) -> dict[str, float]:
    """Clean accuracy and attack success on test images: of those the trigger is meant for, whose label it changes."""
    images, labels = data.load(dataset, "test", 2000)
    meant = poisoned.meant(labels)
    obeyed = fitting.predict(victim, poisoned.stamp(images[meant])) == poisoned.wanted(labels[meant])
    right = fitting.predict(victim, images) == labels
    return {"accuracy": float(right.mean()), "attack_success": float(obeyed.mean())}


def _write_part(folder: Path, keys: Sequence[str], is_backdoor: data.Mask, seed: int) -> None:
    generator = np.random.default_rng([seed, 9])
    chosen = generator.permutation(np.flatnonzero(is_backdoor))[:SCORED]
    others = generator.permutation(np.flatnonzero(~is_backdoor))[: 2 * SCORED]
    data.link_folder(folder / "part", folder / "train", [keys[i] for i in sorted([*chosen, *others])])


def _write_attacked(folder: Path, poisoned: data.Poisoned, dataset: data.Dataset, seed: int) -> None:
    """A test set under attack: SCORED images with the trigger, under the label wanted, and twice as many without.

    Of a small set a third with it, the others without.
    """
    images, labels = data.load(dataset, "test", 6 * SCORED, seed + 1)
    count = min(SCORED, len(labels) // 3)
    chosen = np.flatnonzero(poisoned.meant(labels))[:count]
    rest = np.setdiff1d(np.arange(len(labels)), chosen)[: 2 * count]
    data.write_folder(
        folder,
        np.concatenate([poisoned.stamp(images[chosen]), images[rest]]),
        np.concatenate([poisoned.wanted(labels[chosen]), labels[rest]]),
        np.arange(len(chosen) + len(rest)) < len(chosen),
    )


# --- Scan and filter, as a user does ---


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`cdclean ARGUMENTS`, from the project's root, so that `--arch` finds the networks here."""
    return subprocess.run([sys.executable, "-m", "cdclean", *arguments], cwd=ROOT, capture_output=True, text=True)


@dataclass(frozen=True)
class Scanner:
    folder: Path
    row: Row
    device: str

    def __call__(self, dataset: str, name: str, flags: Sequence[str]) -> Path:
        """Scan `dataset` of the row's folder with `flags` more; the finished run."""
        run = self.folder / f"{name}.cdclean"
        about = data.DATASETS[self.row.dataset]
        flags = [*flags, "--device", self.device, "--engine", "serial"]  # other rows are at work beside it
        done = command(
            *("scan", str(self.folder / dataset), "--model", str(self.folder / "victim.safetensors")),
            *("--arch", f"tests.benchmarks.detection.networks:{self.row.network}", "--input-size", str(about.size)),
            *("--mean", ",".join(map(str, about.mean)), "--std", ",".join(map(str, about.std))),
            *("--out", str(run), "--thumbnail-size", "0", "--quiet", *flags),
        )
        if done.returncode:
            raise RuntimeError(f"scan ended with {done.returncode}: {done.stderr}")
        return run


def _filtered(
    run: Path, folder: Path, rule: Sequence[str], is_backdoor: data.Mask, keys: Sequence[str]
) -> dict[str, Any]:
    """Write the clean copy by a rule; shares of the poison and of the clean samples that it drops."""
    done = command("filter", str(run), *rule, "--out", str(folder / "clean"), "--overwrite", "--json")
    if done.returncode not in (0, 5):
        raise RuntimeError(f"filter ended with {done.returncode}: {done.stderr}")
    result: dict[str, Any] = {"rule": " ".join(rule), "verdict": None, "poison_dropped": 0.0, "clean_dropped": 0.0}
    if rule[0] == "--auto":
        found = verdict.judge(run)
        result |= {"verdict": found.outcome, "sentence": found.sentence}
    if done.returncode == 0:
        listed = records.read_columns(run, ["key"])
        kept = {path.relative_to(folder / "clean").as_posix() for path in (folder / "clean").glob("*/*.png")}
        assert set(listed["key"].to_pylist()) >= kept
        dropped = np.array([key not in kept for key in keys])
        if is_backdoor.any():
            result["poison_dropped"] = float(dropped[is_backdoor].mean())
        result["clean_dropped"] = float(dropped[~is_backdoor].mean())
    return result


def _by_eye(run: Path, truth: Path) -> list[str]:
    """What a reader of the report does without a clear verdict: drop the group of the two shown that holds the poison.

    Where no groups are shown, the smallest tenth.
    """
    judged, labelled = verdict.judge(run), data.read_truth(truth)
    if not judged.undecided or judged.beyond is None:
        return ["--quantile", "0.1"]
    first = judged.undecided[0]
    listed = records.read_aligned(run, ["prediction"])
    poison = np.array([labelled[key] for key in listed["key"].to_pylist()])
    poison &= listed["prediction"].to_numpy() == first.index
    in_a = int((poison & (judged.beyond > 0)).sum())
    return ["--group", f"{first.name}/{'A' if 2 * in_a > poison.sum() else 'B'}"]


# --- Count ---


def _measured(run: Path, truth: Path) -> dict[str, float]:
    labelled = data.read_truth(truth)
    listed = records.read_columns(run, ["key", "mask_norm"])
    is_backdoor = np.array([labelled[key] for key in listed["key"].to_pylist()])
    if not is_backdoor.any():
        return {}
    return as_metrics(-listed["mask_norm"].to_numpy(), is_backdoor)


def _suspects_first(run: Path, truth: Path) -> dict[str, float]:
    """Of the order that --auto makes: its suspects first, each part by mask norm."""
    labelled = data.read_truth(truth)
    listed = records.read_aligned(run, ["mask_norm"])
    norm = listed["mask_norm"].to_numpy()
    is_backdoor = np.array([labelled[key] for key in listed["key"].to_pylist()])
    return as_metrics(np.where(verdict.judge(run).suspects, 0, -norm.max()) - norm, is_backdoor)


def as_metrics(score: np.ndarray, is_backdoor: data.Mask) -> dict[str, float]:
    """Of a score, large = suspicious."""
    found = evaluation.metrics(score.astype(np.float64), is_backdoor)
    figures = {"auroc": found.auroc, "ap": found.average_precision, "tpr_at_1_fpr": found.tpr_at_1_fpr}
    return {name: round(float(value), 4) for name, value in figures.items()}


def _quantiles(run: Path) -> dict[str, float]:
    density = records.read_columns(run, ["mask_density"])["mask_density"].to_numpy()
    return {f"q{share:g}": round(float(np.quantile(density, share)), 4) for share in (0.001, 0.01, 0.05, 0.5, 0.95)}


def _neighbours(
    victim: nn.Module,
    images: data.Pixels,
    labels: data.Labels,
    is_backdoor: data.Mask,
    row: Row,
    run: Path,
    keys: Sequence[str],
) -> dict[str, dict[str, float]]:
    """The other detectors on the same samples, and the mask norm's rank added to that of each one-pass score."""
    dataset = data.DATASETS[row.dataset]
    trusted, trusted_labels = data.load(dataset, "test", 500, row.seed + 2)
    device = next(victim.buffers()).device
    scores = neighbours.scores(
        victim,
        fitting.to_tensor(images).to(device),
        torch.from_numpy(labels),
        fitting.to_tensor(trusted).to(device),
        torch.from_numpy(trusted_labels),
        seed=row.seed,
        batch=dataset.batch,
    )
    found = {name: as_metrics(score, is_backdoor) for name, score in scores.items()}
    listed = records.read_columns(run, ["key", "mask_norm"])
    norms = dict(zip(listed["key"].to_pylist(), listed["mask_norm"].to_pylist(), strict=True))
    mask = np.array([-norms[key] for key in keys]).argsort().argsort()
    for name in ("confidence", "margin"):
        both = mask + scores[name].argsort().argsort()
        found[f"mask norm + {name}, ranks"] = as_metrics(both, is_backdoor)
    return found


__all__ = ["TARGET", "Row", "run"]
