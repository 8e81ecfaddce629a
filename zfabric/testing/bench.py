"""A scheduler on a bench: one event at a time, and everything that it says because of it.

Each message passes through the wire in both directions, and the invariants are checked after
each event and each turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from zfabric import ids, wire
from zfabric import messages as m
from zfabric.config import DEFAULTS, Settings
from zfabric.core import invariants
from zfabric.core.placement import WorkerRecord
from zfabric.core.scheduler import Scheduler
from zfabric.core.tasks import TaskRecord

FN = 7
FUNCTION = (FN, "f", b"blob of f")


class Said(list[tuple[int, m.Message]]):
    """(number of a peer, message), in order. Messages are tuples, and equal to those of another
    kind with the same fields; here the kinds count too."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list) or not super().__eq__(other):
            return False
        return all(type(ours[1]) is type(theirs[1]) for ours, theirs in zip(self, other))

    __hash__ = None


def through_wire(message: Any) -> Any:
    """The message as the other end reads it."""
    seq = 1 if wire.is_sequenced(message) else 0
    return wire.decode([bytes(frame) for frame in wire.encode(message, 1, 1, seq)])[1]


class Bench:
    """Clients have numbers below 100, workers above. Tasks are numbered from 1 by whoever uses
    the bench; `tid` gives their ids. The first Submit of a client carries FUNCTION."""

    def __init__(self, settings: Settings = DEFAULTS) -> None:
        self.scheduler = Scheduler(settings, 0.0)
        self.now = 0.0
        self._taught: set[int] = set()

    # --- peers --------------------------------------------------------------------------------

    def client(self, number: int = 1, depth: int = 0) -> int:
        self.scheduler.client_joined(number, f"client-{number}", depth)
        return number

    def worker(
        self,
        number: int = 101,
        slots: int = 1,
        *,
        credit: int | None = None,
        resources: dict[str, float] | None = None,
    ) -> int:
        worker = WorkerRecord(
            number,
            f"worker-{number}",
            slots,
            resources=resources,
            data_address=f"ipc://{number}",
            host="host",
            pid=number,
            now=self.now,
        )
        if credit is not None:
            worker.credit = credit
        self.scheduler.worker_joined(worker, self.now)
        invariants.check(self.scheduler)
        return number

    def client_left(self, number: int = 1) -> Said:
        self.scheduler.client_left(number)
        return self.turn()

    def worker_left(self, number: int = 101, why: str = "it was killed") -> Said:
        self.scheduler.worker_left(number, why, self.now, may_return=True)
        return self.turn()

    # --- events -------------------------------------------------------------------------------

    def say(self, number: int, message: m.Message) -> Said:
        """One message from a peer, and the turn that follows."""
        self.hear(number, message)
        return self.turn()

    def hear(self, number: int, message: m.Message) -> None:
        """One message from a peer, in a turn that goes on."""
        self.scheduler.on_message(number, through_wire(message), self.now)
        invariants.check(self.scheduler)

    def turn(self) -> Said:
        """The end of a turn: (number of a peer, message), in order."""
        invariants.check(self.scheduler)
        said = Said((number, through_wire(message)) for number, message in self.scheduler.flush())
        invariants.check(self.scheduler)
        return said

    def tick(self, seconds: float = 0.0) -> Said:
        self.now += seconds
        self.scheduler.tick(self.now)
        return self.turn()

    # --- messages of clients ------------------------------------------------------------------

    def submit(
        self,
        *numbers: int,
        client: int = 1,
        deps: dict[int, Sequence[int]] | None = None,
        options: dict[int, m.TaskOptions] | None = None,
        payload: bytes = b"args",
    ) -> Said:
        """Tasks by their numbers; deps and options by number too."""
        deps, options = deps or {}, options or {}
        functions = [] if client in self._taught else [FUNCTION]
        self._taught.add(client)
        return self.say(
            client,
            m.Submit(
                functions,
                [tid(n, client) for n in numbers],
                [FN] * len(numbers),
                [payload] * len(numbers),
                [
                    (r, [_id(d, client) for d in deps[n]])
                    for r, n in enumerate(numbers)
                    if n in deps
                ],
                [(row, options[n]) for row, n in enumerate(numbers) if n in options],
            ),
        )

    def release(self, *numbers: int, client: int = 1) -> Said:
        return self.say(client, m.Release([tid(n, client) for n in numbers]))

    def cancel(self, *numbers: int, client: int = 1) -> Said:
        return self.say(client, m.Cancel([tid(n, client) for n in numbers]))

    def retry(self, *numbers: int, client: int = 1) -> Said:
        return self.say(client, m.Retry([tid(n, client) for n in numbers]))

    # --- messages of workers ------------------------------------------------------------------

    def ended(
        self,
        *numbers: int,
        worker: int = 101,
        status: int = m.VALUE,
        payload: bytes = b"value",
        credit: int = 2,
        attempt: int | None = None,
    ) -> Said:
        """Rows that ended, as their live attempts unless told otherwise."""
        rows = [_id(n, 1) for n in numbers]
        attempts = [attempt or self.scheduler.tasks[row].attempt for row in rows]
        done = m.Done(rows, attempts, bytes([status] * len(rows)), [payload] * len(rows), credit)
        return self.say(worker, done)

    def stored(self, *numbers: int, worker: int = 101, nbytes: int = 1 << 20) -> Said:
        payload = nbytes.to_bytes(8, "little")
        return self.ended(*numbers, worker=worker, status=m.STORED, payload=payload)

    def returned(
        self, *numbers: int, worker: int = 101, credit: int = 2, attempt: int | None = None
    ) -> Said:
        rows = [_id(n, 1) for n in numbers]
        attempts = [attempt or self.scheduler.tasks[row].attempt for row in rows]
        return self.say(worker, m.Returned(rows, attempts, credit))

    # --- looking ------------------------------------------------------------------------------

    def task(self, number: int, client: int = 1) -> TaskRecord:
        return self.scheduler.tasks[_id(number, client)]

    def states(self, *numbers: int) -> list[int | None]:
        """None for a task that is gone."""
        found = [self.scheduler.tasks.get(_id(n, 1)) for n in numbers]
        return [None if task is None else task.state for task in found]


def tid(number: int, client: int = 1) -> int:
    """The id of a client's task."""
    return ids.task_id(client, number)


def _id(number: int, client: int) -> int:
    """Numbers that are too large for a task's are ids already."""
    return number if number >> ids.COUNTER_BITS else tid(number, client)


def run(
    *numbers: int,
    attempt: int = 1,
    functions: Iterable[tuple[int, str, bytes]] = (),
    deps: Sequence[tuple[int, list[m.Dependency]]] = (),
    payload: bytes = b"args",
    client: int = 1,
) -> m.Run:
    """A Run as a worker would read it. deps: (place in numbers, dependencies)."""
    rows = [_id(n, client) for n in numbers]
    n = len(rows)
    return m.Run(list(functions), rows, [attempt] * n, [FN] * n, [payload] * n, list(deps))


def results(
    *numbers: int, status: int = m.VALUE, payload: bytes = b"value", client: int = 1
) -> m.Results:
    """A Results as a client would read it."""
    rows = [_id(n, client) for n in numbers]
    return m.Results(rows, bytes([status] * len(rows)), [payload] * len(rows))
