"""The grids of the detection benchmark, how their networks are scanned, and how their results are grouped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from cdclean.config import ModelSpec
from cdclean.models import load
from tests.benchmarks.detection import networks, table
from tests.benchmarks.detection.__main__ import GRIDS
from tests.benchmarks.detection.attacks import ATTACKS
from tests.benchmarks.detection.data import DATASETS
from tests.benchmarks.detection.missed import Missed, reading
from tests.benchmarks.detection.objectives import cascade, stopped
from tests.benchmarks.detection.rows import Row

EVERY = [row for grid in GRIDS.values() for row in grid()]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_row_has_a_name_of_its_own(grid: str) -> None:
    names = [row.name for row in GRIDS[grid]()]
    assert len(set(names)) == len(names)


def test_a_row_keeps_its_name() -> None:
    """Folders and results of earlier runs are found by it."""
    row = Row("badnets", "tiny_resnet", "short", epochs=10, samples=10_000)
    assert row.name == "badnets-tiny_resnet-short-10x10000-0.05-0"
    row = Row("wanet", "timm_resnet18", "short", 60, 512, 0.1, seed=3, dataset="caltech16")
    assert row.name == "wanet-timm_resnet18-short-60x512-0.1-3-caltech16"


def test_the_full_grid_has_photographs_of_224_px() -> None:
    rows = [row for row in GRIDS["full"]() if DATASETS[row.dataset].size == 224]
    assert {row.attack for row in rows} == {"badnets", "blend-noise", "clean"}
    assert {row.network for row in rows} == {"timm_resnet18"}


@pytest.mark.parametrize(("network", "dataset"), sorted({(row.network, row.dataset) for row in EVERY}))
def test_a_scan_shows_a_network_what_it_was_trained_on(network: str, dataset: str, tmp_path: Path) -> None:
    about = DATASETS[dataset]
    place = tmp_path / "victim.safetensors"
    save_file(getattr(networks, network)(about.classes).state_dict(), place)
    arch = f"tests.benchmarks.detection.networks:{network}"
    found = load(ModelSpec(str(place), arch, (about.size, about.size), about.mean, about.std))
    assert found.classes == about.classes
    assert (found.geometry.height, found.geometry.width) == (about.size, about.size)
    assert found.geometry.crop_pct == 1.0  # or the edge, where many triggers are, would be cut off


# --- The table ---


def result(attack: str, **row: Any) -> dict[str, Any]:
    """As rows.run gives it, of a row that went well."""
    about = {"attack": attack, "network": "net", "recipe": "short", "epochs": 2, "samples": 512, "rate": 0.1, "seed": 0}
    score = {"auroc": 0.99, "ap": 0.9, "tpr_at_1_fpr": 0.8}
    found = {"row": about | row, "half": ATTACKS[attack].half, "machine": "m", "versions": "v", "date": "d"}
    found |= {"before": {"accuracy": 0.7, "attack_success": 0.9}, "after": {"accuracy": 0.7, "attack_success": 0.0}}
    shares = {"poison_dropped": 0.9, "clean_dropped": 0.01}
    found |= {"chance": 0.04, "auto": {"verdict": "backdoor", **shares}, "cleaned": {"rule": "--auto", **shares}}
    return found | {"scores": {"default": score, table.AUTO: score, "confidence": score}, "density": {"q0.5": 0.2}}


def test_a_dataset_is_a_group_of_its_own() -> None:
    rows = [result("badnets", dataset="caltech16"), result("badnets"), result("clean", dataset="caltech16")]
    rows.append(result("blend-noise", dataset="cifar10"))
    _, *groups = table.markdown("full", rows).split("\n## ")
    heads = [group.splitlines()[0] for group in groups]
    assert heads == [
        "net, short recipe, 2 epochs, 512 images of Caltech-101 (16 classes), 224 px, 10% poison",
        "net, short recipe, 2 epochs, 512 images of CIFAR-10, 32 px, 10% poison",
    ]
    assert "False alarms" in groups[0]
    assert "blend, noise" not in groups[0]
    assert "**mean of 2**" in groups[1]  # results from before there were datasets are CIFAR-10's


def test_another_draw_is_a_group_of_its_own() -> None:
    _, *groups = table.markdown("cpu", [result("badnets"), result("badnets", seed=1)]).split("\n## ")
    assert [group.splitlines()[0].endswith(", seed 1") for group in groups] == [False, True]


def test_attacks_that_are_left_after_cleaning_are_named() -> None:
    as_often = result("badnets") | {"after": {"accuracy": 0.695, "attack_success": 0.055}}
    more_often = result("sig") | {"after": {"accuracy": 0.68, "attack_success": 0.065}}
    lines = table.markdown("cpu", [as_often, more_often]).splitlines()
    (left,) = (line for line in lines if "points above chance" in line)
    (worse,) = (line for line in lines if line.startswith("- accuracy more than"))
    assert "SIG (clean label) 2.5%" in left
    assert "SIG (clean label) 2.0%" in worse
    assert "BadNets" not in left + worse


def test_a_cascade_ranks_by_the_full_run_first_and_the_others_behind() -> None:
    short, full = np.array([5.0, 1.0, 3.0, 9.0]), np.array([2.0, 8.0, 4.0, 1.0])
    norms = cascade(short, full, 0.5)  # the two smallest of the short run: numbers 1 and 2
    assert np.argsort(norms).tolist() == [2, 1, 0, 3]
    assert cascade(short, full, 1.0).tolist() == full.tolist()


def test_what_is_large_after_the_short_run_stays_as_it_is() -> None:
    short, full = np.array([5.0, 1.0, 3.0, 9.0]), np.array([2.0, 8.0, 4.0, 1.0])
    assert stopped(short, full, 4.0).tolist() == [5.0, 8.0, 4.0, 9.0]


@pytest.mark.parametrize(
    ("obeyed", "density", "margin", "says"),
    [
        (0.2, (0.1, 0.05, 0.2), (9.0, 9.0, 4.0), "has not learned"),
        (1.0, (0.3, 0.05, 0.2), (9.0, 9.0, 4.0), "all over it"),
        (1.0, (0.1, 0.05, 0.2), (9.0, 9.0, 4.0), "80% are of class airplane."),
        (1.0, (0.1, 0.05, 0.2), (3.0, 9.0, 4.0), "Nor is the network surer"),
    ],
)
def test_why_samples_were_missed_follows_from_their_numbers(
    obeyed: float, density: tuple[float, ...], margin: tuple[float, ...], says: str
) -> None:
    medians = [dict(zip(("missed", "found", "clean"), of, strict=True)) for of in (density, margin)]
    missed = Missed(Row("badnets", "tiny_resnet", "short", 1, 9), 0.8, {}, 0.5, obeyed, *medians, 0.8, "airplane")
    assert says in reading(missed)
