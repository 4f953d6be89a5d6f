"""A small, valid, complete run folder for an ImageFolder, with scores that the test gives: no model, no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cdclean.exporting.places import MARKER
from cdclean.schema import MANIFEST, RECORDS, SCHEMA_VERSION
from cdclean.selection import select
from cdclean.storage import from_text, to_text

SUFFIXES = {".jpg", ".png"}
SIZE = 8  # pixels a side of the pretended model input

# A small dataset, with sidecars of both kinds, files that belong to no image, and an empty folder.
FILES = {
    "LICENSE": b"free",
    "cat/1.jpg": b"one",
    "cat/1.txt": b"about one",
    "cat/2.png": b"two" * 1000,
    "cat/2.png.json": b"{}",
    "dog/deep/3.jpg": b"three",
    "dog/classes.txt": b"a list",
    "empty/": b"",
    "owl/4.jpg": b"four",
    "owl/4.seg.npy": b"mask of four",
}
NORMS = {"cat/1.jpg": 3.0, "cat/2.png": 1.0, "dog/deep/3.jpg": 2.0, "owl/4.jpg": 0.5}


def images(root: Path) -> list[str]:
    """Keys of all files below `root` with an image's name, sorted."""
    found = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
    return sorted(to_text(path.relative_to(root)) for path in found if path.suffix.lower() in SUFFIXES)


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    """Files (relative path -> bytes) below `root`; a path that ends in / is a folder."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def snapshot(root: Path) -> dict[str, tuple[str, int, int]]:
    """Relative path -> (SHA-256, mode, time of change in ns) of every file and folder below `root`, itself included."""
    state = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        state[to_text(path.relative_to(root))] = (digest, status.st_mode, status.st_mtime_ns)
    return state


def contents(root: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below `root`, but for a copy's marker; {} where there is no such folder."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != MARKER)
    return {to_text(path.relative_to(root)): path.read_bytes() for path in files}


def half(run: Path) -> pa.Table:
    """Decisions that drop cat/2.png and owl/4.jpg."""
    return select(run, quantile=0.5).decisions


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def write_run(
    run: Path,
    norms: Mapping[str, float],
    *,
    dataset: Path | None = None,
    unreadable: Mapping[str, str | None] | None = None,
    order: Sequence[str] | None = None,
    parts: int = 2,
    finished: str = "2026-01-02T03:04:05+00:00",
) -> Path:
    """A run of the samples in `norms` (key -> mask_norm) and `unreadable` (key -> error).

    order: all keys, as the manifest has them; sorted without it.
    dataset: the folder that holds the files of these names; without one the records pretend that they were empty.
    """
    errors = unreadable or {}
    keys = list(order) if order is not None else sorted({*norms, *errors})
    root = dataset if dataset is not None else run.parent / "dataset"
    data = [_bytes(root, key) if dataset is not None else b"" for key in keys]
    classes = sorted({key.split("/")[0] for key in keys if "/" in key})
    url = [f"{to_text(root)}/{key}" for key in keys]
    names = [key.split("/")[0] if "/" in key else None for key in keys]
    labels = [None if name is None else classes.index(name) for name in names]
    content = data if dataset is not None else [os.fsencode(key) for key in keys]  # pretended files differ, too
    hashes = [hashlib.sha256(item).hexdigest() for item in content]
    chunks = [index * parts // len(keys) for index in range(len(keys))]
    common = {"key": keys, "url": url, "label": labels, "class_name": names}
    manifest = {**common, "offset": [0] * len(keys), "size": [len(item) for item in data], "chunk": chunks}
    records = {
        **common,
        "status": ["unreadable" if key in errors else "ok" for key in keys],
        "error": [errors.get(key) for key in keys],
        "bytes": [len(item) for item in data],
        "content_hash": hashes,
        "mask_norm": [norms.get(key) for key in keys],
    }
    (run / "records").mkdir(parents=True)
    with (run / "manifest.parquet").open("wb") as file:
        pq.write_table(_table(manifest, MANIFEST), file)
    whole = _table(records, RECORDS)
    for chunk in sorted(set(chunks)):
        first, count = chunks.index(chunk), chunks.count(chunk)
        with (run / f"records/part-{chunk:05}.parquet").open("wb") as file:
            pq.write_table(whole.slice(first, count), file)
    (run / "run.json").write_text(json.dumps(_description(root, len(keys), classes, len(set(chunks)))))
    summary = {
        "schema_version": SCHEMA_VERSION,
        "finished": finished,
        "samples": len(keys),
        "status": {"ok": len(keys) - len(errors), "unreadable": len(errors)},
        "mask_density": {},
        "agreement": None,
        "seconds": 1.0,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "_SUCCESS").touch()
    return run


def _bytes(root: Path, key: str) -> bytes:
    path = root / from_text(key)
    return path.read_bytes() if path.is_file() else b""


def _table(columns: Mapping[str, list[object]], schema: pa.Schema) -> pa.Table:
    rows = len(columns["key"])
    arrays = [pa.array(columns.get(field.name, [None] * rows), field.type) for field in schema]
    return pa.table(arrays, schema=schema)


def _description(root: Path, samples: int, classes: list[str], chunks: int) -> dict[str, object]:
    return {
        "schema_version": SCHEMA_VERSION,
        "created": "2026-01-02T03:00:00+00:00",
        "dataset": {
            "location": to_text(root),
            "kind": "imagefolder",
            "name": to_text(root.name),
            "samples": samples,
            "classes": classes,
            "digest": "0" * 64,
        },
        "model": {
            "architecture": "none",
            "weights": "0" * 64,
            "geometry": {"channels": 3, "height": SIZE, "width": SIZE},
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "classes": len(classes),
            "class_names": None,
        },
        "config": {},
        "fingerprint": "0" * 64,
        "plan": {"device": "cpu", "batch_size": 1, "chunk_size": 1, "chunks": chunks},
        "versions": {},
    }
