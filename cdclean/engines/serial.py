"""The simplest engine: one chunk after the other, in this process, on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from cdclean.chunk import ChunkReport, ChunkWorker


def run_chunks(worker: ChunkWorker, chunks: Iterable[int], progress: Callable[[int], object]) -> Iterator[ChunkReport]:
    """Yield the report of every chunk as soon as its part is on disk; `progress(samples)` is called in between."""
    for chunk in chunks:
        yield worker(chunk, progress)
