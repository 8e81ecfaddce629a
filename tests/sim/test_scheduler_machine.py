"""Hypothesis drives the scheduler against a reference that is a dict; failures shrink to few steps.

The reference knows each task's inputs and how it was told to end. Workers here are as slow, as
forgetful and as mistaken as hypothesis likes; the scheduler's table is counted again each time.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from zfabric import messages as m
from zfabric.core import invariants
from zfabric.core.tasks import ASSIGNED, READY, WAITING
from zfabric.testing.bench import Bench, tid

SMALL, LARGE, RAISES, DIES = range(4)
ENDS = {m.VALUE, m.STORED, m.ERROR, m.KILLED, m.CANCELLED, m.LOST}


class SchedulerMachine(RuleBasedStateMachine):
    """One client, workers that come and go, rows that end in any order."""

    tasks = Bundle("tasks")

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.bench.client(1)
        self.counter = 0
        self.n_workers = 0
        self.kinds: dict[int, int] = {}
        self.inputs: dict[int, list[int]] = {}
        self.told: dict[int, int] = {}
        self.held: dict[int, dict[int, int]] = {}
        """Per worker, what it was sent and has not ended: id -> attempt, oldest first."""
        self.stores: dict[int, set[int]] = {}
        self.cancelled: set[int] = set()

    @initialize()
    def one_worker(self) -> None:
        self.join(2)

    # --- what the broker says is taken in -----------------------------------------------------

    def take(self, said: list[tuple[int, Any]]) -> None:
        for number, message in said:
            if number == 1:
                for id_, status in zip(message.ids, message.statuses):
                    self.on_end(id_, status)
                continue
            rows = self.held.get(number)
            if rows is None:
                continue
            if isinstance(message, m.Run):
                deps = dict(message.deps)
                for place, id_ in enumerate(message.ids):
                    rows[id_] = message.attempts[place]
                    self.check_inputs(number, id_, deps.get(place, []))
            elif isinstance(message, m.Drop):
                for id_ in message.ids:
                    rows.pop(id_, None)
            elif isinstance(message, m.Free):
                self.stores[number].difference_update(message.ids)
            elif isinstance(message, m.Give):
                self.stores[number].update(message.ids)
            elif isinstance(message, m.Recall):
                back = [id_ for id_ in message.ids if id_ in rows]
                attempts = [rows.pop(id_) for id_ in back]
                self.take(self.bench.say(number, m.Returned(back, attempts, 2)))

    def check_inputs(self, number: int, id_: int, deps: list[Any]) -> None:
        """A row names each input once, and by a way that works there."""
        assert [dep for dep, _, _ in deps] == self.inputs[id_]
        for dep, way, data in deps:
            if way == m.LOCAL:
                assert dep in self.held[number] or dep in self.stores[number]
            elif way == m.REMOTE:
                assert any(dep in self.stores[holder] for holder, _ in data[1])

    def on_end(self, id_: int, status: int) -> None:
        assert status in ENDS
        if status == m.CANCELLED:
            assert self.explained(id_, lambda one: one in self.cancelled)
        elif status == m.ERROR:
            assert self.explained(id_, lambda one: self.kinds[one] == RAISES)
        elif status == m.KILLED:
            assert self.explained(id_, lambda one: self.kinds[one] == DIES)
        self.told[id_] = status

    def explained(self, id_: int, why: Any) -> bool:
        return why(id_) or any(self.explained(dep, why) for dep in self.inputs[id_])

    # --- rules --------------------------------------------------------------------------------

    @rule(
        target=tasks,
        kinds=st.lists(
            st.sampled_from([SMALL, SMALL, LARGE, RAISES, DIES]), min_size=1, max_size=3
        ),
        deps=st.lists(tasks, max_size=3, unique=True),
        chained=st.booleans(),
    )
    def submit(self, kinds: list[int], deps: list[int], chained: bool) -> Any:
        made = []
        numbers, inputs = [], {}
        for kind in kinds:
            self.counter += 1
            id_ = tid(self.counter)
            wanted = [*deps, *(made[-1:] if chained else [])]
            self.kinds[id_], self.inputs[id_] = kind, wanted
            numbers.append(self.counter)
            made.append(id_)
            inputs[self.counter] = wanted
        self.take(self.bench.submit(*numbers, deps={n: d for n, d in inputs.items() if d}))
        return multiple(*made)

    @rule(task=consumes(tasks))
    def release(self, task: int) -> None:
        self.take(self.bench.say(1, m.Release([task])))
        self.told.pop(task, None)

    @rule(task=tasks)
    def cancel(self, task: int) -> None:
        # Told before or not: a stored value that was lost is being made again, and that ends.
        if self.bench.scheduler.tasks[task].state in (WAITING, READY, ASSIGNED):
            self.cancelled.add(task)
        self.take(self.bench.say(1, m.Cancel([task])))
        assert task in self.told

    @rule(task=tasks)
    def retry(self, task: int) -> None:
        if self.told.get(task) in (m.ERROR, m.KILLED, m.CANCELLED, m.LOST):
            del self.told[task]
            self.take(self.bench.say(1, m.Retry([task])))

    @precondition(lambda self: len(self.held) < 3)
    @rule(slots=st.integers(1, 2))
    def join(self, slots: int) -> None:
        self.n_workers += 1
        number = 100 + self.n_workers
        self.held[number] = {}
        self.stores[number] = set()
        self.bench.worker(number, slots)
        self.take(self.bench.turn())

    @precondition(lambda self: len(self.held) > 1)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[number]
        del self.stores[number]
        self.take(self.bench.worker_left(number))

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), credit=st.integers(1, 4))
    def end(self, data: st.DataObject, credit: int) -> None:
        """Some worker's oldest row that has its inputs ends."""
        busy = sorted(number for number, rows in self.held.items() if rows)
        self.end_one(data.draw(st.sampled_from(busy)), credit)

    def end_one(self, number: int, credit: int = 4) -> None:
        rows = self.held[number]
        id_ = next(one for one in rows if not set(self.inputs[one]) & rows.keys())
        attempt = rows.pop(id_)
        kind = self.kinds[id_]
        status, payload = {
            SMALL: (m.VALUE, b"v%d" % id_),
            LARGE: (m.STORED, (1 << 20).to_bytes(8, "little")),
            RAISES: (m.ERROR, b"exc"),
            DIES: (m.DIED, b"\x91\xa0"),
        }[kind]
        if kind == LARGE:
            self.stores[number].add(id_)
        self.bench.hear(number, m.Done([id_], [attempt], bytes([status]), [payload], credit))
        if kind in (RAISES, DIES):
            self.give_back_waiters(number, [id_])
        self.take(self.bench.turn())

    def give_back_waiters(self, number: int, ended: list[int]) -> None:
        """What a worker does with rows that wait for one that ended without a value."""
        rows = self.held[number]
        ids, attempts = [], []
        while ended:
            gone = ended.pop()
            for id_ in [one for one in rows if gone in self.inputs[one]]:
                ids.append(id_)
                attempts.append(rows.pop(id_))
                ended.append(id_)
        if ids:
            self.bench.hear(number, m.Returned(ids, attempts, 2))

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """A worker returns a row that it has not started."""
        busy = sorted(number for number, rows in self.held.items() if rows)
        number = data.draw(st.sampled_from(busy))
        rows = self.held[number]
        id_ = data.draw(st.sampled_from(list(rows)))
        self.bench.hear(number, m.Returned([id_], [rows.pop(id_)], 1))
        self.give_back_waiters(number, [id_])
        self.take(self.bench.turn())

    @precondition(lambda self: bool(self.held))
    @rule(task=tasks, attempt=st.integers(0, 5), data=st.data())
    def stale(self, task: int, attempt: int, data: st.DataObject) -> None:
        """A row of an attempt that is over, or was never this worker's."""
        number = data.draw(st.sampled_from(sorted(self.held)))
        if self.held[number].get(task) == attempt:
            return
        done = m.Done([task], [attempt], bytes([m.VALUE]), [b"stale"], 2)
        before = dict(self.told)
        self.take(self.bench.say(number, done))
        assert self.told == before

    @rule(seconds=st.sampled_from([0.01, 0.1, 5.0]))
    def tick(self, seconds: float) -> None:
        self.take(self.bench.tick(seconds))

    # --- what holds ---------------------------------------------------------------------------

    @invariant()
    def the_table_agrees_with_the_workers(self) -> None:
        invariants.check(self.bench.scheduler)
        for number, worker in self.bench.scheduler.workers.items():
            assert worker.rows.keys() <= self.held[number].keys()
            assert worker.values <= self.stores[number]

    def teardown(self) -> None:
        """When nothing new comes, everything ends; when all is released, nothing is left."""
        if not self.held:
            self.join(1)
        for _ in range(2000):
            busy = next((number for number, rows in self.held.items() if rows), None)
            if busy is None:
                break
            self.end_one(busy)
        unfinished = [t for t in self.bench.scheduler.tasks.values() if t.state in (0, 1, 2)]
        assert not unfinished, [task.story() for task in unfinished]
        wanted = [t.id for t in self.bench.scheduler.tasks.values() if t.wanted]
        assert all(id_ in self.told for id_ in wanted)
        self.take(self.bench.say(1, m.Release(wanted)))
        invariants.check_empty(self.bench.scheduler)
        assert not any(self.stores.values())


SchedulerMachine.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestSchedulerMachine = SchedulerMachine.TestCase
