"""Workers for the tests of the engines: they write a file a chunk, and some of them die. They need no torch."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cdclean.engines.tasks import Task
from cdclean.errors import OutputError


@dataclass(frozen=True)
class Done:
    chunk: int
    samples: int


@dataclass(frozen=True)
class Scorer:
    """Writes the row numbers and statuses of a chunk into a file; before that, does to itself what `traps` says."""

    folder: Path
    size: int  # samples a chunk
    device: str = "cpu"
    traps: tuple[tuple[int, int, str], ...] = ()  # chunk, row, what: a method below; "first-" in front: once
    on_device: tuple[str, str] | None = None  # device, what: before anything else
    pause: float = 0.0  # seconds a row

    def __call__(self, task: Task, progress: Callable[[int], object]) -> Done:
        self.note(f"{task.chunk} {task.rows} {task.crashed}".encode())
        if self.on_device and self.on_device[0] == self.device:
            self.spring(self.on_device[1])
        traps = {(chunk, row): what for chunk, row, what in self.traps}
        first, last = task.rows or (0, self.size)
        mine = self.folder / f"{task.chunk}.held"
        if task.rows is None:
            self.hold(mine)
        progress(0)
        for row in range(first, last):
            if row not in task.crashed and (what := traps.get((task.chunk, row))):
                self.spring(what, self.folder / f"{task.chunk}-{row}.sprung")
            time.sleep(self.pause)
            progress(1)
        if task.rows is None:
            statuses = ["crashed" if row in task.crashed else "ok" for row in range(self.size)]
            (self.folder / f"{task.chunk}.tmp").write_text(json.dumps(statuses))
            (self.folder / f"{task.chunk}.tmp").rename(self.folder / f"{task.chunk}.json")
            mine.unlink()
        return Done(task.chunk, last - first)

    def note(self, line: bytes) -> None:
        """A line into the log of all workers."""
        with (self.folder / "log").open("ab", buffering=0) as log:
            log.write(f"{os.getpid()} {self.device} ".encode() + line + b"\n")

    def hold(self, path: Path) -> None:
        """Complain where another living process is at the same chunk."""
        if path.exists() and alive(int(path.read_text())):
            (self.folder / "collision").write_text(path.name)
        path.write_text(str(os.getpid()))

    def spring(self, what: str, sprung: Path | None = None) -> None:
        if what.startswith("first-") and sprung is not None:
            if sprung.exists():
                return
            sprung.write_text("")
        match what.removeprefix("first-"):
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                signal.signal(signal.SIGSEGV, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(7)
            case "wedge":
                self.note(b"wedged")
                time.sleep(1000)
            case "full":
                raise OutputError("cannot write part 3: No space left on device", hint="Free space.")
            case "bug":
                raise ZeroDivisionError("a bug")


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def written(folder: Path) -> dict[int, list[str]]:
    """The statuses of every chunk that is there; no two workers were at one chunk at the same time."""
    assert not (folder / "collision").exists()
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}


def workers_seen(folder: Path) -> Iterator[tuple[int, str]]:
    """Process and device of every task that was begun."""
    for line in (folder / "log").read_text().splitlines():
        pid, device, *_ = line.split()
        yield int(pid), device
