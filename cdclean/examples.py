"""What a network is trained on: the labelled samples of a dataset, decoded on threads and kept while there is room."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cdclean import datasets, images, storage
from cdclean.config import Geometry
from cdclean.console import Console
from cdclean.datasets import Sample
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
    classes = datasets.classes(dataset)
    index = {name: label for label, name in enumerate(classes)}
    digest = hashlib.sha256()
    samples: list[Sample] = []
    labels = []
    loose = barred = 0
    for sample in datasets.samples(dataset):
        if sample.problem is not None:
            barred += 1
        elif sample.class_name is None:
            loose += 1
        else:
            digest.update(f"{sample.key}\0{sample.size}\0".encode())
            samples.append(sample)
            labels.append(index[sample.class_name])
    if loose:
        console.warn(f"{loose} images lie in no class folder and are not trained on")
    if barred:
        console.warn(f"{barred} links, folders or files cannot be opened and are not trained on")
    if len(set(labels)) < 2:
        found = f"has images of one class only, {samples[0].class_name!r}" if samples else "has no image in a class"
        raise DatasetError(
            f"{dataset.location} {found}; a network learns to tell at least two apart",
            hint="Give the folder whose subfolders are the classes.",
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

    def _read(self, index: int) -> Tensor | None:
        sample = self.examples.samples[index]
        try:
            if sample.size > images.MAX_BYTES:
                raise SampleError(Status.TOO_LARGE, f"{sample.size} bytes; the limit is {images.MAX_BYTES}")
            try:
                data = storage.read_range(sample.url, sample.offset, sample.size)
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
