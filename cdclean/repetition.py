"""What only a GPU needs: the same numbers every time, and a step that is recorded once and then repeated.

A step is some hundred small kernels, and a fast GPU works them off sooner than Python can launch them. A CUDA graph
holds them all and is launched at once; the kernels are the same, and so are the numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import deterministic


class Repeatable(Protocol):
    """A step that reads and writes the same memory every time; see distillation.Step."""

    colour: Tensor
    w: Tensor  # what it changes
    repeat: Callable[[], None] | None  # what to call instead of `descend`

    def descend(self) -> None: ...

    def restart(self, other: Self) -> None: ...


StepT = TypeVar("StepT", bound=Repeatable)


class Repetition:
    """Keeps the step of one model from one micro-batch to the next. Does nothing but on CUDA."""

    def __init__(self) -> None:
        self.like: Hashable = None  # what the step is made for: shape, dtype, settings
        self.step: object = None
        self.recorded = False
        self.refused = False  # this model cannot be recorded

    def of(self, step: StepT, like: Hashable) -> StepT:
        """`step`, which is new, or the one that is kept for the same `like`, recorded and with the images of `step`.

        The first one for a `like` is made as it comes: whatever CUDA's libraries do once, they do in it.
        """
        if self.refused or not step.colour.is_cuda:
            return step
        if self.like != like:
            self.step = None  # let go of its memory first
            self.like, self.step, self.recorded = like, step, False
            return step
        kept = cast(StepT, self.step)
        if not self.recorded:
            try:
                kept.repeat = _record(kept)
            except RuntimeError as error:
                self.forget()
                if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error) or "ALLOC_FAILED" in str(error):
                    raise
                self.refused = True
                reason = str(error).partition("\n")[0]
                warnings.warn(f"the model's steps cannot be recorded, and take longer: {reason}", stacklevel=2)
                return step
            self.recorded = True
        kept.restart(step)
        return kept

    def forget(self) -> None:
        """Let go of the step and its memory, which nothing else can take."""
        self.like = self.step = None
        self.recorded = False


def _record(step: Repeatable) -> Callable[[], None]:
    """What the step launches, as one launch, on the current device.

    Raises RuntimeError where it waits for the device on its way.
    """
    mode = torch.cuda.get_sync_debug_mode()
    warnings.filterwarnings("ignore", message="Synchronization debug mode")  # that it is a prototype
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.descend()  # a rehearsal: a recording that fails leaves torch's memory in disorder
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # A stream of this device: torch's own is of the device that recorded first. Another thread may be at work on
        # another GPU: it must not break this recording, nor be broken by it.
        own = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
            step.descend()
    finally:
        torch.cuda.set_stream(stream)  # torch 2.11 does not, where a recording fails
    before = step.w.detach().clone()
    graph.replay()
    if torch.equal(before, step.w.detach()):
        raise RuntimeError("the recording is empty")
    return graph.replay


def is_not_reproducible(error: RuntimeError) -> bool:
    """Whether this is CUDA's word that an operation has no kernel that repeats itself."""
    return "deterministic" in str(error)


@contextmanager
def reproducible(device: torch.device, strict: bool = True) -> Iterator[None]:
    """On CUDA, kernels whose sums do not depend on chance, and fp32 that is fp32; then everything as it was.

    `strict`: an operation without such a kernel raises RuntimeError, else it warns, and attention may use others too.
    `device` is the current one inside. These are settings of the process: one thread at a time.
    """
    if device.type != "cuda":
        yield
        return
    chosen = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    wanted = _settings()
    before = [(where, name, getattr(where, name)) for where, name, _ in wanted]
    try:
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        torch.backends.cuda.enable_cudnn_sdp(False)  # the others repeat themselves when they are told to
        for where, name, value in wanted:
            setattr(where, name, value)
        with torch.cuda.device(device):
            yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
        torch.use_deterministic_algorithms(chosen, warn_only=warn_only)


def _settings() -> list[tuple[Any, str, Any]]:
    """Where what is set to what, beside the switch for all algorithms; in this order, also on the way back.

    Precision is asked for in torch's two ways: where one alone is, torch 2.9 and newer raise when they are read.
    """
    backends: Any = torch.backends
    found: list[tuple[Any, str, Any]] = [(backends.cudnn, "benchmark", False), (backends.cudnn, "deterministic", True)]
    found.append((deterministic, "fill_uninitialized_memory", False))  # takes time, and is for finding bugs
    for where in (backends.cudnn, backends.cuda.matmul):
        with suppress(RuntimeError):  # the process has asked in the other way already
            _ = where.allow_tf32
            found.append((where, "allow_tf32", False))
    if hasattr(backends, "fp32_precision"):
        places = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
        found += [(where, "fp32_precision", "ieee") for where in places]
    return found
