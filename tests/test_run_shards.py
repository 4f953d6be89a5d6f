"""Several processes and machines on one run: --shard, --workers, samples that kill, metrics, and who waits for whom."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from prometheus_client.parser import text_string_to_metric_families

from cdclean import devices, engines, events, locks, schema
from cdclean import run as run_module
from cdclean.config import DistillConfig, Intake, ModelSpec, ScanConfig
from cdclean.datasets import Dataset
from cdclean.engines import local
from cdclean.engines.local import Spare
from cdclean.errors import ChangedRunError, IncompleteError, LockedError, ModelError, UsageError
from cdclean.records import load_summary
from cdclean.run import scan
from tests.packings import SIZE, folder, pictures

ROOT = Path(__file__).parents[1]
_GIVEN = ("key", "url", "label", "class_name", "bytes")


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path) -> ScanConfig:
    return ScanConfig(
        dataset=folder(tmp_path / "data", pictures(8)),
        model=ModelSpec(str(checkpoint), input_size=(SIZE, SIZE)),
        distill=DistillConfig(steps=2, batch_size=4),
        out=str(tmp_path / "run.cdclean"),
        device="cpu",
        chunk_size=4,
    )


def rows(run: Any) -> pa.Table:
    return pa.concat_tables([pq.read_table(part) for part in sorted((run / "records").glob("part-*.parquet"))])


def test_shards_make_one_run(settings: ScanConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = rows(scan(replace(settings, out=str(tmp_path / "whole"))))
    for index in (2, 0):
        run = scan(replace(settings, shard=(index, 3)))
        assert not (run / "_SUCCESS").exists()
        assert events.status(run).state == "stopped"
    assert events.status(run).done == 16
    run = scan(replace(settings, shard=(1, 3)))
    assert (run / "_SUCCESS").exists()
    assert rows(run).equals(whole)
    assert {path.name for path in run.glob("events*.jsonl")} == {f"events-{i}-of-3.jsonl" for i in range(3)}
    state = events.status(run)
    assert (state.state, state.done, state.samples) == ("complete", 24, 24)


def test_shards_at_the_same_time(settings: ScanConfig, tmp_path: Path) -> None:
    whole = rows(scan(replace(settings, out=str(tmp_path / "whole"))))
    failures = []

    def run_shard(index: int) -> None:
        try:
            scan(replace(settings, shard=(index, 3)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run_shard, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    run = Path(str(settings.out))
    assert (run / "_SUCCESS").exists()
    assert rows(run).equals(whole)


def lose_scores(run: Path, chunk: int) -> None:
    """As after a night in which memory was short."""
    part = run / "records" / f"part-{chunk:05}.parquet"
    found = [dict.fromkeys(row) | {name: row[name] for name in _GIVEN} for row in pq.read_table(part).to_pylist()]
    found = [row | {"status": "oom", "error": "out of memory"} for row in found]
    pq.write_table(pa.Table.from_pylist(found, schema=schema.RECORDS), part)


@pytest.mark.parametrize("retry_errors", [True, False])
def test_the_last_of_several_shards_sums_up_what_was_tried_again(
    retry_errors: bool, settings: ScanConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that are written anew are there before, so none is missing to a shard that ends first."""
    run, score, states = Path(str(scan(settings))), run_module._score, []
    for chunk in range(6) if retry_errors else (1,):
        lose_scores(run, chunk)

    def other_first(place: Any, its: ScanConfig, *rest: Any) -> None:
        if its.shard == (1, 2):
            scan(replace(settings, shard=(0, 2), retry_errors=retry_errors))
            states.append(events.status(run).state)
        score(place, its, *rest)

    monkeypatch.setattr(run_module, "_score", other_first)
    scan(replace(settings, shard=(1, 2), retry_errors=True))
    assert states == ["running"]
    assert set(rows(run)["status"].to_pylist()) == {"ok"}
    assert load_summary(run)["status"] == {"ok": 24}


