"""Which worker gets a task.

The holder of most input bytes, unless it is much fuller than the idlest; otherwise the emptiest.
A worker holds at most as many rows as the credit that it announced, so nothing piles up where it
would have to be taken back.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace
from typing import Any

from zfabric.core.tasks import TaskRecord
from zfabric.messages import Dependency, TaskOptions

MUCH_FULLER = 2.0
"""Rows per slot by which a holder may be fuller than the idlest worker and still be preferred:
moving bytes costs more than waiting behind two short rows."""

FEW_BYTES = 64 * 1024
"""Inputs below this move faster than it takes to wait for anybody."""


Ending = dict[tuple[int, int], dict[str, float]]
"""Attempts of rows, and the resources that they occupy."""


class WorkerRecord:
    """A worker session, and the rows that go out to it at the end of this turn."""

    __slots__ = (
        "attempts",
        "credit",
        "data_address",
        "deps",
        "drops",
        "ending",
        "fns",
        "forgets",
        "former",
        "frees",
        "functions",
        "gives",
        "host",
        "ids",
        "is_full",
        "known",
        "last_done",
        "limits",
        "load",
        "n_beats",
        "n_done",
        "name",
        "number",
        "payloads",
        "pid",
        "recall_sent",
        "reserved",
        "resources",
        "rows",
        "slots",
        "suspect",
        "threads",
        "unclear",
        "used",
        "values",
    )

    def __init__(
        self,
        number: int,
        name: str,
        slots: int,
        *,
        threads: bool = False,
        resources: dict[str, float] | None = None,
        data_address: str = "",
        host: str = "",
        pid: int = 0,
        now: float = 0.0,
    ) -> None:
        self.number = number
        self.name = name
        self.slots = slots
        self.threads = threads
        self.resources = resources or {}
        self.used: dict[str, int] = {}
        """Of each resource, in millionths."""
        self.data_address = data_address
        self.host = host
        self.pid = pid
        self.credit = 2 * slots
        """Rows that it is willing to hold; its own word from its first Done on."""
        self.rows: dict[int, TaskRecord] = {}
        """What it holds, in the order of assignment."""
        self.ending: Ending = {}
        """(id, attempt) of rows that it was told to drop, with the resources that they occupy
        until it says that they have ended. Only those that occupy any."""
        self.unclear: set[tuple[int, int]] = set()
        """(id, attempt) of rows from before a restart of the broker that are ending. Nobody knows
        what they occupy, so all that is left is `reserved` until the last of them has ended."""
        self.reserved: dict[str, float] = {}
        self.former: Ending | None = {}
        """The same of its session before this one, until it has told what it has; None: it had that
        with a broker before this one. Of a worker that left: of all its rows that occupy any, or
        may run once only."""
        self.values: set[int] = set()
        """Ids of the values that are in its store."""
        self.known: dict[int, None] = {}
        """Ids of the functions that it has, oldest first."""
        self.suspect = False
        self.is_full = False
        """It has yet to take in what is on its way to it."""
        self.n_done = 0
        self.last_done = now
        self.recall_sent = False
        self.load: tuple[int, ...] = ()
        """What its last beat said; see messages.Beat."""
        self.n_beats = 0
        self.ids: list[int] = []
        self.attempts: list[int] = []
        self.fns: list[int] = []
        self.payloads: list[bytes] = []
        self.deps: list[tuple[int, list[Dependency]]] = []
        self.limits: list[tuple[int, float]] = []
        self.functions: list[tuple[int, str, bytes]] = []
        self.drops: list[int] = []
        self.frees: list[int] = []
        self.gives: list[tuple[int, bytes]] = []
        self.forgets: list[int] = []

    @property
    def free(self) -> int:
        """Rows that it would still take."""
        return 0 if self.suspect or self.is_full else self.credit - len(self.rows)

    def may_ever_run(self, options: TaskOptions) -> bool:
        """Whether it could run such a task if it were empty."""
        if options.workers and self.name not in options.workers:
            return False
        have = self.resources
        return all(have.get(name, 0) >= amount for name, amount in options.resources.items())

    def can_run_now(self, options: TaskOptions) -> bool:
        """Whether such a task fits beside what it holds."""
        if self.free <= 0 or not self.may_ever_run(options):
            return False
        have, used = self.resources, self.used
        return all(
            _micro(have.get(name, 0)) - used.get(name, 0) >= _micro(amount)
            for name, amount in options.resources.items()
        )

    def reserve(self) -> None:
        """All that nobody uses is in use, by rows that are `unclear`."""
        self.reserved = {
            name: (_micro(amount) - self.used.get(name, 0)) / 1_000_000
            for name, amount in self.resources.items()
        }
        self.occupy(self.reserved, 1)

    def occupy(self, resources: dict[str, float], sign: int) -> None:
        """Count amounts as in use (sign 1) or free again (sign -1)."""
        for name, amount in resources.items():
            self.used[name] = self.used.get(name, 0) + sign * _micro(amount)


def _micro(amount: float) -> int:
    """Millionths, as whole numbers: 0.1 + 0.2 + 0.3 given back in another order is not 0 for
    floats, and a task that needs all of it would wait for ever."""
    return round(amount * 1_000_000)


def fullness(worker: WorkerRecord) -> float:
    """Rows per slot."""
    return len(worker.rows) / worker.slots


def emptiest(workers: Iterable[WorkerRecord]) -> WorkerRecord | None:
    """The worker with fewest rows per slot among those with credit left."""
    best = None
    least = 0.0
    for worker in workers:
        if worker.free > 0:
            full = len(worker.rows) / worker.slots
            if best is None or full < least:
                best, least = worker, full
    return best


def preferred(task: TaskRecord, idlest: WorkerRecord) -> WorkerRecord | None:
    """The worker that holds most bytes of a task's inputs, if going there is worth it."""
    held: dict[WorkerRecord, int] = {}
    for dep in task.deps:
        if dep.holders and dep.nbytes > FEW_BYTES:
            for worker in dep.holders:
                held[worker] = held.get(worker, 0) + dep.nbytes
    if not held:
        return None
    best = max(held, key=lambda w: (held[w], -len(w.rows), -w.number))
    if best.free > 0 and fullness(best) <= fullness(idlest) + MUCH_FULLER:
        return best
    return None


def signature(options: TaskOptions) -> tuple[Any, ...] | None:
    """What restricts where a task may run; None when nothing does."""
    if not options.workers and not options.resources:
        return None
    return options.workers, tuple(sorted(options.resources.items()))


class EmptiestFirst:
    """Workers with credit, emptiest first, kept in order while they fill."""

    __slots__ = ("_heap",)

    def __init__(self, workers: Iterable[WorkerRecord]) -> None:
        self._heap = [(len(w.rows) / w.slots, w.number, w) for w in workers]
        heapify(self._heap)

    def first(self) -> WorkerRecord | None:
        """The emptiest worker that still has credit; None when all are full."""
        heap = self._heap
        while heap:
            full, number, worker = heap[0]
            if worker.free <= 0:
                heappop(heap)
            elif (now := len(worker.rows) / worker.slots) != full:
                heapreplace(heap, (now, number, worker))
            else:
                return worker
        return None
