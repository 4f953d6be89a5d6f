"""The README's cron script, as it is printed there: incoming data, scored, gated and published."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch

from cdclean.checkpoints import Metadata, save_checkpoint
from cdclean.config import DistillConfig, ModelSpec, ScanConfig
from cdclean.run import scan
from tests.packings import SIZE, folder, pictures

ROOT = Path(__file__).parents[1]


def script() -> str:
    block = re.search(r"<!-- ci: cron -->\n```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "the README has no cron script"
    return block[1]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with the script, a model, a trusted run and a folder into which data come."""
    (tmp_path / "nightly.sh").write_text(script())
    binary = tmp_path / "bin" / "cdclean"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} -m cdclean "$@"\n')
    binary.chmod(0o755)
    images = tmp_path / "images"
    images.mkdir()
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=3)
    known = Metadata(arch="timm:test_resnet", input_size=(SIZE, SIZE), class_names=tuple("abc"))
    save_checkpoint(images / "probe.pt", module.state_dict(), known)
    spec = ModelSpec(str(images / "probe.pt"))
    trusted = folder(tmp_path / "trusted", pictures(8))
    scan(ScanConfig(trusted, spec, DistillConfig(), out=str(images / "trusted.cdclean"), device="cpu"))
    monkeypatch.setenv("PATH", f"{binary.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IMAGES", str(images))
    monkeypatch.setenv("METRICS", str(tmp_path / "cdclean.prom"))
    return tmp_path


def run(server: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", str(server / "nightly.sh")], capture_output=True, text=True, check=False, timeout=200)


def age(place: Path, seconds: float = 3600) -> None:
    for path in place.rglob("*.png"):
        os.utime(path, (time.time() - seconds,) * 2)


def scored(server: Path) -> set[str]:
    parts = (server / "images" / "incoming.cdclean" / "records").glob("part-*.parquet")
    return set(pa.concat_tables([pq.read_table(part) for part in parts])["key"].to_pylist())


def published(server: Path) -> set[str]:
    clean = server / "images" / "clean"
    return {str(path.relative_to(clean)) for path in clean.rglob("*.png")}


def test_the_cron_script(server: Path) -> None:
    images = pictures(8)
    first = dict(list(images.items())[::2])
    incoming = server / "images" / "incoming"
    incoming.mkdir()
    assert run(server).returncode == 0, "nothing has come in"
    folder(incoming, {"b/999.png": images["b/001.png"]})  # just being uploaded
    assert run(server).returncode == 0
    assert not (server / "images" / "incoming.cdclean").exists()

    folder(incoming, first)
    age(incoming)
    folder(incoming, {"b/999.png": images["b/001.png"]})  # just being uploaded
    done = run(server)
    assert (done.returncode, done.stderr) == (0, done.stderr)
    assert scored(server) == set(first)
    assert published(server) <= set(first)
    assert len(published(server)) >= 0.8 * len(first)
    suspects = {path.name for path in (server / "images" / "suspects").rglob("*.png")}
    assert len(published(server)) + len(suspects) == len(first)
    assert (server / "images" / "cdclean.log").read_text().endswith("exit 0\n")
    assert 'state{cdclean_scan_state="complete"' in (server / "cdclean.prom").read_text()

    # A broken drop: nothing is published, and whoever looks is told.
    before = published(server)
    (incoming / "c" / "broken.png").write_bytes(b"no image")
    age(incoming)
    done = run(server)
    assert done.returncode == 5
    assert "no score" in done.stderr
    assert published(server) == before
    assert (server / "images" / "cdclean.log").read_text().endswith("exit 5\n")

    # It is taken away, and the night after goes well.
    (incoming / "c" / "broken.png").unlink()
    done = run(server)
    assert done.returncode == 0, done.stderr
    assert scored(server) == {*first, "b/999.png"}
    assert len((server / "images" / "cdclean.log").read_text().splitlines()) == 5
