"""The local engine, on real processes that really die."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from cdclean.engines import local
from cdclean.engines.tasks import Incident
from cdclean.errors import CdcleanError, IncompleteError, ModelError, OutputError
from tests.engine_workers import Done, Scorer, alive, workers_seen, written

TWO = ("cpu:0", "cpu:1")


class Told:
    """What an engine says while it runs."""

    def __init__(self) -> None:
        self.samples = 0
        self.incidents: list[Incident] = []

    def kinds(self) -> Counter[str]:
        return Counter(incident.kind for incident in self.incidents)

    def run(
        self,
        worker: Scorer,
        chunks: int,
        devices: tuple[str, ...] = TWO,
        stall: float = 60.0,
        spares: list[local.Spare] | None = None,
    ) -> list[Done]:
        pending = dict.fromkeys(range(chunks), worker.size)
        how: dict[str, Any] = {"stall": stall, "spares": spares}
        return list(local.run_chunks(worker, pending, devices, self.progress, self.incidents.append, **how))

    def progress(self, samples: int) -> None:
        assert samples > 0
        self.samples += samples


def wait_for(what: Callable[[], Any]) -> None:
    while not what():
        time.sleep(0.02)


def test_all_processes_pull(tmp_path: Path) -> None:
    told = Told()
    reports = told.run(Scorer(tmp_path, 5, pause=0.01), 12)
    assert sorted(report.chunk for report in reports) == list(range(12))
    assert written(tmp_path) == {chunk: ["ok"] * 5 for chunk in range(12)}
    assert told.samples == 60
    assert not told.incidents
    seen = set(workers_seen(tmp_path))
    assert {device for _, device in seen} == set(TWO)
    assert len(seen) == 2
    assert os.getpid() not in {pid for pid, _ in seen}
    assert not any(alive(pid) for pid, _ in seen)


def test_no_more_processes_than_chunks(tmp_path: Path) -> None:
    Told().run(Scorer(tmp_path, 2), 1, ("cpu",) * 5)
    assert len(set(workers_seen(tmp_path))) == 1
    assert Told().run(Scorer(tmp_path, 2), 0) == []


def test_processes_that_were_started_ahead_are_taken_and_the_others_ended(tmp_path: Path) -> None:
    told = Told()
    with local.started_ahead(3, "tests.engine_workers") as spares:
        pids = [process.pid or 0 for process, _ in spares]
        told.run(Scorer(tmp_path, 2, pause=0.05), 12, spares=spares)
        assert not spares
        assert {pid for pid, _ in workers_seen(tmp_path)} == set(pids[:2])
        assert not any(map(alive, pids))
    assert written(tmp_path) == {chunk: ["ok"] * 2 for chunk in range(12)}
    assert not told.incidents


def test_a_process_that_died_before_it_was_needed_is_replaced(tmp_path: Path) -> None:
    told = Told()
    with local.started_ahead(1, "tests.engine_workers") as spares:
        os.kill(spares[0][0].pid or 0, signal.SIGKILL)
        told.run(Scorer(tmp_path, 2), 3, ("cpu",), spares=spares)
    assert written(tmp_path) == {chunk: ["ok"] * 2 for chunk in range(3)}
    assert told.kinds() == {"died": 1}


def test_what_is_started_ahead_goes_when_nothing_comes_of_it() -> None:
    pids: list[int] = []
    with suppress(ModelError), local.started_ahead(2, "tests.engine_workers") as spares:
        pids += [process.pid or 0 for process, _ in spares]
        raise ModelError("it cannot be loaded")
    assert len(pids) == 2
    assert not any(map(alive, pids))


@pytest.mark.parametrize(("what", "said"), [("kill", "SIGKILL"), ("segfault", "SIGSEGV"), ("exit", "exit code 7")])
def test_a_worker_that_dies_once_is_replaced(what: str, said: str, tmp_path: Path) -> None:
    told = Told()
    told.run(Scorer(tmp_path, 4, traps=((1, 2, f"first-{what}"),)), 3, ("cpu",))
    assert written(tmp_path) == dict.fromkeys(range(3), ["ok"] * 4)
    assert told.samples == 12
    assert told.kinds() == {"died": 1, "again": 1}
    assert told.incidents[0].chunk == 1
    assert said in told.incidents[0].text
    assert len(set(workers_seen(tmp_path))) == 2


def test_samples_that_kill_are_found_and_the_rest_is_scored(tmp_path: Path) -> None:
    told = Told()
    traps = ((0, 3, "kill"), (2, 0, "exit"), (2, 5, "kill"), (1, 1, "first-kill"))
    reports = told.run(Scorer(tmp_path, 6, traps=traps), 4)
    assert sorted(report.chunk for report in reports) == list(range(4))
    expected = {chunk: ["ok"] * 6 for chunk in range(4)}
    for chunk, row in ((0, 3), (2, 0), (2, 5)):
        expected[chunk][row] = "crashed"
    assert written(tmp_path) == expected
    assert told.samples == 24
    found = {incident.chunk: incident.rows for incident in told.incidents if incident.kind == "crashed"}
    assert found == {0: (3,), 2: (0, 5)}
    assert not any(alive(pid) for pid, _ in workers_seen(tmp_path))


def test_a_silent_worker_is_killed(tmp_path: Path) -> None:
    told = Told()
    told.run(Scorer(tmp_path, 2, traps=((1, 1, "first-wedge"),)), 2, ("cpu",), stall=4.0)
    assert written(tmp_path) == {0: ["ok", "ok"], 1: ["ok", "ok"]}
    assert told.kinds() == {"died": 1, "again": 1}
    assert "no sign of life" in told.incidents[0].text
    assert not any(alive(pid) for pid, _ in workers_seen(tmp_path))


def test_a_slow_worker_is_not_silent(tmp_path: Path) -> None:
    told = Told()
    told.run(Scorer(tmp_path, 9, pause=0.5), 1, ("cpu",), stall=3.0)
    assert not told.incidents


def test_workers_are_killed_at_random_and_nothing_is_lost(tmp_path: Path) -> None:
    told, generator, kills = Told(), random.Random(0), 8

    def progress(samples: int) -> None:
        nonlocal kills
        told.progress(samples)
        living = [pid for pid in {pid for pid, _ in workers_seen(tmp_path)} if alive(pid)]
        if kills and living and generator.random() < 0.1:
            kills -= 1
            os.kill(generator.choice(living), signal.SIGKILL)

    pending = dict.fromkeys(range(20), 8)
    worker = Scorer(tmp_path, 8, pause=0.002)
    reports = list(local.run_chunks(worker, pending, TWO, progress, told.incidents.append, stall=60.0))
    assert kills == 0
    assert sorted(report.chunk for report in reports) == list(range(20))
    assert written(tmp_path) == dict.fromkeys(range(20), ["ok"] * 8)
    assert told.samples == 160
    assert told.kinds()["died"] == 8


def test_what_a_worker_raises_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left") as full:
        Told().run(Scorer(tmp_path, 4, traps=((1, 2, "full"),), pause=0.01), 50)
    assert full.value.hint == "Free space."
    with pytest.raises(CdcleanError, match=r"(?s)cpu:. failed at chunk 1:.*spring.*ZeroDivisionError: a bug") as bug:
        Told().run(Scorer(tmp_path, 4, traps=((1, 2, "bug"),)), 50)
    assert type(bug.value) is CdcleanError
    assert not any(alive(pid) for pid, _ in workers_seen(tmp_path))


def test_a_device_on_which_nothing_lives_is_used_no_more(tmp_path: Path) -> None:
    told = Told()
    told.run(Scorer(tmp_path, 4, on_device=("cpu:1", "kill"), pause=0.05), 6)
    assert written(tmp_path) == dict.fromkeys(range(6), ["ok"] * 4)
    assert told.kinds() == {"died": 3, "retired": 1}
    with pytest.raises(IncompleteError, match="died on each device before they were ready"):
        told.run(Scorer(tmp_path, 4, on_device=("cpu", "exit")), 6, ("cpu",))


def test_an_iterator_that_is_closed_leaves_no_process(tmp_path: Path) -> None:
    worker = Scorer(tmp_path, 100, pause=0.005)
    told = Told()
    chunks = local.run_chunks(worker, {0: 100, 1: 1}, TWO, told.progress, told.incidents.append, stall=60.0)
    with closing(chunks):
        wait_for(lambda: next(chunks))
    assert not any(alive(pid) for pid, _ in workers_seen(tmp_path))
    assert not list(tmp_path.glob("*.tmp"))


# --- The parent is stopped, or killed ---

STOPPABLE = """
import signal, sys
from pathlib import Path
from cdclean.engines import local
from cdclean.errors import StoppedError
from tests.engine_workers import Scorer

