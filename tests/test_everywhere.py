"""The same images, stored in every way and place: the same scores, the same decisions, the same clean images."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdclean.config import DistillConfig, Geometry, Intake, ModelSpec, ScanConfig
from cdclean.console import Console
from cdclean.datasets import open_dataset, samples
from cdclean.datasets.reading import contents
from cdclean.errors import DatasetError, UsageError
from cdclean.evaluation import evaluate
from cdclean.events import status
from cdclean.examples import Loader, list_examples
from cdclean.exporting import export
from cdclean.plan import resolve
from cdclean.run import scan
from cdclean.selection import select, write_decisions
from cdclean.show import read_image, show
from cdclean.storage import Location, locate
from cdclean.training import TrainConfig, train
from tests.packings import PACKINGS, SIZE, folder, pictures, shards

IMAGES = pictures()


def settings(dataset: str, checkpoint: Path, out: Location, **changes: Any) -> ScanConfig:
    return ScanConfig(
        dataset=dataset,
        model=ModelSpec(str(checkpoint), input_size=(SIZE, SIZE)),
        distill=DistillConfig(steps=3, batch_size=4),
        out=str(out),
        device="cpu",
        chunk_size=8,
        **changes,
    )


def table(run: Location) -> pa.Table:
    parts = sorted((run / "records").glob("part-*.parquet"), key=str)
    return pa.concat_tables([pq.read_table(pa.BufferReader(part.read_bytes())) for part in parts])


def scores(run: Location) -> dict[str, tuple[Any, ...]]:
    """Hash of the image -> everything that was found out about it."""
    names = ["label", "class_name", "status", "prediction", "confidence", "mask_norm", "divergence", "mask_thumbnail"]
    return {row["content_hash"]: tuple(map(str, (row[name] for name in names))) for row in table(run).to_pylist()}


@pytest.fixture(scope="module")
def reference(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    place = tmp_path_factory.mktemp("reference")
    return scores(scan(settings(folder(place / "data", IMAGES), checkpoint, place / "run.cdclean")))


@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_one_scan_filter_evaluate(
    packing: str,
    where: str,
    reference: dict[str, tuple[Any, ...]],
    checkpoint: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    place = locate(request.getfixturevalue("s3")) if where == "s3" else tmp_path
    dataset = PACKINGS[packing](place / "data", IMAGES)
    run = scan(settings(dataset, checkpoint, place / "run.cdclean"))
    assert scores(run) == reference
    assert status(run).state == "complete"

    keys = table(run)["key"].to_pylist()
    with (tmp_path / "truth.csv").open("w") as file:
        csv.writer(file).writerows([("key", "is_backdoor"), *((key, int(row < 6)) for row, key in enumerate(keys))])
    measured = evaluate(run, tmp_path / "truth.csv")
    assert (measured.samples, measured.backdoored) == (24, 6)

    chosen = select(run, quantile=0.25)
    write_decisions(run, chosen)
    clean = place / "clean"
    export(run, chosen.decisions, clean)
    smallest = sorted(table(run).to_pylist(), key=lambda row: row["mask_norm"])[:6]
    kept = set(reference) - {row["content_hash"] for row in smallest}
    again = scan(settings(str(clean / "list.csv") if packing == "list" else str(clean), checkpoint, tmp_path / "again"))
    assert {name: value[2:] for name, value in scores(again).items()} == {
        name: value[2:] for name, value in reference.items() if name in kept
    }


@pytest.mark.parametrize("packing", ["folder", "shards", "parquet"])
def test_no_run_lies_in_a_dataset(packing: str, checkpoint: Path, tmp_path: Path) -> None:
    dataset = PACKINGS[packing](tmp_path / "data", IMAGES)
    before = sorted((tmp_path / "data").rglob("*"))
    with pytest.raises(UsageError, match="inside the dataset"):
        scan(settings(dataset, checkpoint, tmp_path / "data" / "run.cdclean"))
    assert sorted((tmp_path / "data").rglob("*")) == before


def test_a_run_stands_beside_shards_that_are_named(checkpoint: Path, tmp_path: Path) -> None:
    shards(tmp_path, IMAGES)
    run = scan(settings(f"{tmp_path}/000000.tar", checkpoint, tmp_path / "run.cdclean"))
    assert table(run).num_rows == 10


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_bytes_are_those_that_were_stored(packing: str, tmp_path: Path) -> None:
    found = list(samples(open_dataset(PACKINGS[packing](tmp_path / "data", IMAGES))))
    assert [read() for read in contents(found)] == list(IMAGES.values())
    assert [sample.class_name for sample in found] == [key[0] for key in IMAGES]
    assert all(
        sample.problem is None and sample.size == len(data) for sample, data in zip(found, IMAGES.values(), strict=True)
    )


def test_compressed_shards_score_as_well(
    reference: dict[str, tuple[Any, ...]], checkpoint: Path, tmp_path: Path
) -> None:
    dataset = shards(tmp_path / "data", IMAGES, compression="gz")
    assert scores(scan(settings(dataset, checkpoint, tmp_path / "run.cdclean"))) == reference


@pytest.mark.parametrize("packing", ["parquet", "shards.gz", "list"])
def test_a_probe_is_trained_on_any_kind(packing: str, tmp_path: Path) -> None:
    kind, _, compression = packing.partition(".")
    place = tmp_path / "data"
    dataset = shards(place, IMAGES, compression=compression) if compression else PACKINGS[kind](place, IMAGES)
    trained = train(
        TrainConfig(dataset, "timm:test_resnet", str(tmp_path / "probe.pt"), epochs=1, input_size=(SIZE, SIZE))
    )
    assert (trained.images, trained.classes) == (24, 3)
    with pytest.raises(DatasetError, match="do not fit into memory"):
        list_and_load(dataset, room=1000)


def list_and_load(dataset: str, room: int) -> None:
    examples = list_examples(open_dataset(dataset), Console(quiet=True))
    if examples.samples[0].access == "range":
        raise DatasetError("decoded images that do not fit into memory are read again")
    with ThreadPoolExecutor(1) as pool:
        Loader(examples, Geometry(3, SIZE, SIZE), (0.5,) * 3, pool, room)


@pytest.mark.parametrize("packing", ["shards", "parquet"])
def test_a_key_is_shown(packing: str, checkpoint: Path, tmp_path: Path) -> None:
    dataset = PACKINGS[packing](tmp_path / "data", IMAGES)
    run = scan(settings(dataset, checkpoint, tmp_path / "run.cdclean", intake=Intake(limit=12)))
    row = table(run).to_pylist()[11]
    key, data = read_image(row["key"], run)
    assert (key, data) == (row["key"], list(IMAGES.values())[11])
    asked = settings("", checkpoint, tmp_path)
    classifier, config, device = resolve(asked)
    (shown,) = show(classifier, [(key, data)], config, device, tmp_path / "patterns")
    assert shown.mask_norm == row["mask_norm"]
    assert Path(shown.picture).read_bytes().startswith(b"\x89PNG")


def cli(*arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "cdclean", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_files_of_a_list_that_lie_elsewhere_take_no_space(checkpoint: Path, tmp_path: Path) -> None:
    data = Path(folder(tmp_path / "data", pictures(1)))
    inside = tmp_path / "listed" / "near.png"
    inside.parent.mkdir()
    inside.write_bytes((data / "a" / "000.png").read_bytes())
    listed = tmp_path / "listed" / "list.csv"
    listed.write_text("path\nnear.png\nnear.png\n" + "".join(f"{path}\n" for path in sorted(data.rglob("*.png"))))
    run = scan(settings(str(listed), checkpoint, tmp_path / "run.cdclean"))
    decisions = select(run, quantile=0.0).decisions
    assert export(run, decisions, tmp_path / "clean", dry_run=True).bytes == inside.stat().st_size
    export(run, decisions, tmp_path / "clean")
    assert {path.name for path in (tmp_path / "clean").rglob("*.*")} == {".cdclean-copy", "list.csv", "near.png"}


def test_a_run_on_s3_that_is_killed_goes_on(
    s3: str, reference: dict[str, tuple[Any, ...]], checkpoint: Path, tmp_path: Path
) -> None:
    dataset = folder(locate(s3) / "data", IMAGES)
    out = locate(s3) / "run.cdclean"
    arguments = ["scan", dataset, "--model", str(checkpoint), "--out", str(out), "--input-size", str(SIZE)]
    arguments += ["--device", "cpu", "--chunk-size", "8", "--batch-size", "4", "--steps", "3", "--quiet"]
    process = cli(*arguments)
    while not list((out / "records").glob("part-*")) and process.poll() is None:
        time.sleep(0.01)
        out.fs.invalidate_cache()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    out.fs.invalidate_cache()
    assert not (out / "_SUCCESS").exists()
    done = {path.name for path in (out / "records").glob("part-*")}
    assert done < {"part-00000.parquet", "part-00001.parquet", "part-00002.parquet"}
    # The lease is that of a dead process on this host, so it is taken over at once.
    process = cli(*arguments, "--json")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr.decode()
    assert json.loads(stdout)["samples"] == 24
    out.fs.invalidate_cache()
    assert scores(out) == reference
    assert not (out / ".lock").exists()
