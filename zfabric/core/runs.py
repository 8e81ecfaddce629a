"""Named runs: clients' sessions that outlive the process they began in.

A run is a session with a name. It has one number all its life, from which the ids of all its tasks
are made, and one token after the other: whoever attaches to it gets its tasks, and the holder
before is not known any more, whatever it still says. Where the session of another client would
end, that of a run is *parked*: nothing is kept for the wire, and ends of tasks wait in the table
until somebody attaches, or until the last holder says Hello again with its token.

Only tasks with a key outlive their holder, as nobody else could name the others: those are
released when it says Bye, and when another one attaches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core.scheduler import Scheduler
from zfabric.core.session import Session
from zfabric.core.session_record import SessionRecord
from zfabric.core.tasks import UNFINISHED, TaskRecord

PAGE = 2000
"""Tasks per answer."""

PAGE_NBYTES = 1 << 20

MARGIN = 1 << 20
"""Ids that a holder may have made before it was killed, and that the broker has not seen."""


class Runs:
    """The runs of one broker."""

    def __init__(self, scheduler: Scheduler, settings: Settings) -> None:
        self.by_name: dict[str, SessionRecord] = {}
        self.parked: dict[int, SessionRecord] = {}
        """Of these those that nobody holds, by the token of the last holder."""
        self._scheduler = scheduler
        self._settings = settings
        self._listing: dict[int, list[int]] = {}
        """Of a run whose holder turns the pages: ids of its tasks with keys, rising."""

    def begin(self, record: SessionRecord, counter: int = 0) -> None:
        """A session with a name. counter: that its next task may have."""
        self.by_name[record.hello.run] = record
        client = self._scheduler.clients[record.number]
        client.counter = max(counter, client.counter or 0)

    def why_not(self, hello: m.Hello, user: str, now: float) -> m.Refuse | None:
        """Why that client cannot have that run; None: it can."""
        record = self.by_name.get(hello.run)
        if record is None:
            return None
        if record.user != user:
            return m.Refuse("run", f"the run {hello.run!r} belongs to another key")
        silent_s = now - record.session.last_heard
        if record.peer is not None and silent_s < self._settings.suspect_s:
            return m.Refuse(
                "run",
                f"the run {hello.run!r} is held by client {record.name!r} (pid {record.hello.pid} "
                f"on {record.hello.host}): it has to detach first",
            )
        return None

    def may_come_back(self, hello: m.Hello, user: str, now: float) -> bool:
        """Whether the holder's connection has only just broken, or the broker only just begun: one
        who wants the run then is not answered, and says Hello again until this is decided."""
        record = self.by_name.get(hello.run)
        if record is None or record.user != user or record.gone_at is None:
            return False
        if record.session.token in self.parked:
            return False
        restarted = record.is_restored and not record.resumed
        patience = self._settings.settle_s if restarted else self._settings.grace_s
        return now - record.gone_at < patience

    def park(self, record: SessionRecord, now: float) -> None:
        """Its holder has left, or is given up."""
        old = record.session
        assert isinstance(old, Session)
        self._fresh(record, old.token, now).received = old.received
        record.is_restored = True
        record.resumed = False
        self.parked[old.token] = record

    def unpark(self, token: int) -> SessionRecord | None:
        """The holder of that token comes back to it."""
        return self.parked.pop(token, None)

    def take(self, record: SessionRecord, hello: m.Hello, token: int, now: float) -> None:
        """A client attaches to it. The caller has forgotten the token before."""
        self._fresh(record, token, now)
        record.hello = hello
        record.gone_at = None
        record.is_restored = False
        record.resumed = True
        client = self._scheduler.clients[record.number]
        client.functions.clear()
        client.counter = (client.counter or 0) + MARGIN

    def _fresh(self, record: SessionRecord, token: int, now: float) -> Session:
        session = Session(token, record.session.epoch, settings=self._settings, now=now)
        record.session = session
        self._listing.pop(record.number, None)
        record.peer = None
        record.peers = []
        record.gone_at = now
        client = self._scheduler.clients[record.number]
        client.held_back = True
        client.is_full = False
        client.ids, client.statuses, client.payloads = [], bytearray(), []
        self._scheduler.table.dirty_clients.pop(client, None)
        return session

    def end(self, record: SessionRecord) -> None:
        """It is over."""
        del self.by_name[record.hello.run]
        self._listing.pop(record.number, None)
        self.parked.pop(record.session.token, None)

    # --- what is in them ------------------------------------------------------------------------

    def nameless(self, record: SessionRecord) -> list[int]:
        """Tasks that nobody but its holder could name."""
        number = record.number
        return [
            task.id
            for task in self._scheduler.tasks.values()
            if task.owner.number == number and task.wanted and not task.options.key
        ]

    def page(self, record: SessionRecord, after: str) -> Sequence[tuple[int, str, int]]:
        """(id, key, function's id) of its tasks with keys, by rising ids, from behind one on.
        Empty behind the last."""
        first = int(after) if after.isdecimal() else -1
        ids = self._listing.get(record.number)
        if ids is None or first < 0:
            ids = self._listing[record.number] = self._with_keys(record.number)
        tasks = self._scheduler.tasks
        found: list[tuple[int, str, int]] = []
        room = PAGE_NBYTES
        for place in range(bisect_right(ids, first), len(ids)):
            task = tasks.get(ids[place])
            if task is None or not task.wanted:
                continue  # released since the first page
            room -= 32 + 4 * len(task.options.key)
            if found and (room < 0 or len(found) >= PAGE):
                return found
            found.append((task.id, task.options.key, task.fn.id if task.fn else 0))
        if not found:
            self._listing.pop(record.number, None)
        return found

    def _with_keys(self, number: int) -> list[int]:
        return sorted(
            task.id
            for task in self._scheduler.tasks.values()
            if task.owner.number == number and task.wanted and task.options.key
        )

    def listed(self, user: str, now: float) -> list[dict[str, Any]]:
        """All runs of that user, for people."""
        told = []
        by_owner: dict[int, list[TaskRecord]] = {}
        for task in self._scheduler.tasks.values():
            by_owner.setdefault(task.owner.number, []).append(task)
        for name, record in self.by_name.items():
            if record.user != user:
                continue
            tasks = by_owner.get(record.number, [])
            gone_at = record.gone_at
            told.append(
                {
                    "name": name,
                    "holder": record.name if record.peer is not None else "",
                    "host": record.hello.host,
                    "pid": record.hello.pid,
                    "left_s": 0.0 if gone_at is None else round(now - gone_at, 3),
                    "tasks": len(tasks),
                    "unfinished": sum(task.state in UNFINISHED for task in tasks),
                }
            )
        return told
