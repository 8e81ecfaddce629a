"""A broker that goes on with the journal of one before it.

Its table is as the journal tells (`core.journal`). What only workers know they tell when they come
back (`core.resync`); until they are back, or were waited for in vain, nothing is placed: it
settles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core.journal import Entry, JournalWriter, replay, settle, snapshot
from zfabric.core.locks import Locks
from zfabric.core.scheduler import Scheduler
from zfabric.core.session import Session
from zfabric.core.session_record import SessionRecord, saved_session


class Restart:
    """What was there before, and what of it is still waited for."""

    def __init__(
        self,
        scheduler: Scheduler,
        locks: Locks,
        saved: Iterable[Entry],
        generation: int,
        settings: Settings,
        now: float,
    ) -> None:
        """Fill an empty scheduler, and the locks. Raises JournalDamaged."""
        restored = replay(scheduler, locks, saved, generation)
        scheduler.table.pause_retries(now)
        self.journal = JournalWriter(scheduler.table)
        self.sessions = restored.sessions
        """Of clients, as they were."""
        self.next_number = restored.next_number
        self.expected = restored.workers
        """Workers that were here before the restart and are not back yet."""
        self._away: dict[int, tuple[int, float]] = {}
        """Tokens of workers that were given up and may be back with rows that may run once, with
        their numbers and until when. To the journal they are here: a next broker waits for them."""
        self._scheduler = scheduler
        self._locks = locks
        self._begun_before = restored.started
        """Tasks that a broker before this one sent to workers, and that may not run again."""
        self._settle_at = now + settings.settle_s

    def records(self, epoch: int, settings: Settings, now: float) -> Iterator[SessionRecord]:
        """The sessions of clients, which are gone until they come back."""
        for old in self.sessions:
            hello = m.Hello(m.CLIENT, old.name, "", "", "", 0, depth=old.depth, run=old.run)
            session = Session(old.token, epoch, settings=settings, now=now)
            session.received = old.received
            record = SessionRecord(old.number, old.name, hello, session)
            record.user = old.user
            record.gone_at = now
            record.is_restored = True
            yield record

    def came_back(self, record: SessionRecord, message: m.Inventory) -> None:
        """A session has told a part of what it has; a worker is back with the last one."""
        if record.hello.role == m.WORKER and message.credit:
            previous = record.hello.previous
            known = self.expected.pop(previous, None) or self._away.pop(previous, None)
            if known is not None:
                self.journal.left(previous)  # else the next broker waits for it again

    def left(self, token: int, number: int, until: float) -> None:
        """A worker's session is over.  until: when nobody waits for that worker any more."""
        if until and self._scheduler.table.in_doubt:
            self._away[token] = number, until
        else:
            self.journal.left(token)

    def tick(self, now: float) -> None:
        """Workers that have not come back in time will not."""
        for token, (_, until) in list(self._away.items()):
            if until <= now:
                del self._away[token]
                self.journal.left(token)

    def is_over(self, now: float) -> bool:
        """Whether nobody is waited for any more."""
        return not self.expected or now >= self._settle_at

    def settle(self, now: float) -> str:
        """Workers that are not back will not come. Returns a warning, "" if all are back."""
        text = ""
        if self.expected:
            text = f"{len(self.expected)} workers did not come back; what they had runs again"
        for token in self.expected:
            self.journal.left(token)
        self.expected = {}
        settle(self._scheduler.table, self._begun_before)
        self._begun_before.clear()
        self._scheduler.settled(now)
        return text

    def snapshot(self, records: Iterable[SessionRecord]) -> Iterator[Entry]:
        """All that a journal has to hold, in place of what it holds now."""
        clients = self._scheduler.clients
        saved = []
        workers = []
        for record in records:
            if record.hello.role == m.CLIENT:
                saved.append(saved_session(record, clients[record.number].counter))
            else:
                workers.append((record.session.token, record.number))
        # Workers that are still waited for count as being here.
        workers.extend(self.expected.items())
        workers.extend((token, number) for token, (number, _) in self._away.items())
        return snapshot(self._scheduler.table, self._locks, saved, workers, self._begun_before)
