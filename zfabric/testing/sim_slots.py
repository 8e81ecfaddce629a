"""Slots without processes: rows take virtual time, and end as their arguments say.

A row's arguments are msgpack of [seconds, behaviour, large, salt]. Its value is a digest of its
function, its arguments and its inputs, so that whoever asked for it can tell whether it is right.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from msgpack import packb, unpackb

from zfabric.core.supervisor_effects import SKIPPED
from zfabric.errors import InternalError
from zfabric.messages import ERROR, STORED, VALUE
from zfabric.testing.sim_net import NEVER

HOP_S = 50e-6
"""From a slot to its supervisor."""

REPORT_S = 0.001
"""A slot keeps finished rows to itself for so long, unless it runs dry."""

GOOD, RAISES, FLAKY, DIES, POISON, BLOCKS, ONCE, ONCE_DIES = range(8)

READY, RESET_DONE, BLOCKED, UNBLOCKED, CLOSED = "ready", "reset", "blocked", "unblocked", "closed"


class SimValue(NamedTuple):
    """A value in a store: its size as everybody is told, and what it is known by."""

    nbytes: int
    data: bytes


def arguments(seconds: float, behaviour: int, large: bool, salt: int) -> bytes:
    """A row's payload."""
    packed: bytes = packb([seconds, behaviour, large, salt])
    return packed


def digest(blob: bytes, payload: bytes, values: Sequence[bytes]) -> bytes:
    """The value of a call."""
    state = hashlib.blake2b(digest_size=8)
    for part in (blob, payload, *values):
        state.update(b"%d:" % len(part))
        state.update(part)
    return state.digest()


class Running(NamedTuple):
    """A row that runs. values: None when one that it should have followed is not there."""

    row: Sequence[Any]
    values: list[bytes] | None
    spec: list[Any]
    begin: float
    end: float


