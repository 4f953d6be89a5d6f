"""What a network is trained on: the labelled samples of a dataset, decoded on threads and kept while there is room."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cdclean import datasets, images, storage
from cdclean.config import Geometry
from cdclean.console import Console
from cdclean.datasets import Sample
from cdclean.datasets.reading import contents
from cdclean.errors import DatasetError, SampleError, Status

CACHE_BYTES = 4 * 1024**3  # of decoded images that stay in memory; the others are decoded anew every epoch
_AHEAD = 2  # batches being decoded while one is trained on

_Answer: TypeAlias = Tensor | Future[Tensor | None] | None  # pixels, pixels to come, or an image that cannot be read


@dataclass(frozen=True)
class Examples:
    """The samples of a dataset that have a class and may be opened, in its order."""

    samples: list[Sample]
    labels: Tensor  # int64 [samples]
    classes: list[str]
    digest: str  # SHA-256 over key and size of every sample


def list_examples(dataset: datasets.Dataset, console: Console) -> Examples:
    """What `dataset` has to train on. Raises DatasetError unless that is of two classes or more."""
    digest = hashlib.sha256()
    samples: list[Sample] = []
    names: list[str] = []
    loose = barred = 0
    for sample in datasets.samples(dataset):
        if sample.problem is not None:
            barred += 1
        elif sample.class_name is None:
            loose += 1
        else:
            digest.update(f"{sample.key}\0{sample.size}\0".encode())
            samples.append(sample)
            names.append(sample.class_name)
    classes = datasets.classes(dataset)
    if classes is None:
        classes = datasets.class_names(set(names))
    index = {name: label for label, name in enumerate(classes)}
    labels = [index[name] for name in names]
    if loose:
        console.warn(f"{loose} images have no label and are not trained on")
    if barred:
        console.warn(f"{barred} links, folders or files cannot be opened and are not trained on")
    if len(set(labels)) < 2:
        found = f"has images of one class only, {samples[0].class_name!r}" if samples else "has no image in a class"
        raise DatasetError(
            f"{dataset.location} {found}; a network learns to tell at least two apart",
            hint="Give a dataset with labels; in a folder of images the subfolders are the classes.",
        )
    return Examples(samples, torch.tensor(labels), classes, digest.hexdigest())


class Loader:
    """Decodes on the threads of `pool`, a few batches ahead; what fits into CACHE_BYTES is decoded once."""

    def __init__(
        self, examples: Examples, geometry: Geometry, mean: tuple[float, ...], pool: ThreadPoolExecutor, room: int
    ) -> None:
        self.examples, self.pool, self.room = examples, pool, room
        self.transform = images.make_transform(geometry, mean)
        self.channels = geometry.channels
        self.unreadable: dict[int, str] = {}  # index of the sample -> key and reason; complete after one epoch
        self._cache: dict[int, Tensor] = {}
        if any(sample.access != "range" for sample in examples.samples):
            self._read_in_order()

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each tensor of indices: pixels uint8 [b, C, H, W] and labels int64 [b] of those that can be read."""
        ahead: deque[list[tuple[int, _Answer]]] = deque()
        for indices in order:
            ahead.append([(index, self._ask(index)) for index in indices.tolist()])
            if len(ahead) > _AHEAD:
                yield self._gather(ahead.popleft())
        while ahead:
            yield self._gather(ahead.popleft())

    def _ask(self, index: int) -> _Answer:
        if index in self.unreadable:
            return None
        kept = self._cache.get(index)
        return self.pool.submit(self._read, index) if kept is None else kept

    def _read_in_order(self) -> None:
        """Decode everything now: tables and compressed shards can be read quickly in their own order only."""
        samples = self.examples.samples
        for index, image in enumerate(self.pool.map(self._decode, range(len(samples)), contents(samples))):
            if image is None:
                continue
            self.room -= image.nbytes
            if self.room < 0:
                raise DatasetError(
                    f"{len(samples)} decoded images do not fit into memory, and {samples[index].url} cannot be read "
                    "in another order than its own",
                    hint="Train on a part of it, or unpack it: tar shards that are not compressed can be read anyhow.",
                )
            self._cache[index] = image

    def _read(self, index: int) -> Tensor | None:
        sample = self.examples.samples[index]
        return self._decode(index, partial(storage.read_range, sample.url, sample.offset, sample.size))

    def _decode(self, index: int, content: Callable[[], bytes]) -> Tensor | None:
        sample = self.examples.samples[index]
        try:
            if sample.size > images.MAX_BYTES:
                raise SampleError(Status.TOO_LARGE, f"{sample.size} bytes; the limit is {images.MAX_BYTES}")
            try:
                data = content()
            except OSError as error:
                raise SampleError(Status.UNREADABLE, f"cannot be read: {error.strerror or error}") from error
            return images.decode(data, self.transform, self.channels).pixels
        except SampleError as error:
            self.unreadable[index] = f"{sample.key}: {error.reason}"
            return None

    def _gather(self, asked: list[tuple[int, _Answer]]) -> tuple[Tensor, Tensor]:
        pixels, indices = [], []
        for index, answer in asked:
            image = answer.result() if isinstance(answer, Future) else answer
            if image is None:
                continue
            if isinstance(answer, Future) and image.nbytes <= self.room:
                self._cache[index] = image
                self.room -= image.nbytes
            pixels.append(image)
            indices.append(index)
        return torch.stack(pixels) if pixels else torch.empty(0), self.examples.labels[indices]


def flip_crop(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mirror every image of `pixels` [B, C, H, W] or not, and shift it by up to an eighth of its sides, at random.

    What moves in is black (0). `generator` (on the CPU) makes the draw repeatable; None: torch's own.
    """
    count, _, height, width = pixels.shape
    down, right = height // 8, width // 8
    top = torch.randint(2 * down + 1, (count, 1), generator=generator)
    left = torch.randint(2 * right + 1, (count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = left + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)[:, None, :].to(pixels.device)
    rows = (top + torch.arange(height))[:, :, None].to(pixels.device)
    each = torch.arange(count, device=pixels.device)[:, None, None]
    # Advanced indices around a slice put their own dimensions first: [B, H, W, C].
    return F.pad(pixels, (right, right, down, down))[each, :, rows, columns].permute(0, 3, 1, 2)
