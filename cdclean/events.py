"""events.jsonl: what happened to a run, one JSON object a line; and what that says to somebody at another terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cdclean import records, storage


def append(run: Path, event: str, **details: Any) -> None:
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": now(), "event": event, **details}) + "\n")


def read(run: Path) -> Iterator[dict[str, Any]]:
    """All events so far; the last line of a killed run may be cut, and is then no event."""
    try:
        with (run / "events.jsonl").open() as file:
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


def status(run: Path) -> RunStatus:
    """How far the scan in `run` is, from its files alone; a scan that is running is not disturbed."""
    content = records.load_run(run, complete=False)
    chunks: dict[int, dict[str, Any]] = {}
    seconds, fresh = 0.0, 0
    for event in read(run):
        if event["event"] == "start":
            seconds, fresh = 0.0, 0  # the rate is that of the present sitting
        elif event["event"] == "chunk":
            chunks[event["chunk"]] = event
            seconds, fresh = seconds + event["seconds"], fresh + event["samples"]
    done = sum(event["samples"] for event in chunks.values())
    rate = fresh / seconds if seconds else None
    complete = (run / "_SUCCESS").exists()
    left = None if complete or not rate else (content["dataset"]["samples"] - done) / rate
    errors = [event["last_error"] for event in chunks.values() if event["last_error"]]
    return RunStatus(
        run=storage.to_text(run),
        state="complete" if complete else "running" if storage.is_locked(run) else "stopped",
        done=done,
        samples=content["dataset"]["samples"],
        failed=sum(count for event in chunks.values() for name, count in event["status"].items() if name != "ok"),
        images_per_second=rate,
        seconds_left=left,
        last_error=errors[-1] if errors else None,
    )