def stop(number, frame):
    raise StoppedError(number)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    folder, what, stall = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    wait = what == "before"
    traps = ((0, 1, what),) if what and not wait else ()
    worker = Scorer(folder, 1000, traps=traps, pause=0.05)
    pending, devices = {0: 1000, 1: 1000}, ("cpu", "cpu")
    try:
        with local.started_ahead(1, "tests.engine_workers") as spares:
            if wait:
                signal.pause()
            for _ in local.run_chunks(worker, pending, devices, id, print, stall=stall, spares=spares):
                pass
    except StoppedError as error:
        sys.exit(128 + error.signal_number)
"""


def start(folder: Path, what: str = "", stall: float = 60.0) -> subprocess.Popen[bytes]:
    """A scan in a process group of its own."""
    script = folder / "script.py"
    script.write_text(STOPPABLE)
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, script, folder, what, str(stall)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def working(folder: Path) -> bool:
    return (folder / "log").exists() and len(set(workers_seen(folder))) == 2


def wedged(folder: Path) -> bool:
    return (folder / "log").exists() and "wedged" in (folder / "log").read_text()


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(path.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["before", "early", "late"])
def test_a_signal_to_the_whole_group_stops_it_quietly(number: signal.Signals, when: str, tmp_path: Path) -> None:
    process = start(tmp_path, "before" if when == "before" else "")
    wait_for(lambda: working(tmp_path) if when == "late" else len(members(process.pid)) > 2)
    os.killpg(process.pid, number)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 128 + number
    wait_for(lambda: not members(process.pid))


def test_a_wedged_worker_does_not_outlive_the_parent_that_is_stopped(tmp_path: Path) -> None:
    process = start(tmp_path, "wedge")
    wait_for(lambda: wedged(tmp_path))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    wait_for(lambda: not members(process.pid))


@pytest.mark.parametrize("what", ["wedge", "before"])
def test_workers_go_when_the_parent_is_killed(what: str, tmp_path: Path) -> None:
    process = start(tmp_path, what)
    wait_for(lambda: wedged(tmp_path) if what == "wedge" else len(members(process.pid)) > 2)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not members(process.pid))


def test_a_pause_of_everybody_is_not_silence(tmp_path: Path) -> None:
    process = start(tmp_path, stall=4.0)
    wait_for(lambda: working(tmp_path))
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(5)
    os.killpg(process.pid, signal.SIGCONT)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == (b"", b"")
