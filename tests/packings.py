"""One small set of images, stored in every way that cdclean reads."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from upath import UPath

from cdclean.storage import Location

SIZE = 32


def pictures(count: int = 8, classes: str = "abc") -> dict[str, bytes]:
    """`a/000.png` and so on: `count` small PNGs in each class, every one different."""
    generator = np.random.default_rng(0)
    made = {}
    for name in classes:
        for index in range(count):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(file, "PNG")
            made[f"{name}/{index:03d}.png"] = file.getvalue()
    return made


def folder(place: Location, images: Mapping[str, bytes]) -> str:
    for key, data in images.items():
        path = place / key
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(place)


def shards(place: Location, images: Mapping[str, bytes], size: int = 10, compression: str = "") -> str:
    """WebDataset shards with a class and a sidecar for every image."""
    place.mkdir(parents=True, exist_ok=True)
    items = list(images.items())
    for number in range(0, len(items), size):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=f"w:{compression}") as tar:  # type: ignore[call-overload]
            for key, data in items[number : number + size]:
                stem = key.removesuffix(".png")
                for ending, content in (("cls", key[0].encode()), ("png", data), ("txt", f"about {key}".encode())):
                    member = tarfile.TarInfo(f"{stem}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        ending = f"tar.{compression}" if compression else "tar"
        (place / f"{number // size:06d}.{ending}").write_bytes(file.getvalue())
    return str(place)


def parquet(place: Location, images: Mapping[str, bytes], size: int = 10) -> str:
    """Parquet as Hugging Face `datasets` writes it, in several files."""
    place.mkdir(parents=True, exist_ok=True)
    items = list(images.items())
    for number in range(0, len(items), size):
        rows = [{"image": {"bytes": data, "path": key}, "label": key[0]} for key, data in items[number : number + size]]
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
        (place / f"train-{number // size:05d}.parquet").write_bytes(file.getvalue())
    return str(place)


def listing(place: Location, images: Mapping[str, bytes]) -> str:
    """A CSV of paths and labels, with the images beside it."""
    folder(place / "images", images)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "label"])
    writer.writerows([f"images/{key}", key[0]] for key in images)
    (place / "list.csv").write_text(text.getvalue())
    return str(place / "list.csv")


PACKINGS = {"folder": folder, "shards": shards, "parquet": parquet, "list": listing}


def local_copy(place: Location, to: Path) -> Path:
    """All files below a place, on the local disk."""
    if isinstance(place, UPath):
        place.fs.get(place.path, str(to), recursive=True)
        return to
    return place
