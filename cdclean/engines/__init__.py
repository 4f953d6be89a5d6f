"""Who maps chunks onto devices, and lives through their deaths.

An engine knows nothing of images: it hands tasks to copies of a worker, and yields what they report.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from cdclean.config import ScanConfig
from cdclean.engines.tasks import Incident, Report, Task, Worker

if TYPE_CHECKING:
    from cdclean.engines.local import Spare

__all__ = ["Incident", "Task", "Worker", "run_chunks", "started_ahead"]


def started_ahead(count: int, module: str) -> AbstractContextManager[list[Spare]]:
    """So many processes for `run_chunks` of the local engine, which import `module` until they are needed."""
    from cdclean.engines import local

    return local.started_ahead(count, module)


def run_chunks(
    worker: Worker[Report],
    pending: Mapping[int, int],
    devices: Sequence[str],
    settings: ScanConfig,
    progress: Callable[[int], object],
    report: Callable[[Incident], object],
    spares: list[Spare] | None = None,
) -> Generator[Report, None, None]:
    """Yield the report of every chunk of `pending` (chunk -> samples), from the engine that the settings ask for.

    `devices` has an entry for every process; on a cluster it says of what kind they are. `progress(samples)` is called
    in between, and `report` with whatever goes wrong with a process. `spares` are processes that were started ahead;
    those that are not needed are ended. Close the iterator where it is not exhausted.
    """
    if settings.engine == "ray":
        from cdclean.engines import cluster

        address, actors = settings.ray_address, settings.workers
        return cluster.run_chunks(worker, pending, address, actors, progress, report, stall=settings.stall)
    if settings.engine == "local" or (settings.engine == "auto" and len(devices) > 1):
        from cdclean.engines import local

        return local.run_chunks(worker, pending, devices, progress, report, stall=settings.stall, spares=spares)
    from cdclean.engines import serial

    if spares:
        from cdclean.engines import local

        local.end(spares)
    return serial.run_chunks(worker, pending, progress)
