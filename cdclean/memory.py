"""How many images fit into memory at once: halving after a failure, growing again, finding a good size first."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cdclean.config import DistillConfig
from cdclean.distillation import distill

_CALM = 16  # micro-batches that must succeed before a larger one is tried again
_WORTHWHILE = 1.05  # a larger micro-batch must give so many times the images a second
_TRIAL_STEPS = 2
_LARGEST = 1024
# The CPU's allocator and some libraries raise a plain RuntimeError; the last is what oneDNN says of its own code.
_WORDS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "could not create a primitive")


@dataclass
class Room:
    """The micro-batch that fits at present on one device, at most `limit` images."""

    limit: int
    size: int
    calm: int = 0  # micro-batches since the last change

    def shrink(self) -> None:
        """After a failure: half of it."""
        self.size, self.calm = max(1, self.size // 2), 0

    def succeed(self) -> None:
        """After a success: twice as many once `_CALM` have succeeded, for whoever took the memory may be gone."""
        self.calm += 1
        if self.calm >= _CALM and self.size < self.limit:
            self.size, self.calm = min(self.limit, 2 * self.size), 0


_rooms: dict[tuple[str, int], Room] = {}


def room_on(device: str, limit: int) -> Room:
    """What this process has learned about a device; one for every micro-batch size that was asked for."""
    return _rooms.setdefault((device, limit), Room(limit, limit))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed for want of memory, on an accelerator or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def release() -> None:
    """Give back what nothing holds any more, before a smaller try."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def find_batch_size(model: nn.Module, like: Tensor, config: DistillConfig) -> int:
    """The micro-batch after which doubling gains less than 5 % images a second, or does not fit.

    `like` [1, C, H, W] is an image on the model's device. A few seconds on a CPU, where it also depends on what else
    the machine is doing.
    """
    best, rate, size = 1, 0.0, 1
    while size <= _LARGEST:
        images = like.expand(size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        trial = replace(config, steps=_TRIAL_STEPS, batch_size=size)
        try:
            if size == 1:
                distill(model, images, trial)  # whatever is done once, is done now
            started = time.perf_counter()
            distill(model, images, trial).mask_norm.tolist()
            now = size / (time.perf_counter() - started)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            release()
            break
        if now < _WORTHWHILE * rate:
            break
        best, rate, size = size, now, 2 * size
    return best
