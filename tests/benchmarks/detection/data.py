"""CIFAR-10 from ../shared as arrays, and datasets on disk as the command line reads them."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from PIL import Image

SHARED = Path(__file__).parents[3].parent / "shared"
CLASSES = 10

Pixels = npt.NDArray[np.uint8]  # [n, 32, 32, 3]
Labels = npt.NDArray[np.int64]  # [n]
Mask = npt.NDArray[np.bool_]  # [n]


@dataclass(frozen=True)
class Poisoned:
    """A training set with a backdoor in it, and what the attacker does with an image afterwards."""

    images: Pixels
    labels: Labels
    is_backdoor: Mask
    stamp: Callable[[Pixels], Pixels]  # puts the trigger on images, as at the time of the attack
    wanted: Callable[[Labels], Labels]  # the label that the attacker wants of an image of that class
    sources: Sequence[int] = field(default=tuple(range(CLASSES)))  # classes that the trigger is meant for


def cifar(split: str, count: int | None = None, seed: int = 0) -> tuple[Pixels, Labels]:
    """`count` images of CIFAR-10's `split` ("train50k", "test10k"), all by default, in an order drawn from `seed`."""
    table = pq.read_table(SHARED / "data" / f"cifar10-{split}.parquet", columns=["image", "label"])
    order = np.random.default_rng(seed).permutation(table.num_rows)[:count]
    table = table.take(order)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(_decode, table["image"].to_pylist()))
    return np.stack(images), table["label"].to_numpy().astype(np.int64)


def _decode(data: bytes) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def write_folder(folder: Path, images: Pixels, labels: Labels, is_backdoor: Mask) -> None:
    """An ImageFolder of PNG files, `<class>/<number>.png`, and `<folder>.csv` with the truth; whole or not at all."""
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    for label in np.unique(labels):
        (unfinished / str(label)).mkdir(parents=True)
    keys = [f"{label}/{number:05d}.png" for number, label in enumerate(labels)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda key, image: Image.fromarray(image).save(unfinished / key), keys, images))
    with folder.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([("key", "is_backdoor"), *zip(keys, is_backdoor.astype(int), strict=True)])
    unfinished.rename(folder)


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
