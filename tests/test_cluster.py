"""The cluster engine, on a real Ray cluster of several nodes on this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import timm
import torch

from cdclean import events
from cdclean.config import DistillConfig, ModelSpec, ScanConfig
from cdclean.engines import cluster
from cdclean.errors import CdcleanError, IncompleteError, OutputError, UsageError
from cdclean.run import scan
from tests.engine_workers import Done, Scorer, alive, workers_seen, written
from tests.packings import SIZE, folder, pictures
from tests.test_engines_local import Told, wait_for

pytest.importorskip("ray")

ROOT = Path(__file__).parents[1]
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}  # about the least that Ray takes


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head that has no place for an actor, and a node that has one."""
    from ray.cluster_utils import Cluster

    handler = signal.getsignal(signal.SIGTERM)
    made = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0, "include_dashboard": False})
    made.add_node(**NODE, num_gpus=1)  # that nothing looks for
    yield made
    made.shutdown()
    signal.signal(signal.SIGTERM, handler)


class ToldByCluster(Told):
    def chunks(self, address: str | None, worker: Scorer, chunks: int, stall: float = 60.0) -> Iterator[Done]:
        pending = dict.fromkeys(range(chunks), worker.size)
        return cluster.run_chunks(worker, pending, address, None, self.progress, self.incidents.append, stall=stall)


def gone(folder: Path) -> bool:
    return not any(alive(pid) for pid, _ in workers_seen(folder))


