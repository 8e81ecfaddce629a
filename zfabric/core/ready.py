"""The queue of tasks that could run now.

Order: the user's priority; then depth (rows of clients inside tasks come before those of the
clients outside, newest first, so that parents which wait for children hold as few slots as
possible); then rows whose inputs were just made, before fresh ones (depth first keeps fewer
values alive); then age, taking turns between clients, so that a client with a million rows does
not keep another's single one waiting. Everything is O(1) per task and level.

Removal is lazy: whoever takes a task out of READY leaves its entry here, and `pop` skips it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from zfabric.core.tasks import READY, ClientRecord, TaskRecord

TURN = 64
"""Rows that one client gets in a row while others wait."""


class _Level:
    """The tasks of one priority and depth."""

    __slots__ = ("hot", "left", "lifo", "queues", "turns")

    def __init__(self, lifo: bool) -> None:
        self.lifo = lifo
        self.hot: deque[TaskRecord] = deque()
        self.queues: dict[int, deque[TaskRecord]] = {}
        self.turns: deque[deque[TaskRecord]] = deque()
        self.left = TURN

    def queue_of(self, owner: int) -> deque[TaskRecord]:
        queue = self.queues.get(owner)
        if queue is None:
            queue = self.queues[owner] = deque()
            self.turns.append(queue)
        return queue

    def pop(self) -> TaskRecord | None:
        hot = self.hot
        while hot:
            task = hot.popleft()
            if task.state == READY:
                return task
        turns = self.turns
        while turns:
            queue = turns[0]
            while queue:
                task = queue.pop() if self.lifo else queue.popleft()
                if task.state == READY:
                    self.left -= 1
                    if self.left <= 0:
                        self.left = TURN
                        turns.rotate(-1)
                    return task
            turns.popleft()
            self.left = TURN
            self.queues = {number: q for number, q in self.queues.items() if q is not queue}
        return None


class ReadyQueue:
    """Ready tasks, best first."""

    __slots__ = ("_keys", "_levels", "n")

    def __init__(self) -> None:
        self._levels: dict[tuple[int, int], _Level] = {}
        self._keys: list[tuple[int, int]] = []
        self.n = 0
        """Entries, some of them perhaps stale: 0 means that there is surely nothing."""

    def push(self, task: TaskRecord) -> None:
        """A task whose inputs were there from the start."""
        self._level(task).queue_of(task.owner.number).append(task)
        self.n += 1

    def extend(self, owner: ClientRecord, tasks: list[TaskRecord]) -> None:
        """Many such tasks of one client, all with default options, oldest first."""
        self._level(tasks[0]).queue_of(owner.number).extend(tasks)
        self.n += len(tasks)

    def push_hot(self, task: TaskRecord) -> None:
        """A task whose last input was just made."""
        self._level(task).hot.append(task)
        self.n += 1

    def push_front(self, task: TaskRecord) -> None:
        """A task that had its turn already and came back."""
        self._level(task).hot.appendleft(task)
        self.n += 1

    def pop(self) -> TaskRecord | None:
        """The best ready task, no longer queued; None when there is none."""
        levels = self._levels
        keys = self._keys
        while keys:
            level = levels[keys[-1]]
            task = level.pop()
            if task is not None:
                self.n -= 1
                return task
            del levels[keys.pop()]
        self.n = 0
        return None

    def take_out(self, tasks: set[TaskRecord]) -> None:
        """Leave the queue without these, which costs a look at every entry."""
        for level in self._levels.values():
            for queue in (level.hot, *level.turns):
                kept = [task for task in queue if task not in tasks]
                queue.clear()
                queue.extend(kept)

    def entries(self) -> Iterator[TaskRecord]:
        """Everything queued, stale entries too, in no order that means anything."""
        for level in self._levels.values():
            yield from level.hot
            for queue in level.turns:
                yield from queue

    def _level(self, task: TaskRecord) -> _Level:
        depth = task.owner.depth
        key = (task.options.priority, depth)
        level = self._levels.get(key)
        if level is None:
            level = self._levels[key] = _Level(depth > 0)
            self._keys.append(key)
            self._keys.sort()
        return level
