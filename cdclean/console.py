"""The only place that prints. Results go to stdout, everything else to stderr.

With `json` the result is one JSON object; with `quiet` nothing is said but what goes wrong.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import dumps
from typing import Any

from cdclean.errors import CdcleanError

LOG_EVERY = 30.0  # seconds between progress lines where there is no terminal


@dataclass(frozen=True)
class Console:
    json: bool = False
    quiet: bool = False

    def result(self, text: str, data: dict[str, Any]) -> None:
        """The answer to the command: `data` as JSON with `json`, `text` otherwise."""
        print(dumps(data, indent=2) if self.json else text, flush=True)

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def error(self, error: CdcleanError) -> None:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  -> {error.hint}", file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0, unit: str = "images") -> Iterator[Callable[[int], object]]:
        """Gives `advance(n)`. A bar with rate and ETA on a terminal; elsewhere a line every 30 seconds."""
        if self.quiet:
            yield lambda _: None
        elif sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(desc=what, total=total, initial=done, unit=f" {unit}", file=sys.stderr, smoothing=0.1) as bar:
                yield bar.update
        else:
            yield self._log_lines(what, total, done, unit)

    def _log_lines(self, what: str, total: int, done: int, unit: str) -> Callable[[int], None]:
        started = last = time.monotonic()
        count = 0

        def advance(n: int) -> None:
            nonlocal count, last
            count += n
            now = time.monotonic()
            if now - last >= LOG_EVERY:
                last = now
                rate = count / (now - started)
                left = (total - done - count) / rate if rate else float("inf")
                self.say(f"{what}: {done + count}/{total} {unit}, {rate:.1f}/s, {duration(left)} left")

        return advance


def duration(seconds: float) -> str:
    """`95` -> `1m35s`."""
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
