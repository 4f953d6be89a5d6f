"""The run folder: a row for every sample, the same scores however it came about, nothing half there."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from cdclean import events, locks, manifest, plan, records, schema, storage
from cdclean.chunk import classifier_on
from cdclean.config import DistillConfig, ModelSpec, ScanConfig
from cdclean.console import Console
from cdclean.datasets import classes, open_dataset, samples
from cdclean.errors import ChangedRunError, GateError, IncompleteError, ModelError, UsageError
from cdclean.run import scan

SIZE = 32


def write_dataset(root: Path, count: int = 8, classes: str = "abc") -> Path:
    """`count` small PNGs in each class, every one different."""
    generator = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:03d}.png")
    return root


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data")


def settings(dataset: Path, checkpoint: Path, out: Path, **changes: Any) -> ScanConfig:
    return replace(
        ScanConfig(
            dataset=str(dataset),
            model=ModelSpec(str(checkpoint), input_size=(SIZE, SIZE)),
            distill=DistillConfig(steps=3, batch_size=4),
            out=str(out),
            device="cpu",
            chunk_size=8,
        ),
        **changes,
    )


def rows(run: Path) -> pa.Table:
    """All records, whole, in the order of the manifest."""
    parts = sorted((run / "records").glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts])


def fingerprint_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Content hash and modification time of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


def test_a_run_holds_what_the_schemas_say(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    before = fingerprint_of(dataset)
    run = scan(settings(dataset, checkpoint, tmp_path / "x.cdclean"))
    assert fingerprint_of(dataset) == before
    jsonschema.validate(json.loads((run / "run.json").read_text()), schema.RUN)
    jsonschema.validate(json.loads((run / "summary.json").read_text()), schema.SUMMARY)
    assert pq.read_schema(run / "manifest.parquet").equals(schema.MANIFEST, check_metadata=False)
    table = rows(run)
    assert table.schema.equals(schema.RECORDS, check_metadata=False)
    listed = pq.read_table(run / "manifest.parquet")
    assert table["key"].to_pylist() == listed["key"].to_pylist() == sorted(listed["key"].to_pylist())
    assert set(table["status"].to_pylist()) == {"ok"}
    for row in table.to_pylist():
        data = (dataset / row["key"]).read_bytes()
        assert row["content_hash"] == hashlib.sha256(data).hexdigest()
        assert (row["bytes"], row["width"], row["height"]) == (len(data), SIZE, SIZE)
        assert row["mask_density"] == pytest.approx(row["mask_norm"] / SIZE**2)
        assert 0 < row["mask_density"] < 1
        assert row["class_name"] == row["key"][0]
        assert row["label"] == "abc".index(row["class_name"])
        assert 1 / 3 <= row["confidence"] <= 1
        assert row["margin"] >= 0
        assert row["steps"] == 3
        assert all(row[name]["bytes"].startswith(b"\x89PNG") for name in table.schema.names if "thumbnail" in name)
    # The names of the parts are the numbers of the chunks, and each holds its chunk.
    for chunk, count in manifest.chunk_sizes(run / "manifest.parquet").items():
        assert pq.read_metadata(records.part_path(run, chunk)).num_rows == count == 8
    assert events.status(run).state == "complete"


def test_scores_do_not_depend_on_chunks_or_neighbours(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    whole = rows(scan(settings(dataset, checkpoint, tmp_path / "a.cdclean", chunk_size=100)))
    parts = rows(scan(settings(dataset, checkpoint, tmp_path / "b.cdclean", chunk_size=5)))
    assert whole.equals(parts)
    (dataset / "a" / "000.png").unlink()
    (dataset / "b" / "bad.png").write_bytes(b"no image")
    fewer = rows(scan(settings(dataset, checkpoint, tmp_path / "c.cdclean", chunk_size=7)))
    both = {row["key"]: row for row in whole.to_pylist()}
    for row in fewer.to_pylist():
        assert row["status"] == "unreadable" or row == both[row["key"]]


def test_a_finished_run_is_left_alone_and_a_changed_one_refused(
    dataset: Path, checkpoint: Path, tmp_path: Path
) -> None:
    config = settings(dataset, checkpoint, tmp_path / "x.cdclean")
    run = scan(config)
    before = fingerprint_of(run)
    assert scan(config) == run
    assert fingerprint_of(run) == before
    with pytest.raises(ChangedRunError, match=r"distill.steps: 3 in the run, 4 now"):
        scan(replace(config, distill=DistillConfig(steps=4, batch_size=4)))
    with pytest.raises(ChangedRunError, match="chunk_size: 8 in the run, 9 now"):
        scan(replace(config, chunk_size=9))
    (dataset / "a" / "000.png").unlink()
    (dataset / "b" / "new.png").write_bytes((dataset / "b" / "001.png").read_bytes())
    with pytest.raises(ChangedRunError) as caught:
        scan(config)
    assert "1 samples added: b/new.png" in str(caught.value)
    assert "1 samples removed: a/000.png" in str(caught.value)
    assert fingerprint_of(run) == before
    with pytest.raises(ModelError):
        scan(replace(config, overwrite=True, model=ModelSpec(str(dataset / "a" / "001.png"))))
    assert fingerprint_of(run) == before  # nothing is forgotten for a model that does not load
    (run / "notes.txt").write_text("mine")
    assert rows(scan(replace(config, overwrite=True))).num_rows == 24
    assert (run / "notes.txt").read_text() == "mine"


def test_a_changed_checkpoint_is_refused(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    mine = tmp_path / "test_resnet.pt"
    mine.write_bytes(checkpoint.read_bytes())
    config = settings(dataset, mine, tmp_path / "x.cdclean")
    scan(config)
    torch.manual_seed(1)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), mine)
    with pytest.raises(ChangedRunError, match=r"model.weights"):
        scan(config)


def test_a_lost_or_damaged_part_is_scored_again(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    config = settings(dataset, checkpoint, tmp_path / "x.cdclean")
    run = scan(config)
    whole = rows(run)
    (run / "_SUCCESS").unlink()
    records.part_path(run, 0).unlink()
    part = records.part_path(run, 1)
    part.write_bytes(part.read_bytes()[:-100])
    kept = fingerprint_of(run)[str(records.part_path(run, 2))]
    scan(config)
    assert rows(run).equals(whole)
    assert fingerprint_of(run)[str(records.part_path(run, 2))] == kept


SCAN = """
import sys
from pathlib import Path
import torch
from cdclean.run import scan
from tests.test_run import settings
torch.set_num_threads(int(sys.argv[4]))
dataset, checkpoint, out = map(Path, sys.argv[1:4])
scan(settings(dataset, checkpoint, out, chunk_size=2, workers=int(sys.argv[5])))
"""


def start(*arguments: Path, threads: int = 1, workers: int = 1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCAN, *map(str, arguments), str(threads), str(workers)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("wanted_kills", "workers"),
    [(3, 1), pytest.param(20, 1, marks=pytest.mark.slow), pytest.param(10, 2, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments_it_ends_with_the_same_records(
    wanted_kills: int, workers: int, checkpoint: Path, tmp_path: Path
) -> None:
    """SIGKILL at moments that fall anywhere: indexing, scoring, writing."""
    dataset = write_dataset(tmp_path / "data", count=4 * wanted_kills)
    whole = rows(scan(settings(dataset, checkpoint, tmp_path / "whole.cdclean", chunk_size=2)))
    run = tmp_path / "killed.cdclean"
    moments, kills = random.Random(0), 0
    while kills < wanted_kills and not (run / "_SUCCESS").exists():
        threads = moments.randint(1, 4)  # whatever a machine offers, an operation has one
        process = start(dataset, checkpoint, run, threads=threads, workers=workers)
        have = len(list(run.glob("records/part-*")))
        wanted = have + moments.randint(0, 4)
        while process.poll() is None and len(list(run.glob("records/part-*"))) < wanted:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
        for part in run.glob("records/part-*.parquet"):
            assert pq.read_table(part).num_rows == 2  # under its final name a part is whole
    assert kills == wanted_kills
    if not (run / "_SUCCESS").exists():
        last = start(dataset, checkpoint, run)
        last.communicate()
        assert last.returncode == 0
    assert rows(run).equals(whole)
    assert not any(storage.is_temporary(path) for path in run.rglob("*"))


def test_a_worker_that_finds_other_weights_scores_nothing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node that has another file under the same path, or where the file was replaced since the run began."""
    path = tmp_path / "test_resnet.pt"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), path)
    resolve = plan.resolve

    def replaced(asked: ScanConfig) -> plan.Loaded:
        loaded = resolve(asked)
        torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), path)
        classifier_on.cache_clear()
        return loaded

    monkeypatch.setattr(plan, "resolve", replaced)
    run = tmp_path / "x.cdclean"
    with pytest.raises(ModelError, match="other weights"):
        scan(settings(dataset, path, run))
    assert not list((run / "records").iterdir())


