"""The only place that prints. Results go to stdout, everything else to stderr.

With `json` the result is one JSON object; with `quiet` nothing is said but what goes wrong. Names come from file
systems and archives that nobody vouches for: what would move a terminal's cursor, or turn its text round, is spelled
out.
"""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import dumps
from typing import Any

from cdclean.errors import CdcleanError, StoppedError

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control and formatting characters, lone surrogates, ends of lines
_SHOWN = "\n\t\u200c\u200d"  # of these, what lines and tables are made of, and what some words are joined with
LOG_EVERY = 30.0  # seconds between progress lines where there is no terminal


@dataclass(frozen=True)
class Console:
    json: bool = False
    quiet: bool = False

    def result(self, text: str, data: dict[str, Any]) -> None:
        """The answer to the command: `data` as JSON with `json`, `text` otherwise."""
        print(dumps(data, indent=2) if self.json else visible(text), flush=True)

    def say(self, text: str) -> None:
        if not self.quiet:
            _to_stderr(text)

    def warn(self, text: str) -> None:
        _to_stderr(f"warning: {text}")

    def error(self, error: CdcleanError | StoppedError) -> None:
        _to_stderr(f"error: {error.message}")
        if error.hint:
            _to_stderr(f"  -> {error.hint}")

    @contextmanager
    def progress(
        self, what: str, total: int | None, done: int = 0, unit: str = "images"
    ) -> Iterator[Callable[[int], object]]:
        """Gives `advance(n)`. A bar with rate and ETA on a terminal; elsewhere a line every 30 seconds."""
        if self.quiet:
            yield lambda _: None
        elif sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(desc=what, total=total, initial=done, unit=f" {unit}", file=sys.stderr, smoothing=0.1) as bar:
                yield bar.update
        else:
            yield self._log_lines(what, total, done, unit)

    def _log_lines(self, what: str, total: int | None, done: int, unit: str) -> Callable[[int], None]:
        started = last = time.monotonic()
        count = 0

        def advance(n: int) -> None:
            nonlocal count, last
            count += n
            now = time.monotonic()
            if now - last >= LOG_EVERY:
                last = now
                rate = count / (now - started)
                of, left = "", ""
                if total is not None:
                    of, left = f"/{total}", f", {duration((total - done - count) / rate) if rate else '?'} left"
                self.say(f"{what}: {done + count}{of} {unit}, {rate:.1f}/s{left}")

        return advance


def visible(text: str) -> str:
    """`text` with the characters spelled out that a terminal would obey or not show."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if letter not in _SHOWN and unicodedata.category(letter) in _HIDDEN
        else letter
        for letter in text
    )


def _to_stderr(text: str) -> None:
    """A line of talk; on a terminal it goes above the progress bar, if there is one."""
    text = visible(text)
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """`text` on one line and without what moves a terminal's cursor: names come from files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: float) -> str:
    """`95` -> `1m35s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
