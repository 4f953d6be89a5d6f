"""The simplest engine: one chunk after the other, in this process, on one device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable

from cdclean.engines.tasks import Report, Task, Worker


def run_chunks(
    worker: Worker[Report], pending: Iterable[int], progress: Callable[[int], object]
) -> Generator[Report, None, None]:
    """Yield the report of every chunk as soon as its part is on disk; `progress(samples)` is called in between."""
    for chunk in pending:
        yield worker(Task(chunk), progress)
