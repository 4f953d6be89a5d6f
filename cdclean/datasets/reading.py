"""The bytes of samples, wherever and however they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

from cdclean.datasets.sample import Access
from cdclean.storage import read_range


class Stored(Protocol):
    """What reading needs to know of a sample."""

    @property
    def url(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def access(self) -> Access: ...


def contents(samples: Iterable[Stored]) -> Iterator[Callable[[], bytes]]:
    """For each of `samples`, in order, a function that gives its bytes once, or raises OSError.

    The functions may be called on any thread. Ranges are read there, many at a time; what has to be read in order
    (compressed archives, tables) is read here, as the iterator advances.
    """
    for sample in samples:
        if sample.access == "range":
            yield partial(read_range, sample.url, sample.offset, sample.size)
        else:
            raise NotImplementedError(sample.access)