class SimSlot:
    """One slot. Times are virtual seconds.  may_fail: now and then it does not even start.
    begun: (task, attempt) of all rows that any slot of the fabric ever began.
    """

    def __init__(
        self,
        rng: random.Random,
        now: float,
        may_fail: bool = True,
        begun: set[tuple[int, int]] | None = None,
    ) -> None:
        self._begun = set() if begun is None else begun
        self._rng = rng
        self._functions: dict[int, bytes] = {}
        self._queue: deque[tuple[Sequence[Any], list[Any]]] = deque()
        self._kept: dict[int, bytes] = {}
        self._running: Running | None = None
        self._batch: list[tuple[int, Any, int]] = []
        self._batch_at = 0.0
        self._busy_s = 0.0
        self._outbox: deque[tuple[float, Any]] = deque()
        self._ready_at = now + rng.choice([0.001, 0.05])
        self._unblock_at = NEVER
        self._fails = may_fail and rng.random() < 0.02
        self._must_answer = False
        self.resetting = False
        """Rows were taken back, and the supervisor has not heard that this slot knows."""
        self.dead = False
        self.blocked = False

    # --- what the supervisor does -------------------------------------------------------------

    def send_rows(
        self,
        functions: Sequence[tuple[int, str, bytes]],
        rows: Sequence[Any],
        store: Any,
        now: float,
    ) -> None:
        """Raises KeyError when a value that is promised is not in the store."""
        assert self.dead or not self.resetting, "rows for a slot that does not know of its reset"
        for fn, _, blob in functions:
            self._functions[fn] = blob
        for row in rows:
            assert row[2] in self._functions, "a row calls what the slot does not have"
            values = [
                store[value[0]].data if type(value) is tuple else value
                for value in (row[4] if len(row) > 4 else ())
            ]
            self._queue.append((row, values))
        self.advance(now)

    def take_back(self, most: int, now: float) -> int:
        """How many of the rows sent last are not this slot's any more."""
        self.advance(now)
        taken = min(most, len(self._queue))
        for _ in range(taken):
            self._queue.pop()
        if taken and not self.resetting and not self.dead:
            self.resetting = self._must_answer = True
            self.advance(now)
        return taken

    def forget(self, fns: Sequence[int]) -> None:
        for fn in fns:
            self._functions.pop(fn, None)

    def peek(self) -> tuple[bytes, list[Any], float, list[int]] | None:
        """Rows that are finished and not on their way, unless others are."""
        if not self._batch or any(type(event) is tuple for _, event in self._outbox):
            return None
        statuses, payloads, _, ids = self._take_batch()
        return statuses, payloads, 0.0, ids

    def is_settled(self, now: float) -> bool:
        """Whether it keeps nothing to itself and reports as soon as the running row ends."""
        running = self._running
        return not self._batch and running is not None and now - running.begin > REPORT_S

    def read(self, now: float) -> list[Any]:
        """What has arrived: READY and the like, or (statuses, payloads, seconds)."""
        self.advance(now)
        events = []
        while self._outbox and self._outbox[0][0] <= now:
            events.append(self._outbox.popleft()[1])
        if RESET_DONE in events:
            self.resetting = False
        return events

    def due(self) -> float:
        """When something happens next."""
        due = self._outbox[0][0] if self._outbox else NEVER
        if self.dead:
            return due
        due = min(due, self._ready_at, self._unblock_at)
        if self._running is not None:
            due = min(due, self._running.end)
        return due

    def kill(self, now: float) -> None:
        """Its process dies."""
        if not self.dead:
            self.dead = True
            self._say(now, CLOSED)

    @property
    def is_running(self) -> bool:
        """Whether it was in the middle of a row when it died."""
        return self._running is not None

    @property
    def running(self) -> int:
        """The id of its row, which holds what it has until its process is known to be dead; 0 for
        none."""
        return 0 if self._running is None else self._running.row[0]

    def age_s(self, now: float) -> float | None:
        """For how long its row has run; None: it has none."""
        return None if self._running is None else now - self._running.begin

    # --- its own life -------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Live until now."""
        if self.dead:
            return
        if self._ready_at <= now:
            at, self._ready_at = self._ready_at, NEVER
            if self._fails:
                self.kill(at)
                return
            self._say(at, READY)
        if self._unblock_at <= now:
            at, self._unblock_at = self._unblock_at, NEVER
            self.blocked = False
            self._say(at, UNBLOCKED)
        if self._ready_at != NEVER:
            return
        clock = now
        while not self.dead:
            running = self._running
            if running is not None:
                if running.end > now:
                    return
                clock = running.end
                self._finish(running, clock)
                if self.dead:
                    return
            if not self._queue:
                self._report(clock)
                if self._must_answer:
                    # Only now: what was sent before the reset has been run or passed over.
                    self._must_answer = False
                    self._say(clock, RESET_DONE)
                return
            if self._batch and clock - self._batch_at >= REPORT_S:
                self._report(clock)
            self._begin(clock)

    def _begin(self, clock: float) -> None:
        row, places = self._queue.popleft()
        values: list[bytes] | None = []
        for place in places:
            value = self._kept.pop(place, None) if type(place) is int else place
            if value is None or values is None:
                values = None
            else:
                values.append(value)
        if values is None:
            self._running = Running(row, None, [0.0, GOOD, False, 0], clock, clock)
            return
        if (row[0], row[1]) in self._begun:
            raise InternalError(f"attempt {row[1]} of task {row[0]:x} is begun a second time")
        self._begun.add((row[0], row[1]))
        spec = unpackb(row[3] or values[-1])
        seconds, behaviour = spec[0], spec[1]
        if behaviour in (ONCE, ONCE_DIES):
            if (row[0], -1) in self._begun:
                raise InternalError(f"{row[0]:x} must not run twice, and begins again")
            self._begun.add((row[0], -1))
        if behaviour == BLOCKS:
            self.blocked = True
            self._say(clock, BLOCKED)
            self._unblock_at = clock + seconds
            seconds += 1e-5
        self._running = Running(row, values, spec, clock, clock + seconds)

    def _finish(self, running: Running, clock: float) -> None:
        row, values, (seconds, behaviour, large, _), begin, _ = running
        if behaviour == POISON or (behaviour in (DIES, ONCE_DIES) and self._rng.random() < 0.4):
            self.kill(clock)
            return
        if self._unblock_at <= clock:
            self._unblock_at = NEVER
            self.blocked = False
            self._say(clock, UNBLOCKED)
        self._running = None
        if not self._batch:
            self._batch_at = clock
        self._busy_s += seconds
        payload: Any = b""
        if values is None:
            status = SKIPPED
        elif behaviour == RAISES or (behaviour == FLAKY and self._rng.random() < 0.4):
            status, payload = ERROR, b"raised"
        else:
            status = VALUE
            payload = digest(self._functions[row[2]], row[3], values)
            if len(row) > 4 and row[5] and not large:
                self._kept[row[0]] = payload
            if large:
                status, payload = STORED, SimValue(1 << 20, payload)
        self._batch.append((status, payload, row[0]))
        if clock - begin > REPORT_S:
            self._report(clock)

    def _report(self, clock: float) -> None:
        if self._batch:
            self._say(clock, self._take_batch())

    def _take_batch(self) -> tuple[bytes, list[Any], float, list[int]]:
        batch, busy_s = self._batch, self._busy_s
        self._batch, self._busy_s = [], 0.0
        statuses = bytes(status for status, _, _ in batch)
        return statuses, [blob for _, blob, _ in batch], busy_s, [id_ for _, _, id_ in batch]

    def _say(self, clock: float, event: Any) -> None:
        self._outbox.append((clock + HOP_S, event))
