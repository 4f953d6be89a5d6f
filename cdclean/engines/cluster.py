"""A Ray cluster: one actor a GPU, or a share of the CPUs, which gets a chunk whenever it is free.

Parts are written where the run folder is, on storage that every node reaches; only reports travel. An actor that dies,
or says nothing for too long, is replaced on a node that is left; its chunk goes back to the schedule.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from cdclean.engines.outcomes import DismissedError, Failure, attempt
from cdclean.engines.tasks import Incident, Report, Schedule, Task, Worker
from cdclean.errors import IncompleteError, StoppedError, UsageError

_TICK = 1.0  # seconds of waiting after which the actors are asked how far they are
_GRACE = 3.0  # seconds that an actor has to leave in when it is told to
_PATIENCE = 30.0  # seconds without an actor after which that is said
_WORDS = 300  # characters of what Ray says about a death
_VERDICT = 30.0  # seconds in which the cluster has to find out what became of an actor
_CPUS = 1.0  # that an actor takes
_STILLBORN = 3  # actors in a row that die before they are ready, until no more are made


def run_chunks(
    worker: Worker[Report],
    pending: Mapping[int, int],
    address: str | None,
    actors: int | None,
    progress: Callable[[int], object],
    report: Callable[[Incident], object],
    *,
    stall: float,
) -> Generator[Report, None, None]:
    """Yield the report of every chunk of `pending` (chunk -> samples) as soon as its part is written.

    `address` is that of a Ray cluster (host:port, or auto); None starts one on this machine, for as long as this runs.
    `actors` is how many there are; None: as many as the cluster has room for. One takes a GPU, or a CPU.
    `progress(samples)` is called in between, once for every sample, and `report` with whatever
    goes wrong. An actor that has a task and has sent no sign of life for `stall` seconds is killed.

    Raises UsageError where Ray is not installed or the cluster not there, what a worker raises (a CdcleanError as it
    is, anything else as a CdcleanError with the traceback), and IncompleteError where a chunk cannot be scored, or no
    actor stays alive or finds a place. Only the actors and what was started here are stopped; close the iterator where
    it is not exhausted.
    """
    kind = worker.device.split(":")[0]
    needs = {"CPU": _CPUS, "GPU": 1.0} if kind == "cuda" else {"CPU": _CPUS}
    # Ray shows an actor its own GPU alone.
    worker = replace(worker, device="cuda:0" if kind == "cuda" else kind)
    with _connected(address) as ray:
        crew = _Crew(ray, worker, needs, actors, Schedule(pending), Task(next(iter(pending), 0), rows=(0, 0)))
        try:
            yield from _run(crew, progress, report, stall)
        except SystemError as error:  # what Ray makes of a signal that came while it waited
            if isinstance(error.__cause__, StoppedError):
                raise error.__cause__ from None
            raise
        finally:
            crew.dismiss()


def _run(
    crew: _Crew, progress: Callable[[int], object], report: Callable[[Incident], object], stall: float
) -> Iterator[Any]:
    schedule, heard, waited = crew.schedule, time.monotonic(), 0.0
    while not schedule.done:
        crew.fill()
        finished = crew.wait()
        now = time.monotonic()
        # A pause of this process itself is not the actors' silence: one turn counts as one tick at most.
        silence, heard = min(now - heard, _TICK), now
        crew.ask()
        for seat in list(crew.seats):
            seat.quiet += silence if seat.node else 0.0  # it does not live before it has a node
            seat.hear(crew.ray)
            if seat.task and (new := schedule.count(seat.task, seat.count)):
                progress(new)
            if seat.work in finished:
                yield from _collect(crew, seat, progress, report)
            elif seat.work is not None and seat.quiet > stall:
                how = f"gave no sign of life for {seat.quiet:.0f} seconds and was killed"
                _bury(crew, seat, how, report, lost=False)
        waited = 0.0 if any(seat.node for seat in crew.seats) else waited + silence
        if waited > _PATIENCE >= waited - silence:
            report(Incident("waiting", f"no worker lives on the cluster yet; one takes {crew.takes}: see ray status"))
        if waited > stall:
            raise IncompleteError(
                f"no worker has come to life on the cluster for {waited:.0f} seconds; one takes {crew.takes}",
                hint="See what the cluster has with: ray status",
            )
    schedule.judge()


def _collect(
    crew: _Crew, seat: _Seat, progress: Callable[[int], object], report: Callable[[Incident], object]
) -> Iterator[Any]:
    """Take the task back from an actor that has done it, or died of it; yields the report of a whole chunk."""
    try:
        outcome = crew.ray.get(seat.work)
    except crew.ray.exceptions.RayError as error:
        end = crew.end_of(seat, error)
        lost = seat.node not in crew.nodes() or isinstance(end, crew.ray.exceptions.ActorUnavailableError)
        _bury(crew, seat, f"died ({' '.join(str(end).split())[:_WORDS]})", report, lost=lost)
        return
    if isinstance(outcome, Failure):
        raise outcome.error
    task, seat.task, seat.work = seat.task, None, None
    crew.stillborn = 0
    if task is None:
        seat.ready = True
        return
    if new := crew.schedule.count(task, crew.schedule.sizes[task.chunk]):
        progress(new)
    for incident in crew.schedule.finished(task):
        report(incident)
    if task.rows is None:
        yield outcome


def _bury(crew: _Crew, seat: _Seat, how: str, report: Callable[[Incident], object], lost: bool) -> None:
    """Forget a dead actor, or one that is to be killed because it is silent; take its task back."""
    crew.seats.remove(seat)
    crew.kill(seat)
    how = f"the worker on node {seat.node[:8]} {how}" if seat.node else f"a worker {how}"
    if lost and seat.ready:
        report(Incident("died", f"{how}; the node is lost, or the way to it", seat.task.chunk if seat.task else None))
        if seat.task is not None:
            crew.schedule.lost(seat.task)
    elif not seat.ready:
        report(Incident("died", f"{how}; it was not ready yet"))
        crew.stillborn += 1
        if crew.stillborn >= _STILLBORN and not any(other.ready for other in crew.seats):
            raise IncompleteError(
                f"{_STILLBORN} workers in a row have died before they were ready to score. The last one: {how}",
                hint="Every node needs cdclean, the same version everywhere, and the model under the same path.",
            )
    elif seat.task is not None:
        for incident in crew.schedule.died(seat.task, how):
            report(incident)


@dataclass(eq=False)
class _Seat:
    """An actor, and what it is doing."""

    actor: Any
    work: Any  # reference to the end of what it does
    node: str = ""  # where it is; empty while it waits for a place
    ready: bool = False  # it has finished a task: it can load the model
    task: Task | None = None  # that belongs to the schedule
    number: int = 0  # of what it does
    count: int = 0  # samples of the task
    signs: int = 0  # of life
    quiet: float = 0.0  # seconds
    answer: Any = None  # reference to what it will say about itself

    def hear(self, ray: Any) -> None:
        """Take in what the actor has said about itself, if it has."""
        if self.answer is None or not ray.wait([self.answer], timeout=0)[0]:
            return
        answer, self.answer = self.answer, None
        with suppress(ray.exceptions.RayError):  # it is dead, as the end of its work says too
            self.node, number, count, signs = ray.get(answer)
            self.count = count if number == self.number else 0
            if signs != self.signs:
                self.signs, self.quiet = signs, 0.0


class _Crew:
    """The actors of a run."""

    def __init__(
        self,
        ray: Any,
        worker: Worker[Any],
        needs: dict[str, float],
        actors: int | None,
        schedule: Schedule,
        prepare: Task,
    ) -> None:
        self.ray, self.worker, self.needs, self.actors = ray, worker, needs, actors
        self.schedule, self.prepare = schedule, prepare
        self.seats: list[_Seat] = []
        self.stillborn = 0
        self.takes = " and ".join(f"{amount:g} {name}" for name, amount in needs.items())
        self._made = ray.remote(_Actor).options(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,  # it answers while it works
        )

    def nodes(self) -> dict[str, float]:
        """How many actors each living node could hold, were there nothing else on it."""
        return {
            node["NodeID"]: min(node["Resources"].get(name, 0.0) // amount for name, amount in self.needs.items())
            for node in self.ray.nodes()
            if node["Alive"]
        }

    def fill(self) -> None:
        """Give a task to whoever is free; make as many actors as there are tasks left, and places."""
        for seat in self.seats:
            if seat.ready and seat.work is None and self.schedule.waiting:
                seat.task = self.schedule.next()
                seat.number, seat.count, seat.quiet = seat.number + 1, 0, 0.0
                seat.work = seat.actor.work.remote(seat.number, seat.task)
        starting = sum(not seat.ready for seat in self.seats)
        if starting >= self.schedule.waiting or self.stillborn >= _STILLBORN:
            return
        # One at least, though there be no room: a cluster that grows when asked has to be asked.
        wanted = self.actors or max(1, int(sum(self.nodes().values())))
        for _ in range(min(wanted - len(self.seats), self.schedule.waiting - starting)):
            actor = self._made.remote(self.worker)
            self.seats.append(_Seat(actor, actor.work.remote(0, self.prepare)))

    def wait(self) -> set[Any]:
        """The references of work that has ended; a tick passes if none has."""
        works = [seat.work for seat in self.seats if seat.work is not None]
        if not works:
            time.sleep(_TICK)
        elif self.ray.wait(works, num_returns=1, timeout=_TICK)[0]:
            return set(self.ray.wait(works, num_returns=len(works), timeout=0)[0])
        return set()

    def ask(self) -> None:
        """Ask those actors how far they are that have answered the last time."""
        for seat in self.seats:
            if seat.work is not None and seat.answer is None:
                seat.answer = seat.actor.heard.remote()

    def end_of(self, seat: _Seat, error: Exception) -> Exception:
        """Why the actor is gone; `error` may say no more than that it cannot be reached."""
        errors, end = self.ray.exceptions, error
        if isinstance(error, errors.ActorUnavailableError):
            try:
                self.ray.get(seat.actor.heard.remote(), timeout=_VERDICT)
            except errors.ActorDiedError as verdict:
                end = verdict
            except errors.RayError:
                pass
        return end

    def kill(self, seat: _Seat) -> None:
        with suppress(self.ray.exceptions.RayError, ValueError):
            self.ray.kill(seat.actor)

    def dismiss(self) -> None:
        """Tell all actors to leave, so that unfinished uploads are aborted, and make them."""
        try:
            busy = [seat for seat in self.seats if seat.work is not None and seat.node]
            for seat in busy:
                seat.actor.leave.remote()
            if busy:
                self.ray.wait([seat.work for seat in busy], num_returns=len(busy), timeout=_GRACE)
        finally:
            for seat in self.seats:
                self.kill(seat)


class _Actor:
    """What lives on a node: works in one thread, and answers in another."""

    def __init__(self, worker: Worker[Any]) -> None:
        import ray

        self._worker = worker
        self._node = ray.get_runtime_context().get_node_id()
        self._number = self._count = self._signs = 0
        self._told = False

    def work(self, number: int, task: Task) -> Any:
        """The report, or a Failure; None where it was told to leave meanwhile."""
        self._number, self._count = number, 0
        try:
            return attempt(self._worker, task, self._progress)
        except DismissedError:
            return None

    def _progress(self, samples: int) -> None:
        self._count += samples
        self._signs += 1
        if self._told:
            raise DismissedError

    def heard(self) -> tuple[str, int, int, int]:
        """Its node, the number of its work, the samples of that which are done, and all signs of life so far."""
        return self._node, self._number, self._count, self._signs

    def leave(self) -> None:
        self._told = True


def _unreachable(address: str | None) -> str | None:
    """Why nobody can be there, if so: Ray itself would try for minutes, deaf to signals."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_GRACE).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return None


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster; a connection that was there before is used, and left."""
    try:
        import ray
        from ray._private import worker as ray_worker
    except ImportError as error:
        raise UsageError("--engine ray needs Ray, which is not installed", hint="pip install 'cdclean[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    on_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    here: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 100 << 20}
    try:
        if problem := _unreachable(address):
            raise ConnectionError(problem)
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **({} if address else here)
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UsageError(
            f"cannot connect to a Ray cluster at {address}: {error}",
            hint="Start one with: ray start --head; or run this where one is, with --ray-address auto",
        ) from error
    finally:
        if on_main_thread:
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there
    said = getattr(ray_worker, "_worker_logs_enabled", True)
    ray_worker._worker_logs_enabled = False  # the log of a dead node, to stdout, where results go
    try:
        yield ray
    finally:
        ray.shutdown()
        ray_worker._worker_logs_enabled = said
