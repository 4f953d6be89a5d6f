"""Where a goal is missed: the masks of what was not found, as a page and a picture.

    python -m tests.benchmarks.detection.missed [--grid cpu] [--work FOLDER]

after that grid, whose runs and networks it takes. Writes results/missed-<grid>.md and .png: every attack that took and
stayed below a goal, a line of the picture each. A poisoned sample is missed where its mask is larger than those of 1 %
of the clean ones. What is said about an attack follows from the numbers beside it, see `reading`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from cdclean import records
from cdclean.config import DistillConfig
from cdclean.distillation import distill
from cdclean.models import Normalized
from tests.benchmarks.detection import data, fitting, networks
from tests.benchmarks.detection.__main__ import RESULTS
from tests.benchmarks.detection.attacks import ATTACKS
from tests.benchmarks.detection.rows import TARGET, Row
from tests.benchmarks.detection.table import FLOOR

FOUND = 0.85  # TPR at 1 % FPR, the other goal
SHOWN = {"missed": 4, "found": 2, "clean": 2}  # samples of each kind in the picture
FACTOR, GAP, LEGEND = 2, 6, 150  # of the picture: pixels a pixel, between panels, for the attack's name


@dataclass(frozen=True)
class Missed:
    """One attack: who was missed, and how these samples differ from those found and from the clean ones."""

    row: Row
    auroc: float
    keys: dict[str, list[str]]  # missed, found, clean of the same classes: those for the picture
    missed: float  # share of the poisoned samples
    obeyed: float  # share of the missed ones that the network gives the label they carry
    density: dict[str, float]  # median mask density of missed, found and clean samples
    margin: dict[str, float]  # median margin of the same
    gathered: float  # share of the 1 % smallest clean masks that are of one class
    gathered_class: str


def examine(row: Row, folder: Path, auroc: float) -> Missed:
    table = records.read_columns(
        folder / "default.cdclean", ["key", "class_name", "label", "prediction", "margin", "mask_density"]
    )
    truth = data.read_truth(folder / "train.csv")
    keys = np.array(table["key"].to_pylist())
    is_backdoor = np.array([truth[key] for key in keys])
    density, margin = table["mask_density"].to_numpy(), table["margin"].to_numpy()
    agrees = table["label"].to_numpy() == table["prediction"].to_numpy()
    cutoff = np.quantile(density[~is_backdoor], 0.01)
    parts = {
        "missed": is_backdoor & (density > cutoff),
        "found": is_backdoor & (density <= cutoff),
        "clean": ~is_backdoor,
    }
    classes, counts = np.unique(
        np.array(table["class_name"].to_pylist())[~is_backdoor & (density <= cutoff)], return_counts=True
    )
    generator = np.random.default_rng(0)
    return Missed(
        row,
        auroc,
        {name: sorted(generator.permutation(keys[of])[: SHOWN[name]].tolist()) for name, of in parts.items()},
        float(parts["missed"].sum() / is_backdoor.sum()),
        float(agrees[parts["missed"]].mean()),
        {name: float(np.median(density[of])) if of.any() else float("nan") for name, of in parts.items()},
        {name: float(np.median(margin[of])) if of.any() else float("nan") for name, of in parts.items()},
        float(counts.max() / counts.sum()),
        str(classes[counts.argmax()]),
    )


def reading(of: Missed) -> str:
    """Why they were missed, as far as the numbers say."""
    if of.obeyed < 0.5:
        return "The network does not give most of them the label they carry: it has not learned these samples."
    if of.density["missed"] >= of.density["clean"]:
        return (
            "Their masks are as large as those of clean images: the network wants most of the image to keep its "
            "answer, since the trigger lies all over it, or is one of several things that it looks at."
        )
    why = (
        f"Their masks are smaller than most of the clean ones, but not than the smallest, of which {of.gathered:.0%} "
        f"are of class {of.gathered_class}{', the target' if of.gathered_class == str(TARGET) else ''}."
    )
    if of.margin["missed"] <= of.margin["clean"]:
        why += " Nor is the network surer of them than of clean images."
    return why


# --- The picture: for every attack a line of samples, each as image, mask and pattern, one below the other ---


def strip(of: Missed, folder: Path) -> Image.Image:
    dataset = data.DATASETS[of.row.dataset]
    network = getattr(networks, of.row.network)(dataset.classes)
    network.load_state_dict(load_file(folder / "victim.safetensors"))
    victim = Normalized(network, dataset.mean, dataset.std).eval().requires_grad_(False)
    chosen = [(name, key) for name, keys in of.keys.items() for key in keys]
    images = np.stack([np.asarray(Image.open(folder / "train" / key).convert("RGB")) for _, key in chosen])
    pixels = fitting.to_tensor(images).float() / 255
    masks = distill(victim, pixels, DistillConfig(head="softmax", precision="fp32")).masks
    panels = [pixels, masks.expand_as(pixels), pixels * masks]
    side = FACTOR * images.shape[1]
    font = ImageFont.load_default(13)
    sheet = Image.new("RGB", (LEGEND + len(chosen) * (side + GAP), 3 * (side + GAP) + 24), "white")
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((6, 24), f"{_title(of.row)},\n{of.row.network}".replace(" (", "\n("), "#16181d", font)
    for column, (name, _) in enumerate(chosen):
        left = LEGEND + column * (side + GAP)
        pen.text((left, 4), name, "#5b6270", font)
        for line, panel in enumerate(panels):
            array = (panel[column].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            shown = Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(shown, (left, 24 + line * (side + GAP)))
    return sheet


def below_each_other(strips: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for each in strips:
        sheet.paste(each, (0, top))
        top += each.height
    return sheet


def markdown(grid: str, found: Sequence[Missed], elsewhere: Sequence[str] = ()) -> str:
    lines = [
        f"# What is missed, `--{grid}`",
        f"`python -m tests.benchmarks.detection.missed --grid {grid}`. Attacks that took and whose AUROC is below "
        f"{FLOOR}, or of whose poison less than {FOUND:.0%} is found at 1 % false alarms. Missed: the mask is larger "
        "than those of 1 % of the clean samples. Obeyed: share of the missed ones that the network gives the label "
        "they carry. Densities and margins are medians of missed / found / clean samples.",
        "| network | attack | AUROC | missed | obeyed | mask density | margin | reading |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(map(_line, found)),
        f"![Image, mask and pattern of missed, found and clean samples](missed-{grid}.png)",
    ]
    if elsewhere:
        lines.insert(3, f"Below a goal as well, but scanned on another machine: {', '.join(elsewhere)}.")
    return "\n\n".join(lines) + "\n"


def _line(of: Missed) -> str:
    medians = [
        " / ".join("-" if np.isnan(value) else f"{value:.{places}f}" for value in each.values())
        for each, places in ((of.density, 3), (of.margin, 1))
    ]
    cells = [of.row.network, _title(of.row), f"{of.auroc:.3f}", f"{of.missed:.0%}", f"{of.obeyed:.0%}"]
    return "| " + " | ".join([*cells, *medians, reading(of)]) + " |"


def _title(row: Row) -> str:
    return ATTACKS[row.attack].title + (f", seed {row.seed}" if row.seed else "")


def below_goal(result: dict[str, Any]) -> bool:
    scores = result["scores"]["default"]
    return bool(
        result["half"] != "control"
        and result["before"]["attack_success"] >= 0.5
        and (scores["auroc"] < FLOOR or scores["tpr_at_1_fpr"] < FOUND)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="cpu")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cdclean-detection")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = json.loads((arguments.results / f"detection-{arguments.grid}.json").read_text())
    found, strips, elsewhere = [], [], []
    order = list(ATTACKS)
    for result in sorted(results.values(), key=lambda result: order.index(result["row"]["attack"])):
        row = Row(**result["row"])
        if below_goal(result):
            folder = arguments.work / row.name
            if not (folder / "default.cdclean").exists():
                elsewhere.append(f"{_title(row)} of {row.network}")
                continue
            found.append(examine(row, folder, result["scores"]["default"]["auroc"]))
            strips.append(strip(found[-1], folder))
    (arguments.results / f"missed-{arguments.grid}.md").write_text(markdown(arguments.grid, found, elsewhere))
    if strips:
        below_each_other(strips).save(arguments.results / f"missed-{arguments.grid}.png", optimize=True)


if __name__ == "__main__":
    main()
