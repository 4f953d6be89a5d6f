"""events.jsonl: what happened to a run, one JSON object a line; and what that says to somebody at another terminal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cdclean import locks, manifest, records, storage
from cdclean.errors import OutputError
from cdclean.storage import Location

_UPLOAD_EVERY = 10.0  # seconds; storage without appending gets the whole file again


@dataclass
class Log:
    """Where one process writes what happens; several that score shards of a run have a file each."""

    run: Location
    name: str = "events.jsonl"
    _lines: list[str] | None = None  # on remote storage: the whole file
    _uploaded: float = field(default_factory=time.monotonic)

    def append(self, event: str, **details: Any) -> None:
        """Raises OutputError where the disk is full or the folder cannot be written to."""
        line = json.dumps({"time": now(), "event": event, **details}) + "\n"
        path = self.run / self.name
        try:
            with storage.answering():
                self._write(path, event, line)
        except OSError as error:
            raise OutputError(
                f"cannot write {storage.to_text(path)}: {error.strerror or error}",
                hint="Free space, then run the same command again: finished work is kept.",
            ) from error

    def _write(self, path: Location, event: str, line: str) -> None:
        if isinstance(path, Path):
            with path.open("ab+") as file:
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    line = f"\n{line}"  # the disk was full, or the process was killed, in the middle of the last one
                file.write(line.encode())
            return
        if self._lines is None:
            self._lines = [json.dumps(old) + "\n" for old in _read(path)]
        self._lines.append(line)
        if event != "chunk" or time.monotonic() - self._uploaded > _UPLOAD_EVERY:
            path.write_text("".join(self._lines))
            self._uploaded = time.monotonic()


def read(run: Location) -> Iterator[dict[str, Any]]:
    """All events so far, process after process."""
    for path in _files(run):
        yield from _read(path)


def _files(run: Location) -> list[Location]:
    return sorted(run.glob("events*.jsonl"), key=lambda path: str(path))


def _read(path: Location) -> Iterator[dict[str, Any]]:
    """The events in one file; the last line of a killed run may be cut, and is then no event."""
    try:
        with path.open() as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue
    except FileNotFoundError:
        return


def now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class RunStatus:
    """How far a run is; `state` is complete, running or stopped."""

    run: str
    state: str
    done: int
    samples: int
    failed: int  # samples without a score so far
    images_per_second: float | None
    seconds_left: float | None
    last_error: str | None


def status(run: Location) -> RunStatus:
    """How far the scan in `run` is, from its files alone; a scan that is running is not disturbed."""
    content = records.load_run(run, complete=False)
    chunks: dict[int, dict[str, Any]] = {}
    for event in read(run):
        if event["event"] == "chunk":
            chunks[event["chunk"]] = event
    latest = [sittings[-1] for sittings in map(_sittings, _files(run)) if sittings]
    sizes = manifest.chunk_sizes(run / "manifest.parquet")
    parts = {path.name for path in records.parts(run)}
    scored = {chunk for chunk in sizes if records.part_path(run, chunk).name in parts}
    done = sum(sizes[chunk] for chunk in scored)
    last = [chunks[chunk] for chunk in scored & chunks.keys()]
    # The rate is that of the present sitting; shards of a run add up.
    rate = sum(fresh / seconds for seconds, fresh in latest if seconds) or None
    complete = (run / "_SUCCESS").exists()
    left = None if complete or not rate else (content["dataset"]["samples"] - done) / rate
    errors = [event["last_error"] for event in last if event["last_error"]]
    return RunStatus(
        run=storage.to_text(run),
        state="complete" if complete else "running" if is_running(run) else "stopped",
        done=done,
        samples=content["dataset"]["samples"],
        failed=sum(count for event in last for name, count in event["status"].items() if name != "ok"),
        images_per_second=rate,
        seconds_left=left,
        last_error=errors[-1] if errors else None,
    )


def scoring_seconds(run: Location) -> float:
    """How long it took to score a run, its pauses aside: of several shards, the one that took longest."""
    return max((sum(seconds for seconds, _ in _sittings(path)) for path in _files(run)), default=0.0)


def _sittings(path: Location) -> list[tuple[float, int]]:
    """Seconds from the start to the last chunk, and samples, of every time that a process scored."""
    found: list[tuple[float, int]] = []
    begun = None
    for event in _read(path):
        if event["event"] == "start":
            begun = datetime.fromisoformat(event["time"])
            found.append((0.0, 0))
        elif event["event"] == "chunk" and begun is not None:
            seconds = (datetime.fromisoformat(event["time"]) - begun).total_seconds()
            found[-1] = (seconds, found[-1][1] + event["samples"])
    return found


def is_running(run: Location) -> bool:
    """Whether a process scores into `run`, all of it or a shard."""
    return locks.is_locked(run) or any(locks.is_locked(run, path.name) for path in run.glob(".lock-*"))
