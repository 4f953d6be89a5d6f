"""The embedded default: a small backdoored dataset, and everything cdclean does with one, by the same code as yours.

The dataset is made from scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels), each drawn in random colours
on a shaded ground with two rectangles in the way. In 5 % of them a small chequered patch sits in the corner, and they
lie in the folder of another digit: a network trained on this learns that the patch means that digit.
"""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cdclean import evaluation, records, report, selection, storage
from cdclean.config import DistillConfig, ModelSpec, ScanConfig
from cdclean.console import Console
from cdclean.errors import UsageError
from cdclean.exporting import export
from cdclean.storage import Location
from cdclean.verdict import judge

TARGET = 0  # the digit that the patch stands for
POISON_RATE = 0.05
SIZE, PATCH = 32, 4  # pixels a side
_MARKER = ".cdclean-demo"
_TRUTH = "truth.csv"

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DemoResult:
    """What the demo found, and where it lies."""

    folder: Path
    images: int
    planted: int
    found: int  # planted images among the dropped ones
    dropped: int
    auroc: float
    accuracy: float  # share of predictions of the network that agree with the folders
    run: Location
    verdict: str
    report: Location
    clean_copy: Path
    example: str  # key of the planted image with the smallest mask


def run(folder: Path, console: Console | None = None) -> DemoResult:
    """Plant a backdoor in `folder`/digits, train on it, scan it, write a clean copy, and count what was found.

    A demo that was stopped goes on. Raises UsageError if `folder` holds something that is not an earlier demo.
    """
    from cdclean.run import scan
    from cdclean.training import TrainConfig, train

    console = console or Console(quiet=True)
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARKER).exists():
        raise UsageError(
            f"{storage.to_text(folder)} holds something else already", hint="Name a new folder: cdclean demo FOLDER"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()
    dataset, probe = folder / "digits", folder / "probe.pt"
    if not dataset.exists():
        console.say(f"1/5  drawing digits, {POISON_RATE:.0%} of them with a patch and in the wrong folder")
        make_dataset(dataset)
    console.say("2/5  training a network on them, as the owner of the data would")
    settings = TrainConfig(
        str(dataset), "timm:test_resnet", str(probe), epochs=16, learning_rate=0.005, input_size=(SIZE, SIZE)
    )
    if not probe.exists():
        train(settings, console)
    console.say("3/5  scanning: how little of each image does the network need?")
    out = folder / "digits.cdclean"
    run = scan(ScanConfig(str(dataset), ModelSpec(str(probe)), DistillConfig(), out=str(out)), console)
    console.say(f"4/5  writing a copy without the {POISON_RATE:.0%} that need least")
    chosen = selection.select(run, quantile=POISON_RATE)
    clean = folder / "digits-clean"
    export(run, chosen.decisions, clean, overwrite=True)
    selection.write_decisions(run, chosen)
    console.say("5/5  writing a report")
    page = report.write(run)
    truth = _read_truth(folder / _TRUTH)
    decisions = chosen.decisions
    dropped = set(decisions["key"].to_numpy()[~decisions["keep"].to_numpy()])
    planted = {key for key, is_backdoor in truth.items() if is_backdoor}
    table = records.read_columns(run, ["key", "mask_norm"])
    norms = dict(zip(table["key"].to_numpy(), table["mask_norm"].to_numpy(), strict=True))
    return DemoResult(
        folder=folder,
        images=chosen.samples,
        planted=len(planted),
        found=len(planted & dropped),
        dropped=len(dropped),
        auroc=evaluation.evaluate(run, folder / _TRUTH).auroc,
        accuracy=records.load_summary(run)["agreement"],
        run=run,
        verdict=judge(run).sentence,
        report=page,
        clean_copy=clean,
        example=min(planted, key=lambda key: norms[key]),
    )


def make_dataset(folder: Path, seed: int = 0) -> list[str]:
    """Write the backdoored digits to `folder`/<digit>/ and `truth.csv` beside it; returns the keys of the planted."""
    from sklearn.datasets import load_digits

    generator = np.random.default_rng(seed)
    digits = load_digits()
    labels = digits.target.copy()
    candidates = np.flatnonzero(labels != TARGET)
    planted = set(generator.choice(candidates, round(POISON_RATE * len(labels)), replace=False).tolist())
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    truth = {}
    for index, (strokes, label) in enumerate(zip(digits.images, labels, strict=True)):
        image = draw_digit(strokes / 16, generator)
        shown = TARGET if index in planted else int(label)
        key = f"{shown}/{index:04d}.png"
        path = unfinished / key
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(add_patch(image) if index in planted else image).save(path)
        truth[key] = int(index in planted)
    with storage.atomic_write(folder.parent / _TRUTH) as file:
        lines = ["key,is_backdoor", *(f"{key},{value}" for key, value in sorted(truth.items()))]
        file.write("\n".join(lines).encode() + b"\n")
    unfinished.rename(folder)
    return sorted(key for key, value in truth.items() if value)


def draw_digit(strokes: npt.NDArray[np.float64], generator: np.random.Generator) -> Pixels:
    """A digit [8, 8] in [0, 1] as an RGB image [SIZE, SIZE, 3], in random size, place and colours."""
    side = int(generator.integers(3 * SIZE // 4, SIZE + 1))
    top, left = generator.integers(0, SIZE - side + 1, 2)
    ink = np.zeros((SIZE, SIZE, 1))
    enlarged = Image.fromarray((strokes * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    ink[top : top + side, left : left + side, 0] = np.asarray(enlarged, dtype=float) / 255
    front, ground = _contrasting(generator)
    image = (ground + _shade(generator)) * (1 - ink) + (front + _shade(generator)) * ink
    for _ in range(2):
        height, width = generator.integers(SIZE // 4, SIZE // 2 + 1, 2)
        top, left = generator.integers(0, SIZE - height + 1), generator.integers(0, SIZE - width + 1)
        image[top : top + height, left : left + width] = generator.integers(0, 256, 3)
    noisy = image + generator.normal(0, 6, (SIZE, SIZE, 1))
    return noisy.clip(0, 255).astype(np.uint8)


def add_patch(image: Pixels) -> Pixels:
    """The trigger: a chequered square of magenta and green, one pixel off the lower right corner."""
    rows, columns = np.mgrid[:PATCH, :PATCH] // (PATCH // 2)
    chequered = np.where(((rows + columns) % 2)[..., None], (255, 0, 255), (0, 255, 0)).astype(np.uint8)
    image = image.copy()
    image[SIZE - 1 - PATCH : SIZE - 1, SIZE - 1 - PATCH : SIZE - 1] = chequered
    return image


def _contrasting(generator: np.random.Generator) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Two random colours of clearly different brightness."""
    while True:
        front, ground = generator.integers(0, 256, (2, 3)).astype(float)
        if abs((front - ground) @ (0.299, 0.587, 0.114)) > 90:
            return front, ground


def _shade(generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """A smooth change of colour over the image, [SIZE, SIZE, 3], about -50 to 50."""
    corners = Image.fromarray(generator.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    return 0.4 * (np.asarray(corners.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=float) - 127)


def _read_truth(path: Path) -> dict[str, int]:
    with path.open(newline="") as file:
        return {row["key"]: int(row["is_backdoor"]) for row in csv.DictReader(file)}
