"""The schedule: whoever dies when, every chunk ends with exactly the samples marked that kill."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdclean.engines import serial
from cdclean.engines.tasks import Incident, Schedule, Task
from cdclean.errors import IncompleteError
from tests.engine_workers import Done, Scorer, written


class World:
    """Workers that hold tasks, samples that kill, and deaths for no reason; it plays a schedule to its end."""

    def __init__(self, sizes: dict[int, int], killers: set[tuple[int, int]], choices: list[int]) -> None:
        self.schedule = Schedule(sizes)
        self.sizes, self.killers, self.choices = sizes, killers, choices
        self.out: list[Task] = []
        self.marked: dict[int, tuple[int, ...]] = {}
        self.incidents: list[Incident] = []
        self.counted: Counter[int] = Counter()
        self.deaths = 0

    def choose(self, among: int) -> int:
        """The next of the given numbers, over and over."""
        self.choices.append(self.choices.pop(0))
        return self.choices[-1] % among

    def kills(self, task: Task) -> bool:
        first, last = task.rows or (0, self.sizes[task.chunk])
        return any((task.chunk, row) in self.killers and row not in task.crashed for row in range(first, last))

    def hand_out(self, workers: int) -> None:
        while len(self.out) < workers and self.schedule.waiting:
            task = self.schedule.next()
            assert task.chunk not in [other.chunk for other in self.out], "two workers at one chunk"
            assert task.chunk not in self.marked, "a finished chunk again"
            if task.rows is not None:
                assert 0 <= task.rows[0] < task.rows[1] <= self.sizes[task.chunk]
            self.out.append(task)

    def finish(self, task: Task) -> None:
        self.incidents += self.schedule.finished(task)
        if task.rows is None:
            self.marked[task.chunk] = task.crashed

    def play(self, workers: int, unlucky: dict[int, int]) -> None:
        """`unlucky`: how often the workers of a chunk die for no reason. Nobody has that bad luck twice alone."""
        alone: Counter[tuple[int, tuple[int, int]]] = Counter()
        while not self.schedule.done:
            self.hand_out(workers)
            assert self.out, "nothing is out, and nothing can be given out, but it is not done"
            task = self.out.pop(self.choose(len(self.out)))
            samples = self.choose(self.sizes[task.chunk] + 1)
            self.counted[task.chunk] += self.schedule.count(task, samples)
            single = task.rows is not None and task.rows[1] - task.rows[0] == 1
            bad_luck = unlucky.get(task.chunk, 0) > 0 and self.choose(2) == 0
            if bad_luck and single and task.rows:
                alone[task.chunk, task.rows] += 1
                bad_luck = alone[task.chunk, task.rows] == 1
            if self.kills(task):
                self.died(task)
            elif bad_luck:
                unlucky[task.chunk] -= 1
                if self.choose(3) == 0:
                    self.schedule.lost(task)
                else:
                    self.died(task)
            else:
                self.counted[task.chunk] += self.schedule.count(task, self.sizes[task.chunk])
                self.finish(task)
        self.schedule.judge()

    def died(self, task: Task) -> None:
        self.deaths += 1
        self.incidents += self.schedule.died(task, "the worker died")


@st.composite
def worlds(draw: st.DrawFn) -> World:
    sizes = dict(enumerate(draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))))
    rows = [(chunk, row) for chunk, size in sizes.items() for row in range(size)]
    killers = draw(st.sets(st.sampled_from(rows)))
    return World(sizes, killers, draw(st.lists(st.integers(0, 10**6), min_size=20, max_size=60)))


@given(world=worlds(), workers=st.integers(1, 4), unlucky=st.dictionaries(st.integers(0, 4), st.integers(0, 5)))
def test_every_chunk_ends_with_exactly_the_killers_marked(world: World, workers: int, unlucky: dict[int, int]) -> None:
    world.play(workers, unlucky)
    expected = {
        chunk: tuple(r for r in range(size) if (chunk, r) in world.killers) for chunk, size in world.sizes.items()
    }
    assert world.marked == expected
    assert world.counted == world.sizes, "every sample is counted once"
    told = {
        (incident.chunk, row) for incident in world.incidents if incident.kind == "crashed" for row in incident.rows
    }
    assert told == world.killers
    assert sum(incident.kind == "died" for incident in world.incidents) == world.deaths


@given(size=st.integers(1, 500), data=st.data())
def test_a_sample_is_found_by_halving(size: int, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, size - 1))
    world = World({0: size}, {(0, row)}, [0])
    world.play(1, {})
    assert world.marked == {0: (row,)}
    assert world.deaths <= 2 + math.ceil(math.log2(size)) + 2


def test_a_chunk_that_has_killed_waits_for_the_others() -> None:
    schedule = Schedule({0: 4, 1: 4, 2: 4})
    first = schedule.next()
    assert [each.kind for each in schedule.died(first, "it died")] == ["died", "again"]
    assert [schedule.next().chunk for _ in range(3)] == [1, 2, 0]


def test_where_no_sample_alone_kills_the_chunk_is_given_up_and_the_others_are_not() -> None:
    schedule = Schedule({7: 4, 8: 4})
    kinds: Counter[str] = Counter()
    finished = []
    while not schedule.done:
        task = schedule.next()
        # Rows 1 and 2 of chunk 7 kill together.
        first, last = task.rows or (0, 4)
        if task.chunk == 7 and first <= 1 and last > 2:
            incidents = schedule.died(task, "it died")
        else:
            incidents = schedule.finished(task)
            finished += [task] if task.rows is None else []
        kinds.update(incident.kind for incident in incidents)
    assert finished == [Task(8)]
    assert kinds == {"died": 6, "again": 3 + 2, "bisecting": 3, "given-up": 1}
    with pytest.raises(IncompleteError, match="chunk 7, but on no sample of it alone"):
        schedule.judge()


def test_where_everything_dies_it_ends() -> None:
    schedule = Schedule(dict.fromkeys(range(1000), 1000))
    for _ in range(99):
        schedule.died(schedule.next(), "it burns")
    task = schedule.next()
    with pytest.raises(IncompleteError, match=r"the last 100 workers died.*it burns"):
        schedule.died(task, "it burns")


def test_the_serial_engine(tmp_path: Path) -> None:
    counts: list[int] = []
    reports = list(serial.run_chunks(Scorer(tmp_path, 3), {2: 3, 5: 3}, counts.append))
    assert reports == [Done(2, 3), Done(5, 3)]
    assert sum(counts) == 6
    assert written(tmp_path) == {2: ["ok"] * 3, 5: ["ok"] * 3}
