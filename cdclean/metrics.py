"""How a scan goes as Prometheus text, for node exporter's textfile collector: so a cron job can be alerted on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from cdclean.errors import OutputError

_EVERY = 15.0  # seconds
_STATES = ["running", "complete", "stopped", "failed"]


@dataclass
class Metrics:
    """Counts of one scan; `write` puts them into the file, whole, at most every 15 seconds unless told to."""

    path: Path | None
    run: str
    samples: int = 0
    done: int = 0  # samples with a record
    failed: int = 0  # of those that were scored in this sitting: without a score
    state: str = "running"
    started: float = field(default_factory=time.time)
    _fresh: int = 0
    _written: float = 0.0

    def add(self, samples: int, failed: int) -> None:
        self.done += samples
        self.failed += failed
        self._fresh += samples
        self.write()

    def write(self, *, now: bool = False) -> None:
        """Raises OutputError where the file cannot be written."""
        if self.path is None or not (now or time.monotonic() - self._written > _EVERY):
            return
        from prometheus_client import CollectorRegistry, Enum, Gauge, write_to_textfile

        self._written = time.monotonic()
        registry = CollectorRegistry()
        for name, value, text in (
            ("samples", self.samples, "Samples in the manifest."),
            ("samples_done", self.done, "Samples with a record."),
            ("samples_failed", self.failed, "Samples of this sitting without a score."),
            ("images_per_second", self._fresh / max(time.time() - self.started, 1e-3), "Rate of this sitting."),
            ("start_time_seconds", self.started, "When this sitting began, since 1970."),
            ("last_update_time_seconds", time.time(), "When this file was written, since 1970."),
        ):
            Gauge(f"cdclean_scan_{name}", text, ["run"], registry=registry).labels(self.run).set(value)
        state = Enum("cdclean_scan_state", "What the scan does.", ["run"], states=_STATES, registry=registry)
        state.labels(self.run).state(self.state)
        try:
            write_to_textfile(str(self.path), registry)  # under another name, then renamed
        except OSError as error:
            missing = not self.path.parent.is_dir()
            raise OutputError(
                f"cannot write the metrics file {self.path}: {error.strerror}",
                hint=f"{'Create the folder' if missing else 'Name another'}, or leave out --metrics-file.",
            ) from error
