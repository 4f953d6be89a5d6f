"""Many devices of one machine: one spawned process each, which pulls a chunk whenever it is free.

A process that dies, or says nothing for too long, is replaced. Its chunk goes back to the schedule, which finds out
whether a sample is to blame. When the parent goes, the processes go.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from cdclean.engines.outcomes import DismissedError, Failure, attempt
from cdclean.engines.tasks import Incident, Report, Schedule, Task, Worker
from cdclean.errors import IncompleteError

_TICK = 1.0  # seconds of waiting after which the silent are counted
_GRACE = 3.0  # seconds that a process has to leave in when it is told to
_STILLBORN = 3  # processes in a row that die on a device before they are ready, until it is used no more
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_chunks(
    worker: Worker[Report],
    pending: Mapping[int, int],
    devices: Sequence[str],
    progress: Callable[[int], object],
    report: Callable[[Incident], object],
    *,
    stall: float,
    spares: list[Spare] | None = None,
) -> Generator[Report, None, None]:
    """Yield the report of every chunk of `pending` (chunk -> samples) as soon as its part is on disk.

    One process per entry of `devices`, and no more than there are chunks. Those in `spares` are taken first, and ended
    if they are too many. `progress(samples)` is called in between, once for every sample, and `report` with whatever
    goes wrong. A process that has a task and has sent no sign of life for `stall` seconds is killed.

    Raises what a worker raises: a CdcleanError as it is, anything else as a CdcleanError with the traceback.
    Raises IncompleteError where a chunk cannot be scored, or where no process stays alive. No process is left when
    this ends, however it ends; close the iterator where it is not exhausted.
    """
    schedule = Schedule(pending)
    seats = [_Seat(device) for device in devices]
    spares = [] if spares is None else spares
    needed = min(len(devices), len(pending))
    surplus, spares[needed:] = spares[needed:], []
    end(surplus)
    first = next(iter(pending), 0)
    heard = time.monotonic()
    try:
        while not schedule.done:
            if all(seat.retired for seat in seats):
                raise IncompleteError(
                    f"{_STILLBORN} workers in a row have died on each device before they were ready to score",
                    hint="They say why above.",
                )
            _fill(seats, worker, Task(first, rows=(0, 0)), schedule, spares)
            _wait(seats)
            now = time.monotonic()
            # A pause of this process itself is not the workers' silence: one turn counts as one tick at most.
            silence, heard = min(now - heard, _TICK), now
            for seat in seats:
                seat.quiet += silence
                dead = seat.process is not None and not seat.process.is_alive()
                for message in seat.messages():  # after that look at it: of a dead one, these are all
                    if isinstance(message, int):
                        seat.count += message
                        if seat.task and (new := schedule.count(seat.task, seat.count)):
                            progress(new)
                    elif isinstance(message, Failure):
                        raise message.error
                    else:
                        yield from _finished(seat, message, schedule, progress, report)
                if dead or (seat.busy and seat.quiet > stall):
                    _bury(seat, dead, schedule, report)
        schedule.judge()
    finally:
        _dismiss(seats)


@dataclass
class _Seat:
    """A place for one process on one device."""

    device: str
    process: SpawnProcess | None = None
    pipe: Connection | None = None
    ready: bool = False  # the process has finished a task: it can load the model
    busy: bool = False  # it has a task
    task: Task | None = None  # that belongs to the schedule
    count: int = 0  # samples of the task
    quiet: float = 0.0  # seconds
    stillborn: int = 0

    @property
    def retired(self) -> bool:
        return self.stillborn >= _STILLBORN

    def give(self, what: Worker[Any] | Task) -> None:
        """Send the process its worker, which is the first that it gets, or a task."""
        assert self.pipe is not None
        self.busy, self.count, self.quiet = True, 0, 0.0
        with suppress(OSError):  # dead already, which will be seen
            self.pipe.send(what)

    def messages(self) -> Iterator[Any]:
        """What has come from the process; all of it that will come, if it is dead."""
        try:
            while self.pipe is not None and self.pipe.poll():
                message = self.pipe.recv()
                self.quiet = 0.0
                yield message
        except (EOFError, OSError):
            return  # it ends with a half message if the process was killed while it was sending


def _fill(seats: list[_Seat], worker: Worker[Any], prepare: Task, schedule: Schedule, spares: list[Spare]) -> None:
    """Give a task to whoever is free; start as many processes as there are tasks left."""
    starting = 0
    for seat in seats:
        if seat.ready and not seat.busy and schedule.waiting:
            seat.task = schedule.next()
            seat.give(seat.task)
        starting += seat.process is not None and not seat.ready
    for seat in seats:
        if seat.process is None and not seat.retired and starting < schedule.waiting:
            starting += 1
            with _uninterrupted():
                seat.process, seat.pipe = spares.pop() if spares else _start()
            seat.give(replace(worker, device=seat.device))
            seat.give(prepare)


def _finished(
    seat: _Seat,
    outcome: Any,
    schedule: Schedule,
    progress: Callable[[int], object],
    report: Callable[[Incident], object],
) -> Iterator[Any]:
    """Take the task back from a process that has done it; yields the report if it was a whole chunk."""
    task, seat.task = seat.task, None
    seat.ready, seat.busy, seat.stillborn = True, False, 0
    if task is None:
        return  # it was made ready
    if new := schedule.count(task, schedule.sizes[task.chunk]):
        progress(new)
    for incident in schedule.finished(task):
        report(incident)
    if task.rows is None:
        yield outcome


def _bury(seat: _Seat, dead: bool, schedule: Schedule, report: Callable[[Incident], object]) -> None:
    """Clear the seat of a process that died, or is to be killed because it is silent; take its task back."""
    assert seat.process is not None
    task, ready = seat.task, seat.ready
    how = _cause(seat.process.exitcode) if dead else f"gave no sign of life for {seat.quiet:.0f} seconds and was killed"
    how = f"the worker on {seat.device} {how}"
    _clear(seat)
    if not ready:
        seat.stillborn += 1
        report(Incident("died", f"{how}; it was not ready yet"))
        if seat.stillborn == _STILLBORN:
            report(Incident("retired", f"{_STILLBORN} workers on {seat.device} died at once: it is used no more"))
    elif task is None:
        report(Incident("died", f"{how}; it had nothing to do"))
    else:
        for incident in schedule.died(task, how):
            report(incident)


def _wait(seats: list[_Seat]) -> None:
    """Until a process has something to say or dies, or for a tick."""
    waited: list[Any] = []
    for seat in seats:
        if seat.process is not None and seat.pipe is not None:
            waited += [seat.pipe, seat.process.sentinel]
    connection.wait(waited, _TICK)


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


# --- Processes: how they begin and end ---


Spare = tuple[SpawnProcess, Connection]  # a process that waits for its worker, and the way to it


@contextmanager
def started_ahead(count: int, module: str) -> Iterator[list[Spare]]:
    """Processes for `run_chunks`, which import `module` meanwhile; those that it has not taken are ended."""
    spares: list[Spare] = []
    try:
        for _ in range(count):
            with _uninterrupted():
                spares.append(_start(module))
        yield spares
    finally:
        end(spares)


def end(spares: list[Spare]) -> None:
    """End processes that were started ahead and are not needed; none is left in the list."""
    for process, _ in spares:
        process.kill()
    while spares:
        process, pipe = spares.pop()
        pipe.close()
        _end(process)


def _start(module: str | None = None) -> Spare:
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, module), daemon=True)
    with theirs, _script_hidden():
        process.start()
    return process, pipe


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """No signal is answered here until this process knows of its child, which begins with them blocked, too."""
    resource_tracker.ensure_running()  # it would unblock the signals
    with _blocked(_SIGNALS):
        yield


@contextmanager
def _blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Nothing is raised by these in here. A child that is started in here begins with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _clear(seat: _Seat) -> None:
    """Kill and forget the process of a seat."""
    if seat.process is not None:
        _end(seat.process)
    if seat.pipe is not None:
        seat.pipe.close()
    seat.process = seat.pipe = seat.task = None
    seat.ready = seat.busy = False


def _end(process: SpawnProcess) -> None:
    process.kill()
    process.join()
    process.close()


def _dismiss(seats: list[_Seat]) -> None:
    """Tell all processes to leave, and make them."""
    try:
        for seat in seats:
            if seat.pipe is not None:
                with suppress(OSError):
                    seat.pipe.send(None)
        deadline = time.monotonic() + _GRACE
        alive = [seat.process.sentinel for seat in seats if seat.process is not None]
        while alive and (left := deadline - time.monotonic()) > 0:
            gone = connection.wait(alive, left)
            alive = [sentinel for sentinel in alive if sentinel not in gone]
    finally:
        for seat in seats:
            _clear(seat)


@contextmanager
def _script_hidden() -> Iterator[None]:
    """A spawned process imports the script that the parent runs, and so runs it again where it is not guarded.

    Workers need nothing of it: all that they get is cdclean's.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main).pop(name) for name in ("__spec__", "__file__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


# --- In the process ---


def _work(pipe: Connection, module: str | None) -> None:
    """Import `module`, get a worker, and do one task after the other until told to leave or the parent is gone."""
    for number in _SIGNALS:  # sent to the whole process group, and for the parent to answer
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_die_with_parent, daemon=True).start()

    def progress(samples: int) -> None:
        try:
            pipe.send(samples)
            told = pipe.poll()  # nothing else comes during a task
        except OSError:
            told = True
        if told:
            raise DismissedError

    if module is not None:
        import_module(module)
    try:
        sent = pipe.recv_bytes()
    except (EOFError, OSError):
        return
    worker = pickle.loads(sent)  # imports what it is made of, and says what is wrong with that
    with suppress(EOFError, OSError, DismissedError):
        while (task := pipe.recv()) is not None:
            pipe.send(attempt(worker, task, progress))


def _die_with_parent() -> None:
    """A parent that was killed cannot tell anybody to leave."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
