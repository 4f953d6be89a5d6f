"""What is given to a worker next, and what follows from a worker's death. Pure: no process, no clock, no device.

A chunk is one task. One that kills two workers is searched with probes, each half as large as the last, for the samples
that do it; a sample that has killed two workers alone is left out, and the rest of the chunk is scored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from cdclean.errors import IncompleteError

_DEATHS = 2  # of a whole chunk before it is searched; of a sample alone before it is left out
_SEARCHES = 3  # that found nothing, before a chunk is given up
_HOPELESS = 100  # deaths with nothing finished in between: it is not the samples


@dataclass(frozen=True)
class Task:
    """One piece of work for a worker: a chunk, or a part of one to see whether that kills the worker."""

    chunk: int
    rows: tuple[int, int] | None = None  # a probe: score the rows [from, to) of the chunk, and write nothing
    crashed: tuple[int, ...] = ()  # rows that have killed workers: not touched, they get the status crashed


Report = TypeVar("Report", covariant=True)


class Worker(Protocol[Report]):
    """What an engine is given: a picklable frozen dataclass, called with a task wherever the engine likes.

    It calls `progress(samples)` now and then, from the thread it was called in; 0 is a sign of life. A task with the
    rows (0, 0) makes it ready, as far as to have loaded the model, and no more.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def device(self) -> str: ...  # a torch device
    def __call__(self, task: Task, progress: Callable[[int], object], /) -> Report: ...


@dataclass(frozen=True)
class Incident:
    """Something that a person who looks after the run should be able to read later."""

    # died: a worker did · again: a chunk will be given to another one · bisecting: which sample is it ·
    # crashed: these samples, found · given-up: a chunk · retired: a device · waiting: for room on a cluster
    kind: Literal["died", "again", "bisecting", "crashed", "given-up", "retired", "waiting"]
    text: str
    chunk: int | None = None
    rows: tuple[int, ...] = ()  # of the chunk


Search = Generator[tuple[int, int], bool, list[int]]


@dataclass
class _Chunk:
    """What is known of a chunk that is not finished."""

    samples: int
    counted: int = 0  # samples that `Schedule.count` has let through
    deaths: int = 0  # of the whole chunk, since the last search
    crashed: tuple[int, ...] = ()
    search: Search | None = None
    probe: tuple[int, int] | None = None
    fruitless: int = 0  # searches that found nothing


@dataclass
class Schedule:
    """The chunks that are to be scored. At any time at most one task of each is out.

    `next` gives a task away; then exactly one of `finished`, `died` and `lost` takes it back. Chunks that have killed
    a worker wait until all others have been given away. After `done`, `judge` says whether all were scored.
    """

    sizes: Mapping[int, int]  # samples of each chunk
    _waiting: deque[int] = field(init=False)
    _open: dict[int, _Chunk] = field(init=False)
    _given_up: list[int] = field(default_factory=list, init=False)
    _deaths_in_a_row: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._waiting = deque(self.sizes)
        self._open = {chunk: _Chunk(samples) for chunk, samples in self.sizes.items()}

    @property
    def done(self) -> bool:
        return not self._open

    @property
    def waiting(self) -> int:
        """How many workers could be given a task now."""
        return len(self._waiting)

    def next(self) -> Task:
        """The next task. Raises IndexError where none is waiting."""
        chunk = self._waiting.popleft()
        known = self._open[chunk]
        return Task(chunk, known.probe, known.crashed)

    def count(self, task: Task, samples: int) -> int:
        """How many of a chunk's first `samples` have not been counted yet; none for a probe."""
        known = self._open[task.chunk]
        new = 0 if task.rows else max(0, min(samples, known.samples) - known.counted)
        known.counted += new
        return new

    def lost(self, task: Task) -> None:
        """The task was not finished, and that was not its fault."""
        self._waiting.append(task.chunk)

    def finished(self, task: Task) -> list[Incident]:
        self._deaths_in_a_row = 0
        if task.rows:
            return self._advance(task.chunk, died=False)
        del self._open[task.chunk]
        return []

    def died(self, task: Task, how: str) -> list[Incident]:
        """The worker that had the task died, and may have done so of it; `how` is a sentence that names the worker.

        Raises IncompleteError when workers keep dying and nothing at all is finished.
        """
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row == _HOPELESS:
            raise IncompleteError(
                f"the last {_HOPELESS} workers died, and none of them finished anything. The last one: {how}",
                hint="Look for the cause in the driver, the device or the model; then run the same command again.",
            )
        which = f"rows {task.rows[0]} to {task.rows[1] - 1} of " if task.rows else ""
        incidents = [Incident("died", f"{how}; it had {which}chunk {task.chunk}", task.chunk)]
        known = self._open[task.chunk]
        if task.rows:
            return incidents + self._advance(task.chunk, died=True)
        known.deaths += 1
        if known.deaths < _DEATHS:
            self._waiting.append(task.chunk)
            return [*incidents, Incident("again", f"chunk {task.chunk} will be given to another worker", task.chunk)]
        known.search = _search(0, known.samples)
        text = f"chunk {task.chunk} has killed {_DEATHS} workers: looking for the sample that does it"
        return [*incidents, Incident("bisecting", text, task.chunk), *self._advance(task.chunk, died=None)]

    def judge(self) -> None:
        """Raise IncompleteError where a chunk could not be scored."""
        if self._given_up:
            chunks = ", ".join(map(str, sorted(self._given_up)))
            raise IncompleteError(
                f"workers keep dying on chunk {chunks}, but on no sample of it alone; all other chunks are scored",
                hint="It may be the memory: try a smaller --batch-size or fewer --workers, with the same command.",
            )

    def _advance(self, chunk: int, died: bool | None) -> list[Incident]:
        """Tell the search of a chunk how its last probe ended (None: there was none), and go by its answer."""
        known = self._open[chunk]
        assert known.search is not None
        try:
            known.probe = next(known.search) if died is None else known.search.send(died)
        except StopIteration as end:
            found = tuple(row for row in end.value if row not in known.crashed)
            known.search, known.probe, known.deaths = None, None, 0
        else:
            self._waiting.append(chunk)
            return []
        if found:
            known.crashed = tuple(sorted({*known.crashed, *found}))
            text = f"found in chunk {chunk}: {len(found)} samples that kill workers"
            self._waiting.append(chunk)
            return [Incident("crashed", text, chunk, found)]
        known.fruitless += 1
        if known.fruitless < _SEARCHES:
            self._waiting.append(chunk)
            return [Incident("again", f"no sample of chunk {chunk} kills a worker alone; once more, the whole", chunk)]
        del self._open[chunk]
        self._given_up.append(chunk)
        return [Incident("given-up", f"chunk {chunk} is given up: it kills workers, and no sample does alone", chunk)]


def _search(first: int, last: int, deaths: int = 0) -> Search:
    """The rows in [first, last) that kill workers. Yields the rows to probe; is sent whether the worker died.

    The range as a whole is taken to have killed; `deaths` is how often a probe of exactly it did.
    """
    if last - first == 1:
        while deaths < _DEATHS:
            if not (yield first, last):
                return []
            deaths += 1
        return [first]
    middle = (first + last) // 2
    left_kills = yield first, middle
    found = (yield from _search(first, middle, 1)) if left_kills else []
    # Where the left half does no harm, the right half does, and need not be probed as a whole.
    right_kills = (yield middle, last) if left_kills else True
    if right_kills:
        found += yield from _search(middle, last, 1 if left_kills else 0)
    return found
