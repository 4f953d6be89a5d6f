"""Photographs from ../shared as arrays, and datasets on disk as the command line reads them."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from tests.benchmarks.detection import networks

SHARED = Path(__file__).parents[3].parent / "shared"

Pixels = npt.NDArray[np.uint8]  # [n, side, side, 3]
Labels = npt.NDArray[np.int64]  # [n]
Mask = npt.NDArray[np.bool_]  # [n]
Split = Literal["train", "test"]


def _cifar10(split: Split) -> pa.Table:
    name = {"train": "cifar10-train50k", "test": "cifar10-test10k"}[split]
    return pq.read_table(SHARED / "data" / f"{name}.parquet", columns=["image", "label"])


def _caltech16(split: Split) -> pa.Table:
    place = SHARED / "data" / "caltech16.parquet"
    return pq.read_table(place, columns=["image", "label"], filters=[("split", "=", split)])


@dataclass(frozen=True)
class Dataset:
    """All that the rows of one set of photographs have to know of it."""

    title: str
    size: int  # pixels a side
    classes: int
    mean: tuple[float, float, float]  # of the training pixels in [0, 1], per channel
    std: tuple[float, float, float]
    batch: int  # images at a time for the other detectors, which keep what a gradient needs
    table: Callable[[Split], pa.Table]  # encoded `image`, `label`


DATASETS = {
    "cifar10": Dataset("CIFAR-10", 32, 10, networks.MEAN, networks.STD, 256, _cifar10),
    "caltech16": Dataset(
        "Caltech-101 (16 classes)", 224, 16, (0.5548, 0.5283, 0.4842), (0.3131, 0.3105, 0.3244), 64, _caltech16
    ),
}


@dataclass(frozen=True)
class Poisoned:
    """A training set with a backdoor in it, and what the attacker does with an image afterwards."""

    images: Pixels
    labels: Labels
    is_backdoor: Mask
    stamp: Callable[[Pixels], Pixels]  # puts the trigger on images, as at the time of the attack
    wanted: Callable[[Labels], Labels]  # the label that the attacker wants of an image of that class
    sources: Sequence[int] | None = None  # classes that the trigger is meant for; None: all

    def meant(self, labels: Labels) -> Mask:
        """Whom the trigger is meant for, and given another label."""
        changed: Mask = self.wanted(labels) != labels
        return changed if self.sources is None else changed & np.isin(labels, self.sources)


def load(dataset: Dataset, split: Split, count: int | None = None, seed: int = 0) -> tuple[Pixels, Labels]:
    """`count` images of a split and their labels, all if there are no more, in an order drawn from `seed`."""
    table = dataset.table(split)
    order = np.random.default_rng(seed).permutation(table.num_rows)[:count]
    table = table.take(order)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(partial(_decode, size=dataset.size), table["image"].to_pylist()))
    return np.stack(images), table["label"].to_numpy().astype(np.int64)


def _decode(data: bytes, size: int | None = None) -> npt.NDArray[np.uint8]:
    """The pixels of an image; with `size`, the square in its middle, resized to as many pixels a side."""
    with Image.open(io.BytesIO(data)) as file:
        image = file.convert("RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def write_folder(folder: Path, images: Pixels, labels: Labels, is_backdoor: Mask) -> None:
    """An ImageFolder of PNG files, `<class>/<number>.png`, and `<folder>.csv` with the truth; whole or not at all.

    Several processes may write the same one at a time: rows have the clean control's in common.
    """
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    for label in np.unique(labels):
        (unfinished / str(label)).mkdir(parents=True)
    keys = [f"{label}/{number:05d}.png" for number, label in enumerate(labels)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda key, image: Image.fromarray(image).save(unfinished / key), keys, images))
    truth = unfinished.with_suffix(f".{os.getpid()}.csv")
    with truth.open("w", newline="") as file:
        csv.writer(file).writerows([("key", "is_backdoor"), *zip(keys, is_backdoor.astype(int), strict=True)])
    truth.rename(folder.with_suffix(".csv"))
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)


def link_folder(folder: Path, origin: Path, keys: Sequence[str]) -> None:
    """A part of the ImageFolder `origin` as one of its own, without a second copy of the bytes."""
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    for key in keys:
        (unfinished / key).parent.mkdir(parents=True, exist_ok=True)
        os.link(origin / key, unfinished / key)
    unfinished.rename(folder)


def read_folder(folder: Path) -> tuple[list[str], Pixels, Labels]:
    """Keys, images and labels of such a folder, in the order of the keys."""
    paths = sorted(folder.glob("*/*.png"))
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda path: _decode(path.read_bytes()), paths))
    keys = [path.relative_to(folder).as_posix() for path in paths]
    return keys, np.stack(images), np.array([int(path.parent.name) for path in paths], dtype=np.int64)


def read_truth(path: Path) -> dict[str, bool]:
    with path.open(newline="") as file:
        return {row["key"]: row["is_backdoor"] == "1" for row in csv.DictReader(file)}