def test_a_shard_that_waits_for_the_whole_run_does_not_keep_it_from_its_end(
    settings: ScanConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, score = Path(str(settings.out)), run_module._score

    def meanwhile(*arguments: Any) -> None:
        held.enter_context(locks.lock(run, name=".lock-0-of-2"))  # it has its own lock, and waits for the run's
        score(*arguments)

    monkeypatch.setattr(run_module, "_score", meanwhile)
    with ExitStack() as held:
        scan(settings)
        assert (run / "_SUCCESS").exists()


def test_shards_and_the_whole_keep_out_of_each_others_way(settings: ScanConfig) -> None:
    run = Path(str(settings.out))
    scan(replace(settings, shard=(0, 2)))
    with locks.lock(run, name=".lock-1-of-2"):
        assert events.status(run).state == "running"
        with pytest.raises(LockedError, match="shards of"):
            scan(settings)
        with pytest.raises(LockedError):
            scan(replace(settings, shard=(1, 2)))
        temporary = run / "records" / ".part-00001.parquet.x.part"
        temporary.touch()
        scan(replace(settings, shard=(0, 2)))
        assert temporary.exists(), "it may be the other shard's"
    scan(settings)
    assert not temporary.exists()


@pytest.mark.parametrize("changes", [{"shard": (2, 2)}, {"shard": (-1, 2)}, {"shard": (0, 2), "overwrite": True}])
def test_shards_that_make_no_sense(changes: dict[str, Any], settings: ScanConfig) -> None:
    with pytest.raises(UsageError):
        replace(settings, **changes)


def test_two_workers_give_what_one_gives(settings: ScanConfig, tmp_path: Path) -> None:
    whole = rows(scan(replace(settings, out=str(tmp_path / "whole"))))
    assert rows(scan(replace(settings, workers=2))).equals(whole)


@pytest.mark.parametrize(
    ("changes", "many", "ahead"),
    [
        ({"workers": 2}, 25, True),
        ({}, 25, False),
        ({}, 24, True),
        ({"workers": 1}, 24, False),
        ({"workers": 2, "engine": "serial"}, 24, False),
        ({"intake": Intake(limit=8)}, 24, False),
        ({"intake": Intake(include=("a/*",))}, 24, True),  # too many are better than a second listing
    ],
)
def test_processes_are_started_ahead_where_many_are_needed(
    changes: dict[str, Any], many: int, ahead: bool, settings: ScanConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def started_ahead(count: int, module: str) -> AbstractContextManager[list[Spare]]:
        started.append(count)
        return local.started_ahead(count, module)

    monkeypatch.setattr(devices, "cores", lambda: 3)
    monkeypatch.setattr(run_module, "_MANY", many)  # of 24 samples
    monkeypatch.setattr(engines, "started_ahead", started_ahead)
    settings = replace(settings, **changes)
    scan(settings)
    assert started == [2] * ahead
    scan(settings)  # it is complete: nobody is needed
    assert started == [2] * ahead


def test_nothing_is_started_for_what_is_refused(settings: ScanConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "started_ahead", lambda *_: pytest.fail("started"))
    with pytest.raises(ModelError):
        scan(replace(settings, workers=2, model=ModelSpec(f"{settings.model.source}.gone")))


def test_a_script_needs_no_guard(settings: ScanConfig, tmp_path: Path) -> None:
    """Processes are spawned, and would run the script again."""
    script = f"""
import cdclean
print("once")
model = cdclean.ModelSpec({settings.model.source!r}, input_size=({SIZE}, {SIZE}))
config = cdclean.DistillConfig(steps=1, batch_size=4)
settings = cdclean.ScanConfig({settings.dataset!r}, model, config, out={settings.out!r}, device="cpu", workers=2)
print(cdclean.scan(settings), __file__)
"""
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["once", f"{settings.out} {tmp_path / 'script.py'}"], done.stderr


# A factory whose network kills its process when it sees a marked image.
KILLER = """
import os, torch, timm
class Killer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = timm.create_model("test_resnet", num_classes=3)
    def forward(self, images):
        marked = (images[:, :, 0, 0] > 0.999).all(1)
        if marked.any():
            os.kill(os.getpid(), 9)
        return self.net(images)
def make():
    torch.manual_seed(0)
    return Killer()
"""


def test_samples_that_kill_get_a_row_that_says_so(settings: ScanConfig, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "killer.py").write_text(KILLER)
    data = Path(str(settings.dataset))
    for name in ("a/001.png",):
        image = Image.open(data / name).convert("RGB")
        image.putpixel((0, 0), (255, 255, 255))
        file = io.BytesIO()
        image.save(file, "PNG")
        (data / name).write_bytes(file.getvalue())
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=3)
    torch.save({f"net.{name}": value for name, value in net.state_dict().items()}, tmp_path / "killer.pt")
    command = [sys.executable, "-m", "cdclean", "scan", str(data), "--model", str(tmp_path / "killer.pt")]
    command += ["--arch", "killer:make", "--input-size", str(SIZE), "--mean", "0,0,0", "--std", "1,1,1"]
    command += ["--out", str(settings.out), "--engine", "local", "--workers", "2", "--device", "cpu"]
    command += ["--chunk-size", "2", "--batch-size", "2", "--steps", "1", "--head", "softmax", "--include", "[ab]/*"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = Path(str(settings.out))
    found = {row["key"]: row for row in rows(run).to_pylist()}
    assert {key for key, row in found.items() if row["status"] == "crashed"} == {"a/001.png"}
    assert "ended the process" in found["a/001.png"]["error"]
    assert sum(row["status"] == "ok" for row in found.values()) == 15
    kinds = [event["event"] for event in events.read(run)]
    assert kinds.count("crashed") == 1
    assert "bisecting" in kinds


def test_a_lost_dataset_stops_the_scan(settings: ScanConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(str(settings.dataset))
    scan(replace(settings, shard=(0, 2)))
    data.rename(data.with_name("elsewhere"))
    data.mkdir()  # what an unmounted disk leaves
    here = Dataset(str(data), "imagefolder", "data")
    with monkeypatch.context() as patch:  # it goes when the scan has begun
        patch.setattr("cdclean.datasets.open_dataset", lambda *_: here)
        patch.setattr("cdclean.manifest.changes", lambda *_, **__: [])
        with pytest.raises(IncompleteError, match="has gone while it was scored"):
            scan(settings)
    data.rmdir()
    data.with_name("elsewhere").rename(data)
    run = scan(settings)
    assert set(rows(run)["status"].to_pylist()) == {"ok"}


def test_metrics_are_not_written_into_the_dataset(settings: ScanConfig) -> None:
    with pytest.raises(UsageError, match="inside the dataset"):
        scan(replace(settings, metrics_file=f"{settings.dataset}/cdclean.prom"))
    assert not Path(f"{settings.dataset}/cdclean.prom").exists()


def test_a_line_that_a_full_disk_cut_takes_no_other_with_it(settings: ScanConfig) -> None:
    run = scan(replace(settings, shard=(0, 2)))
    log = run / "events-0-of-2.jsonl"
    log.write_bytes(log.read_bytes()[:-10])
    before = list(events.read(run))
    events.Log(run, log.name).append("start")
    assert [event["event"] for event in events.read(run)] == [event["event"] for event in before] + ["start"]


def test_metrics(settings: ScanConfig, tmp_path: Path) -> None:
    path = tmp_path / "cdclean.prom"
    settings = replace(settings, metrics_file=str(path))

    def values() -> dict[str, float]:
        families = text_string_to_metric_families(path.read_text())
        return {
            sample.name + "".join(v for k, v in sample.labels.items() if k == "cdclean_scan_state"): sample.value
            for family in families
            for sample in family.samples
        }

    scan(settings)
    found = values()
    assert (found["cdclean_scan_samples"], found["cdclean_scan_samples_done"]) == (24, 24)
    assert found["cdclean_scan_statecomplete"] == 1
    assert found["cdclean_scan_samples_failed"] == 0
    path.unlink()
    scan(settings)  # nothing is left to do
    assert (values()["cdclean_scan_samples"], values()["cdclean_scan_samples_done"]) == (24, 24)
    with pytest.raises(ChangedRunError):
        scan(replace(settings, thumbnail_size=1))
    assert values()["cdclean_scan_statefailed"] == 1


def test_a_good_batch_size_is_found_and_kept(settings: ScanConfig) -> None:
    from cdclean.records import load_run

    settings = replace(settings, distill=DistillConfig(steps=1), batch_size_auto=True)
    run = scan(replace(settings, shard=(0, 2)))
    found = load_run(run, complete=False)["plan"]["batch_size"]
    assert found in {2**n for n in range(11)}
    scan(replace(settings, shard=(1, 2)))
    assert load_run(run)["plan"]["batch_size"] == found
