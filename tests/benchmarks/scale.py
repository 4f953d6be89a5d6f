"""How indexing, deciding and reporting grow: a million samples, in seconds and peak memory.

`python -m tests.benchmarks.scale [--samples N]` makes its data in a temporary folder (a million small files, a million
records), runs each command in a process of its own, and writes results/scale.{json,md}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import cdclean
from cdclean import schema, storage

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
CLASSES, PART, EMBEDDED = 1000, 8192, 64

# Runs a command line in its own process and prints seconds and peak memory of that process.
MEASURE = """
import json, sys, time
from contextlib import redirect_stdout
started = time.perf_counter()
sys.argv = ["cdclean", *json.loads(sys.argv[1])]
with redirect_stdout(sys.stderr):
    if sys.argv[1] == "index":
        from pathlib import Path
        from cdclean import datasets, manifest
        dataset = datasets.open_dataset(sys.argv[2])
        manifest.write(Path(sys.argv[3]), datasets.samples(dataset), datasets.classes(dataset), 1024, lambda _: None)
    else:
        from cdclean.cli import app
        app(standalone_mode=False)
seconds = time.perf_counter() - started
# Not ru_maxrss, which begins with the parent's.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, int(peak.split()[1]) / 1024]))
"""


def names(samples: int) -> Iterator[str]:
    per_class = -(-samples // CLASSES)
    for row in range(samples):
        yield f"class{row // per_class:04d}/{row % per_class:07d}.png"


def make_folder(root: Path, samples: int) -> None:
    last = ""
    for name in names(samples):
        folder = name.split("/")[0]
        if folder != last:
            (root / folder).mkdir(parents=True)
            last = folder
        with open(root / name, "wb") as file:  # noqa: PTH123
            file.write(b"12345678")


def make_shards(root: Path, samples: int) -> None:
    root.mkdir()
    keys = list(names(samples))
    for number in range(0, samples, 10_000):
        with tarfile.open(root / f"{number // 10_000:06d}.tar", "w") as tar:
            for name in keys[number : number + 10_000]:
                for ending, content in (("png", b"12345678"), ("cls", name[5:9].encode())):
                    member = tarfile.TarInfo(f"{name.removesuffix('.png')}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))


def make_list(path: Path, samples: int) -> None:
    with path.open("w") as file:
        file.write("path,label\n")
        file.writelines(f"{name},{name[:9]}\n" for name in names(samples))


def make_run(run: Path, dataset: Path, samples: int) -> None:
    """A complete run over the folder; 1 % of its samples have tiny masks and one prediction."""
    (run / "records").mkdir(parents=True)
    from cdclean import datasets, manifest

    found = datasets.open_dataset(str(dataset))
    classes = datasets.classes(found)
    index = manifest.write(run / "manifest.parquet", datasets.samples(found), classes, PART, lambda _: None)
    generator = np.random.default_rng(0)
    content = {
        "schema_version": schema.SCHEMA_VERSION,
        "created": "2026-01-01T00:00:00.000+00:00",
        "dataset": {"location": storage.to_text(dataset), "kind": "imagefolder", "name": "data", "files": []}
        | {"samples": index.samples, "classes": list(index.classes), "digest": index.digest},
        "model": {"source": "probe.pt", "architecture": "timm:resnet18", "weights": "0" * 64, "mean": [0.5] * 3}
        | {"geometry": {"channels": 3, "height": 32, "width": 32}, "std": [0.5] * 3}
        | {"classes": CLASSES, "class_names": list(index.classes)},
        "config": {"distill": {"objective": "probabilities", "steps": 30}, "model": {}, "dataset": {}},
        "fingerprint": "0" * 64,
        "plan": {"device": "cpu", "batch_size": 32, "chunk_size": PART, "chunks": index.chunks, "precision": "fp32"}
        | {"head": "softmax", "layer": None, "threads": 1},
        "versions": {"cdclean": cdclean.__version__},
    }
    content["config"]["distill"] |= {"temperature": 1.0, "seed": 0}  # type: ignore[index]
    storage.write_json(run / "run.json", content)
    picture = {"bytes": _png(), "path": None}
    places = generator.normal(0, 3, (CLASSES, EMBEDDED))
    for chunk in range(index.chunks):
        jobs = manifest.read_chunk(run / "manifest.parquet", chunk)
        count = len(jobs)
        poisoned = generator.random(count) < 0.01
        density = np.where(poisoned, 0.02, 0.3) * np.exp(generator.normal(0, 0.4, count))
        label = np.array([job.label for job in jobs])
        columns: dict[str, Any] = {
            "key": [job.key for job in jobs],
            "url": [job.url for job in jobs],
            "label": label,
            "class_name": [job.class_name for job in jobs],
            "status": ["ok"] * count,
            "bytes": [job.size for job in jobs],
            "content_hash": [hashlib.sha256(job.key.encode()).hexdigest() for job in jobs],
            "prediction": np.where(poisoned, 0, label),
            "confidence": generator.uniform(0.6, 1, count).astype(np.float32),
            "margin": (np.where(poisoned, 12, 4) + generator.normal(0, 1, count)).astype(np.float32),
            "mask_density": density.clip(0, 1),
            "mask_norm": density.clip(0, 1) * 1024,
            "embedding": _vectors(places[np.where(poisoned, 0, label)] + 3 * poisoned[:, None], generator),
            "thumbnail": [picture] * count,
            "mask_thumbnail": [picture] * count,
            "pattern_thumbnail": [picture] * count,
        }
        full = {name: columns.get(name, pa.nulls(count)) for name in schema.RECORDS.names}
        arrays = [
            each if isinstance(each := full[f.name], pa.Array) else pa.array(each, f.type) for f in schema.RECORDS
        ]
        table = pa.table([array.cast(f.type) for array, f in zip(arrays, schema.RECORDS, strict=True)], schema.RECORDS)
        pq.write_table(table, run / "records" / f"part-{chunk:05d}.parquet", compression="zstd", row_group_size=256)
    (run / "summary.json").write_text(json.dumps({"finished": "2026-01-01T00:00:00+00:00", "agreement": 0.99}))
    summary = {"schema_version": 1, "finished": "2026-01-01T00:00:00+00:00", "samples": samples, "agreement": 0.99}
    summary |= {"status": {"ok": samples}, "mask_density": {}, "seconds": 1.0, "images_per_second": 1.0}
    storage.write_json(run / "summary.json", summary)
    (run / "_SUCCESS").touch()


def _vectors(places: np.ndarray, generator: np.random.Generator) -> pa.ListArray:
    """Embeddings about these places [n, EMBEDDED]."""
    values = (places + generator.normal(0, 1, places.shape)).astype(np.float32)
    return pa.ListArray.from_arrays(np.arange(len(values) + 1, dtype=np.int32) * EMBEDDED, values.ravel())


def _png() -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.effect_noise((32, 32), 60).convert("RGB").save(file, "PNG")
    return file.getvalue()


def measure(*arguments: str) -> tuple[float, float]:
    """Seconds and peak MiB of one command."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the data go; default: the temporary folder")
    options = parser.parse_args()
    count = options.samples
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        here = Path(name)
        started = time.perf_counter()
        make_folder(here / "data", count)
        make_shards(here / "shards", count // 10)
        make_list(here / "data" / "list.csv", count)
        make_run(here / "data.cdclean", here / "data", count)
        print(f"made the data in {time.perf_counter() - started:.0f} s")
        run, out = str(here / "data.cdclean"), str(here / "out")
        jobs: list[tuple[str, int, list[str]]] = [
            ("index a folder of images", count, ["index", str(here / "data"), str(here / "a")]),
            (
                "index a tenth of it as tar shards",
                count // 10,
                ["index", str(here / "shards"), str(here / "b.parquet")],
            ),
            ("index a list of paths", count, ["index", str(here / "data" / "list.csv"), str(here / "c")]),
            ("filter --quantile 0.1 --mode list", count, ["filter", run, "--quantile", "0.1", "--mode", "list"]),
            ("filter --auto --mode list", count, ["filter", run, "--auto", "--mode", "list"]),
            ("filter --quantile 0.1 --dry-run", count, ["filter", run, "--quantile", "0.1", "--dry-run"]),
            ("report", count, ["report", run]),
            ("bias", count, ["bias", run]),
        ]
        rows = []
        for number, (what, samples, arguments) in enumerate(jobs):
            if arguments[0] == "filter":
                arguments += ["--out", f"{out}{number}"]
            seconds, peak = measure(*arguments)
            rows.append({"what": what, "samples": samples, "seconds": round(seconds, 2), "peak_mib": round(peak)})
            print(f"{what:36} {samples:>9,} samples {seconds:7.1f} s {samples / seconds:>10,.0f}/s {peak:7.0f} MiB")
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "pyarrow": pa.__version__,
        "cdclean": cdclean.__version__,
    }
    (RESULTS / "scale.json").write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
    lines = ["# How it grows", "", ", ".join(f"{key} {value}" for key, value in about.items()) + ".", ""]
    lines += [
        "Each row is one command in a process of its own, start-up included: `python -m tests.benchmarks.scale`.",
        "",
    ]
    lines += ["| what | samples | seconds | samples/s | peak memory, MiB |", "|---|---|---|---|---|"]
    for row in rows:
        rate = row["samples"] / row["seconds"]  # type: ignore[operator]
        lines.append(
            f"| {row['what']} | {row['samples']:,} | {row['seconds']:.1f} | {rate:,.0f} | {row['peak_mib']:,} |"
        )
    (RESULTS / "scale.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