def test_a_node_is_killed_in_mid_run(nodes: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def stop(number: int, frame: object) -> None: ...

    victim, told, reports = nodes.add_node(**NODE), ToldByCluster(), []
    before = signal.signal(signal.SIGTERM, stop)
    try:
        for report in told.chunks(nodes.address, Scorer(tmp_path, 5, pause=0.1), 12):
            reports.append(report.chunk)
            if len(set(workers_seen(tmp_path))) == 2 and victim is not None:
                nodes.remove_node(victim, allow_graceful=False)
                victim = None
        assert signal.getsignal(signal.SIGTERM) is stop, "Ray's own handler would end the process where it is"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert victim is None
    assert sorted(reports) == list(range(12))
    assert written(tmp_path) == dict.fromkeys(range(12), ["ok"] * 5)
    assert told.samples == 60
    assert "died" in told.kinds()
    assert "the node is lost" in told.incidents[0].text
    assert capfd.readouterr().out == "", "results go there"
    wait_for(lambda: gone(tmp_path))


@pytest.mark.slow  # the default run has it for processes; the schedule is the same
def test_samples_that_kill_are_found_and_the_rest_is_scored(nodes: Any, tmp_path: Path) -> None:
    told = ToldByCluster()
    traps = ((0, 1, "kill"), (1, 0, "first-wedge"))
    reports = list(told.chunks(nodes.address, Scorer(tmp_path, 2, traps=traps), 3, stall=10.0))
    assert sorted(report.chunk for report in reports) == [0, 1, 2]
    assert written(tmp_path) == {0: ["ok", "crashed"], 1: ["ok", "ok"], 2: ["ok", "ok"]}
    assert told.samples == 6
    assert [incident.rows for incident in told.incidents if incident.kind == "crashed"] == [(1,)]
    assert any(incident.chunk == 1 and "no sign of life" in incident.text for incident in told.incidents)


def test_an_actor_sees_its_own_gpu_alone(nodes: Any, tmp_path: Path) -> None:
    list(ToldByCluster().chunks(nodes.address, Scorer(tmp_path, 2, device="cuda:3"), 1))
    assert {device for _, device in workers_seen(tmp_path)} == {"cuda:0"}


def test_what_a_worker_raises_is_raised_here(nodes: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left") as full:
        list(ToldByCluster().chunks(nodes.address, Scorer(tmp_path, 4, traps=((1, 2, "full"),)), 2))
    assert full.value.hint == "Free space."
    with pytest.raises(CdcleanError, match=r"(?s)failed at chunk 1:.*ZeroDivisionError: a bug"):
        list(ToldByCluster().chunks(nodes.address, Scorer(tmp_path, 4, traps=((1, 2, "bug"),)), 2))
    wait_for(lambda: gone(tmp_path))


def test_an_iterator_that_is_closed_leaves_no_actor(nodes: Any, tmp_path: Path) -> None:
    with closing(ToldByCluster().chunks(nodes.address, Scorer(tmp_path, 50, pause=0.02), 2)) as chunks:
        next(chunks)
    wait_for(lambda: gone(tmp_path))


def test_workers_that_are_never_ready_and_rooms_that_are_never_free(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ToldByCluster()
    with pytest.raises(IncompleteError, match="3 workers in a row have died before they were ready"):
        list(told.chunks(nodes.address, Scorer(tmp_path, 4, on_device=("cpu", "exit")), 2))
    monkeypatch.setattr("cdclean.engines.cluster._CPUS", 8.0)
    with pytest.raises(IncompleteError, match=r"no worker has come to life .* one takes 8 CPU"):
        list(told.chunks(nodes.address, Scorer(tmp_path, 4), 2, stall=2.0))


def test_no_cluster_and_no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"cannot connect to a Ray cluster at 127\.0\.0\.1:1:"):
        list(ToldByCluster().chunks("127.0.0.1:1", Scorer(tmp_path, 4), 2))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError) as missing:
        list(ToldByCluster().chunks("auto", Scorer(tmp_path, 4), 2))
    assert missing.value.hint == "pip install 'cdclean[ray]'"


@pytest.mark.slow
def test_a_cluster_is_started_here(tmp_path: Path) -> None:
    import ray

    told = ToldByCluster()
    list(told.chunks(None, Scorer(tmp_path, 4), 2))
    assert written(tmp_path) == dict.fromkeys(range(2), ["ok"] * 4)
    assert not told.incidents
    assert not ray.is_initialized()


def test_a_scan_that_loses_a_node_ends_as_one_in_this_process(nodes: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "test_resnet.pt")
    settings = ScanConfig(
        folder(tmp_path / "data", pictures(14)),
        ModelSpec(str(tmp_path / "test_resnet.pt"), input_size=(SIZE, SIZE)),
        DistillConfig(steps=80, batch_size=4),
        out=str(tmp_path / "cluster.cdclean"),
        device="cpu",
        chunk_size=4,
    )
    parts = tmp_path / "cluster.cdclean" / "records"
    victim = nodes.add_node(**NODE)

    def lose() -> None:
        wait_for(lambda: len(list(parts.glob("part-*"))) >= 3)
        nodes.remove_node(victim, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        run = scan(replace(settings, engine="ray", ray_address=nodes.address))
    finally:
        thread.join()
    assert "died" in {event["event"] for event in events.read(run)}
    whole = scan(replace(settings, out=str(tmp_path / "whole.cdclean"), engine="serial"))
    names = [part.name for part in sorted((whole / "records").glob("part-*"))]
    assert names == [part.name for part in sorted(parts.glob("part-*"))]
    for name in names:
        assert pq.read_table(parts / name).equals(pq.read_table(whole / "records" / name))


@pytest.mark.slow  # the default run has it for processes
def test_a_signal_while_ray_waits_stops_the_command_resumably(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "x.cdclean"
    command = ["scan", folder(tmp_path / "data", pictures(8)), "--model", str(checkpoint), "--out", str(run)]
    command += ["--input-size", str(SIZE), "--device", "cpu", "--engine", "ray", "--chunk-size", "2", "--steps", "2000"]
    process = subprocess.Popen([sys.executable, "-m", "cdclean", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "events.jsonl").exists() or process.poll() is not None)
    time.sleep(5)  # it waits for its actors, or for what they find
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert events.status(run).state == "stopped"
