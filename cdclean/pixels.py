"""Pixels: samples -> what the model sees of them, and that -> thumbnails; on threads, while the device works."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from cdclean.config import Geometry
from cdclean.datasets.reading import contents
from cdclean.errors import SampleError, Status
from cdclean.images import MAX_BYTES, Decoded, decode, make_transform, thumbnail
from cdclean.manifest import Job

_THREADS = min(8, os.cpu_count() or 1)
_AT_A_TIME = 8  # images that a thread is given: small ones one by one would cost more to hand over than to decode
T = TypeVar("T")


def decoders() -> ThreadPoolExecutor:
    """Threads for `micro_batches`, which read and decode."""
    return ThreadPoolExecutor(_THREADS)


def draughtsmen(geometry: Geometry) -> ThreadPoolExecutor:
    """Threads for `pictures`. One for small ones: to encode them is mostly Python, which threads wait for in turn."""
    return ThreadPoolExecutor(1 if geometry.height * geometry.width <= 64 * 64 else _THREADS)


def micro_batches(
    samples: list[Job],
    rows: list[dict[str, Any]],
    wanted: list[int],
    geometry: Geometry,
    mean: tuple[float, ...],
    size: int,
    pool: ThreadPoolExecutor,
    progress: Callable[[int], object],
) -> Iterator[list[tuple[int, Tensor]]]:
    """Readable samples as (index, uint8 pixels), `size` at a time; what can be said of each goes into its row.

    All of the chunk is decoded ahead on threads, while the device works: a chunk fits into memory by its size.
    """
    transform = make_transform(geometry, mean)

    def read(some: Sequence[tuple[Job, Callable[[], bytes]]]) -> list[tuple[Decoded | SampleError, dict[str, Any]]]:
        return [_read(sample, content, transform, geometry.channels) for sample, content in some]

    batch: list[tuple[int, Tensor]] = []
    chosen = [samples[index] for index in wanted]
    groups = _groups(list(zip(chosen, _contents(chosen), strict=True)))
    # Without a name of its own: where an error ends the loop, what the threads have not begun is dropped.
    for index, (outcome, known) in zip(wanted, chain.from_iterable(pool.map(read, groups)), strict=True):
        rows[index] |= known
        if isinstance(outcome, SampleError):
            rows[index] |= {"status": outcome.status, "error": outcome.reason}
            progress(1)
            continue
        rows[index] |= {"status": Status.OK, "error": None, "width": outcome.width, "height": outcome.height}
        batch.append((index, outcome.pixels))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _contents(samples: list[Job]) -> Iterator[Callable[[], bytes]]:
    """What gives each sample's bytes; those that must not be opened, or are too large to be, are passed over."""
    found = contents(sample for sample in samples if _refusal(sample) is None)
    for sample in samples:
        yield next(found) if _refusal(sample) is None else bytes


def _refusal(sample: Job) -> SampleError | None:
    """Why the sample is not even read."""
    if sample.problem is not None:
        return SampleError(Status.UNREADABLE, sample.problem)
    if sample.size > MAX_BYTES:
        return SampleError(Status.TOO_LARGE, f"{sample.size} bytes; the limit is {MAX_BYTES}")
    return None


def _read(
    sample: Job, content: Callable[[], bytes], transform: Any, channels: int
) -> tuple[Decoded | SampleError, dict[str, Any]]:
    """One sample's pixels, or why there are none; and its size and hash, where it could be read."""
    known: dict[str, Any] = {"bytes": sample.size}
    if refusal := _refusal(sample):
        return refusal, known
    try:
        try:
            data = content()
        except OSError as error:
            raise SampleError(Status.UNREADABLE, f"cannot be read: {error.strerror or error}") from error
        if len(data) != sample.size:
            raise SampleError(Status.UNREADABLE, f"{len(data)} bytes, but {sample.size} when it was indexed")
        known["content_hash"] = hashlib.sha256(data).hexdigest()
        return decode(data, transform, channels), known
    except SampleError as error:
        return error, known


def pictures(pixels: Sequence[Tensor], masks: Tensor, size: int, pool: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
    """Image, mask and pattern of every sample of a micro-batch as thumbnails, encoded on threads from now on.

    The threads get finished pictures: an operation of torch on them would take the cores from the model's.
    """
    masks = masks.cpu().nan_to_num()
    images = torch.stack(list(pixels))
    columns = {
        "thumbnail": images,
        "mask_thumbnail": (masks * 255).round().to(torch.uint8),
        "pattern_thumbnail": (images * masks).round().to(torch.uint8),
    }

    def draw(some: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {name: {"bytes": thumbnail(batch[i], size), "path": None} for name, batch in columns.items()} for i in some
        ]

    return chain.from_iterable(pool.map(draw, _groups(range(len(pixels)))))


def _groups(items: Sequence[T]) -> list[Sequence[T]]:
    """What a thread is given at a time: small images one by one would cost more to hand over than to decode."""
    return [items[start : start + _AT_A_TIME] for start in range(0, len(items), _AT_A_TIME)]
