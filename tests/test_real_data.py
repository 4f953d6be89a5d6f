"""The real commands on real images and a public backdoored network. Needs ../shared, as it is laid out there."""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from cdclean.records import read_columns
from tests.networks import efficientnet_lite0
from tests.runs import contents

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared"),
]


def cdclean(*arguments: object, cwd: Path) -> dict[str, Any]:
    """Run the command line as a user does; its JSON result."""
    command = [sys.executable, "-m", "cdclean", *map(str, arguments), "--json"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def unpack(name: str, target: Path, *options: str) -> Path:
    script = [sys.executable, SHARED / "unpack.py", SHARED / "data" / f"{name}.parquet", target, *options]
    subprocess.run(list(map(str, script)), check=True, capture_output=True)
    return target


def test_a_public_backdoored_network_is_seen_through(tmp_path: Path) -> None:
    """CIFAR-10, a VGG poisoned with a white 4 x 4 square (target: class 8), the square on 200 of 1,000 images."""
    dataset = unpack("cifar10-lossless-test1k", tmp_path / "cifar10")
    target = sorted(path.name for path in dataset.iterdir())[8]
    images = [path for path in sorted(dataset.rglob("*.png")) if path.parent.name != target]
    planted = random.Random(0).sample(images, 200)
    for path in planted:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.paste((255, 255, 255), (27, 27, 31, 31))
            image.save(path)
    with (tmp_path / "truth.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "is_backdoor"])
        rows.writerows((path.relative_to(dataset), int(path in planted)) for path in sorted(dataset.rglob("*.png")))
    model = SHARED / "models" / "cifar10-vgg6-badnets-target8.safetensors"
    network = ["--arch", "tests.networks:vgg6", "--input-size", "32", "--mean", "0", "--std", "1"]
    summary = cdclean("scan", dataset, "--model", model, *network, cwd=tmp_path)
    assert summary["status"] == {"ok": 1000}
    result = cdclean("evaluate", "--truth", "truth.csv", cwd=tmp_path)
    assert result["samples"] == 1000
    assert result["backdoored"] == 200
    assert result["auroc"] >= 0.97


def test_photographs_through_an_imagenet_network(tmp_path: Path) -> None:
    """Caltech-101 photographs at 224 px through EfficientNet-Lite0 with its real weights, scanned and filtered."""
    dataset = unpack("caltech16", tmp_path / "caltech16", "--split", "test")
    count = sum(1 for path in dataset.rglob("*") if path.is_file())
    model = efficientnet_lite0(tmp_path / "tf_efficientnet_lite0.pt")
    options = ["--steps", "4", "--mean", "0.5", "--std", "0.5"]
    summary = cdclean("scan", dataset, "--model", model, *options, cwd=tmp_path)
    assert summary["status"] == {"ok": count}
    table = read_columns(tmp_path / "caltech16.cdclean", ["mask_density", "confidence", "width", "height"])
    assert min(table["width"].to_pylist() + table["height"].to_pylist()) >= 224
    assert max(table["confidence"].to_pylist()) > 0.9  # the weights are real: it knows what it sees
    result = cdclean("filter", "--quantile", "0.1", cwd=tmp_path)
    assert result["dropped"] == count // 10
    assert len(contents(tmp_path / "caltech16-clean")) == count - count // 10


def test_the_unpacked_set_holds_what_its_table_says(tmp_path: Path) -> None:
    """What the two tests above stand on: every image of the set is there, byte for byte."""
    dataset = unpack("cifar10-lossless-test1k", tmp_path / "cifar10")
    stored = pq.read_table(SHARED / "data" / "cifar10-lossless-test1k.parquet", columns=["image"])["image"].to_pylist()
    assert sorted(path.read_bytes() for path in dataset.rglob("*.png")) == sorted(stored)