def test_a_model_that_was_trained_again_is_loaded_again(dataset: Path, tmp_path: Path) -> None:
    """In one process, as in a notebook."""
    path, found = tmp_path / "test_resnet.pt", []
    for number in range(2):
        torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), path)
        run = scan(settings(dataset, path, tmp_path / f"{number}.cdclean"))
        content = records.load_run(run)
        assert content["model"]["weights"] == content["config"]["model"]["weights"]
        found.append(rows(run)["mask_norm"].to_pylist())
    assert found[0] != found[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_command_resumably(
    number: signal.Signals, dataset: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "x.cdclean"
    arguments = ["--model", checkpoint, "--out", run, "--input-size", "32", "--device", "cpu"]
    command = [sys.executable, "-m", "cdclean", "scan", dataset, *arguments, "--steps", "3", "--chunk-size", "2"]
    process = subprocess.Popen(list(map(str, command)), cwd=Path(__file__).parents[1], stderr=subprocess.PIPE)
    while process.poll() is None and len(list(run.glob("records/part-*"))) < 2:
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number, errors.decode()
    assert b"Run the same command again" in errors
    assert events.status(run).state == "stopped"
    assert not any(storage.is_temporary(path) for path in run.rglob("*"))
    again = subprocess.run(list(map(str, command)), cwd=Path(__file__).parents[1], capture_output=True)
    assert again.returncode == 0
    assert b"resuming" in again.stderr
    assert rows(run).num_rows == 24


def test_two_scans_of_one_folder_do_not_meet(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.cdclean"
    out.mkdir()
    with locks.lock(out):
        process = start(dataset, checkpoint, out)
        _, errors = process.communicate()
        assert process.returncode == 1
        assert b"LockedError: another cdclean process is writing to" in errors
        assert not (out / "run.json").exists()
    assert rows(scan(settings(dataset, checkpoint, out))).num_rows == 24


def test_a_sample_without_a_score_has_a_row_that_says_why(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    (dataset / "a" / "text.jpg").write_text("not an image")
    (dataset / "a" / "empty.png").touch()
    (dataset / "a" / "outside.png").symlink_to("/etc/hostname")
    (dataset / "b" / os.fsdecode(b"caf\xe9 \n'\".png")).write_bytes((dataset / "b" / "000.png").read_bytes())
    image = (dataset / "c" / "000.png").read_bytes()
    (dataset / "c" / "cut.png").write_bytes(image[: len(image) // 2])
    config = settings(dataset, checkpoint, tmp_path / "x.cdclean", max_error_rate=0.5)
    table = rows(scan(config))
    bad = {row["key"]: row for row in table.to_pylist() if row["status"] != "ok"}
    assert set(bad) == {"a/text.jpg", "a/empty.png", "a/outside.png", "c/cut.png"}
    assert all(row["error"] and row["mask_norm"] is None for row in bad.values())
    odd = [row for row in table.to_pylist() if "caf" in row["key"]]
    assert odd[0]["key"] == "b/caf\\xe9 \n'\".png"
    same = [row for row in table.to_pylist() if row["key"] == "b/000.png"]
    assert odd[0]["content_hash"] == same[0]["content_hash"]
    with pytest.raises(GateError, match="4 of 29"):
        scan(replace(config, max_error_rate=0.1))


class Fragile(torch.nn.Module):
    """Answers with NaN where the first pixel is white."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3 * SIZE * SIZE, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        white = images[:, :, 0, 0].amin(1) > 0.999
        return self.head(images.flatten(1)).masked_fill(white[:, None], float("nan"))


def test_an_answer_that_is_not_finite_gives_a_row_not_a_score(dataset: Path, tmp_path: Path) -> None:
    with Image.open(dataset / "a" / "000.png") as image:
        image.putpixel((0, 0), (255, 255, 255))
        image.save(dataset / "a" / "000.png")
    torch.save(Fragile().state_dict(), tmp_path / "fragile.pt")
    model = ModelSpec(str(tmp_path / "fragile.pt"), "tests.test_run:Fragile", (SIZE, SIZE), (0,) * 3, (1,) * 3)
    for precision in ("fp32", "bf16"):
        config = settings(dataset, tmp_path, tmp_path / f"{precision}.cdclean", model=model)
        table = rows(scan(replace(config, distill=replace(config.distill, precision=precision, head="softmax"))))
        bad = [row for row in table.to_pylist() if row["status"] != "ok"]
        assert [(row["key"], row["status"], row["mask_norm"]) for row in bad] == [("a/000.png", "crashed", None)]
        assert "not a finite number" in bad[0]["error"]


def test_a_full_disk_leaves_a_run_that_resumes(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes every write past 20 kB fail, as a full disk does; the parts are larger than that."""
    out = tmp_path / "x.cdclean"
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
    code = limited + SCAN.replace("chunk_size=2", "chunk_size=8")
    command = [sys.executable, "-c", code, str(dataset), str(checkpoint), str(out), "1", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert "IncompleteError" in done.stderr
    assert not any((out / "records").iterdir())
    assert rows(scan(settings(dataset, checkpoint, out))).num_rows == 24


def test_a_full_temporary_folder_is_named(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))\n"
    code = SCAN.replace("scan(settings", f"{limited}scan(settings")
    command = [sys.executable, "-c", code, str(dataset), str(checkpoint), str(tmp_path / "x.cdclean"), "1", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert "cannot write to the temporary folder" in done.stderr
    assert rows(scan(settings(dataset, checkpoint, tmp_path / "x.cdclean"))).num_rows == 24


def test_folders_that_are_not_runs_are_not_touched(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not a run's"):
            scan(settings(dataset, checkpoint, other, overwrite=overwrite))
    with pytest.raises(UsageError, match="inside the dataset"):
        scan(settings(dataset, checkpoint, dataset / "run.cdclean"))
    assert (other / "thesis.txt").read_text() == "mine"
    assert not (dataset / "run.cdclean").exists()


def test_disagreement_with_the_labels_is_said(
    dataset: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = scan(settings(dataset, checkpoint, tmp_path / "x.cdclean"), Console())
    shown = capsys.readouterr()
    assert "agree with the folder's labels on" in shown.err
    assert shown.out == ""
    table = rows(run)
    agreed = np.mean(np.array(table["label"]) == np.array(table["prediction"]))
    assert json.loads((run / "summary.json").read_text())["agreement"] == pytest.approx(agreed)


def test_features_of_a_model_without_a_classifier(dataset: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "test_resnet.pt")
    config = settings(dataset, tmp_path / "test_resnet.pt", tmp_path / "x.cdclean")
    with pytest.raises(UsageError, match="no classifier"):
        scan(config)
    run = scan(replace(config, distill=DistillConfig(objective="features", steps=2, batch_size=4)))
    table = rows(run)
    assert set(table["status"].to_pylist()) == {"ok"}
    assert table["prediction"].null_count == table.num_rows
    assert json.loads((run / "run.json").read_text())["plan"]["layer"].endswith("layer3")


def test_an_unfinished_run_is_not_read_as_a_finished_one(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = scan(settings(dataset, checkpoint, tmp_path / "x.cdclean"))
    assert records.newest_run(tmp_path) == run
    (run / "_SUCCESS").unlink()
    with pytest.raises(IncompleteError):
        records.newest_run(tmp_path)


def test_indexing_lists_in_chunks_and_sees_what_changed(dataset: Path, tmp_path: Path) -> None:
    found = open_dataset(str(dataset))
    index = manifest.write(tmp_path / "manifest.parquet", samples(found), classes(found), 10, lambda _: None)
    assert (index.samples, index.chunks, index.classes) == (24, 3, ("a", "b", "c"))
    assert manifest.chunk_sizes(tmp_path / "manifest.parquet") == {0: 10, 1: 10, 2: 4}
    jobs = [job for chunk in range(3) for job in manifest.read_chunk(tmp_path / "manifest.parquet", chunk)]
    assert [job.key for job in jobs] == ds.dataset(tmp_path / "manifest.parquet").to_table()["key"].to_pylist()
    assert manifest.changes(tmp_path / "manifest.parquet", lambda: samples(found), index.digest) == []
    (dataset / "a" / "001.png").write_bytes(b"shorter")
    assert manifest.changes(tmp_path / "manifest.parquet", lambda: samples(found), index.digest) == [
        "dataset: 1 samples changed: a/001.png"
    ]
