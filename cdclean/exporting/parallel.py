"""Many files at once: waiting for a disk or a network is what takes the time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

_WORKERS = 8
_AHEAD = 8 * _WORKERS  # handed out and not finished: bounds the memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(place: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield what `place` gives for each item, as soon as it does; of the first that fails raise what it raises.

    Of the items a few dozen are taken ahead. Nothing is begun after a failure, and nothing goes on after the end.
    """
    pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="export")
    running: set[Future[Result]] = set()
    try:
        for item in items:
            if len(running) == _AHEAD:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            running.add(pool.submit(place, item))
        yield from (future.result() for future in running)
    finally:
        pool.shutdown(cancel_futures=True)
