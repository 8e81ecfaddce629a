"""The order in which ready tasks get their turn."""

from __future__ import annotations

import random
from collections import Counter

from zfabric.core.ready import TURN, ReadyQueue
from zfabric.core.tasks import ASSIGNED, READY, ClientRecord, TaskRecord
from zfabric.messages import TaskOptions

OUTSIDE = ClientRecord(1, "outside")
OTHER = ClientRecord(2, "other")
INSIDE = ClientRecord(3, "inside", depth=1)
DEEPER = ClientRecord(4, "deeper", depth=2)


def task(number: int, owner: ClientRecord = OUTSIDE, priority: int = 0) -> TaskRecord:
    made = TaskRecord(number, None, b"", owner)
    if priority:
        made.options = TaskOptions(priority=priority)
    return made


def pushed(*tasks: TaskRecord) -> ReadyQueue:
    queue = ReadyQueue()
    for one in tasks:
        queue.push(one)
    return queue


def drained(queue: ReadyQueue) -> list[int]:
    ids = []
    while (one := queue.pop()) is not None:
        one.state = ASSIGNED
        ids.append(one.id)
    return ids


def test_oldest_first() -> None:
    queue = ReadyQueue()
    queue.extend(OUTSIDE, [task(1), task(2)])
    queue.push(task(3))
    assert queue.n == 3
    assert drained(queue) == [1, 2, 3]
    assert queue.n == 0
    assert queue.pop() is None


def test_priority_before_depth_before_age() -> None:
    queue = pushed(
        task(1), task(2, INSIDE), task(3, DEEPER), task(4, priority=1), task(5, priority=-1)
    )
    assert drained(queue) == [4, 3, 2, 1, 5]


def test_children_of_waiting_parents_come_newest_first() -> None:
    assert drained(pushed(*(task(n, INSIDE) for n in range(5)))) == [4, 3, 2, 1, 0]


def test_what_was_begun_goes_before_what_is_fresh() -> None:
    queue = pushed(task(1), task(2))
    queue.push_hot(task(3))
    queue.push_hot(task(4))
    queue.push_front(task(5))
    assert drained(queue) == [5, 3, 4, 1, 2]


def test_clients_take_turns() -> None:
    queue = ReadyQueue()
    queue.extend(OUTSIDE, [task(n) for n in range(10 * TURN)])
    queue.extend(OTHER, [task(100_000 + n, OTHER) for n in range(3 * TURN)])
    ids = drained(queue)
    first = ids.index(100_000)
    assert first <= TURN
    owners = Counter(id_ >= 100_000 for id_ in ids[: 4 * TURN])
    assert owners[True] == owners[False] == 2 * TURN
    assert [i for i in ids if i < 100_000] == list(range(10 * TURN))
    assert [i for i in ids if i >= 100_000] == list(range(100_000, 100_000 + 3 * TURN))


def test_a_newcomer_waits_for_one_turn_at_most() -> None:
    queue = ReadyQueue()
    queue.extend(OUTSIDE, [task(n) for n in range(10 * TURN)])
    for _ in range(TURN // 2):
        assert queue.pop() is not None
    queue.push(task(777_777, OTHER))
    assert 777_777 in drained(queue)[: TURN // 2 + 1]


def test_stale_entries_are_passed_over() -> None:
    tasks = [task(n) for n in range(6)]
    queue = pushed(*tasks)
    for one in tasks[::2]:
        one.state = ASSIGNED
    assert drained(queue) == [1, 3, 5]
    assert queue.n == 0


def test_a_queue_of_only_stale_entries_is_empty_and_goes_on() -> None:
    first = task(1)
    queue = pushed(first)
    first.state = ASSIGNED
    assert queue.pop() is None
    queue.push(task(2))
    assert drained(queue) == [2]


def test_a_task_queued_twice_runs_once() -> None:
    one = task(1)
    queue = pushed(one)
    queue.push_front(one)
    assert drained(queue) == [1]


def test_against_a_simple_model() -> None:
    """Whatever is pushed and popped: nothing lost, nothing twice, best level first."""
    for seed in range(60):
        rng = random.Random(seed)
        queue = ReadyQueue()
        waiting: dict[int, TaskRecord] = {}
        for n in range(300):
            if rng.random() < 0.55:
                one = task(n, rng.choice([OUTSIDE, OTHER, INSIDE]), rng.choice([0, 0, 3]))
                rng.choice([queue.push, queue.push_hot, queue.push_front])(one)
                waiting[n] = one
            elif waiting and rng.random() < 0.2:
                waiting.pop(rng.choice(list(waiting))).state = ASSIGNED
            else:
                got = queue.pop()
                if got is None:
                    assert not waiting
                    continue
                got.state = ASSIGNED
                del waiting[got.id]
                level = (got.options.priority, got.owner.depth)
                assert all(level >= (t.options.priority, t.owner.depth) for t in waiting.values())
            ready = {t.id for t in queue.entries() if t.state == READY}
            assert ready == set(waiting)
            assert queue.n >= len(waiting)
        assert sorted(drained(queue)) == sorted(waiting)
