"""Devices: which there are, what they can do, and how many processes score on them.

Nothing here loads more than torch: who asks may start those processes before the model is there.
"""

from __future__ import annotations

import os

import torch

from cdclean.config import ScanConfig
from cdclean.errors import UsageError

_PROCESS = 2 << 30  # bytes: what a process on a CPU may need, with torch, a model and its micro-batch
_GPU_SHARE = 16 * 10**9  # bytes of a GPU's memory, for each process on it
_SHARERS = 4  # processes on one GPU, at most


def resolve_device(name: str) -> str:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises UsageError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda:0"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"device {name!r} cannot be used: {reason}", hint="--device takes auto, cpu, cuda, cuda:1, mps."
        ) from error
    if name.startswith("cpu"):  # there is but one, whatever its number
        return "cpu"
    return "cuda:0" if name == "cuda" else name


def computes_in_bf16(kind: str) -> bool:
    """Whether devices of that kind here ("cuda", "cpu", "mps") have bf16 in hardware, where it takes half the time."""
    if kind == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_devices(settings: ScanConfig) -> list[str]:
    """The device of every process that scores: `workers` of them, or as many as are of use, on the devices in turn."""
    first, _, more = settings.device.partition(",")
    device = resolve_device(first)
    kind = device.split(":")[0]
    devices = [device, *(resolve_device(f"{kind}:{number}") for number in more.split(",") if number)]
    if settings.engine == "serial":
        return devices[:1]
    if settings.device in ("auto", "cuda") and kind == "cuda":
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    count = settings.workers or (cores() if kind == "cpu" else _sharers(devices) if kind == "cuda" else len(devices))
    return [devices[number % len(devices)] for number in range(count)]


def _sharers(devices: list[str]) -> int:
    """Processes on these GPUs together. One alone cannot decode and draw small images as fast as a large GPU scores."""
    smallest = min(torch.cuda.get_device_properties(device).total_memory for device in devices)
    each = min(_SHARERS, cores() // len(devices), smallest // _GPU_SHARE)
    return max(1, each) * len(devices)


def cores() -> int:
    """Cores that this process may use, as far as there is memory for a process on each."""
    try:
        cores = len(os.sched_getaffinity(0))
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not Linux
        return os.cpu_count() or 1
    return max(1, min(cores, free // _PROCESS))
