"""How sessions begin and end in a broker, and who goes on with a named run.

A session begins with a Hello and ends with a Bye, or when `core.broker` gives it up. That of a
named run is *parked* where another would end, and a client that attaches to the run takes it over
(`core.runs`). What other rooms keep of a session, the scheduler, locks, open questions, quotas and
the journal, they hear from here that it began and that it is over.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core.admission import REVOKED, Admission
from zfabric.core.direct import DirectSession
from zfabric.core.greeting import why_not
from zfabric.core.journal import JournalWriter
from zfabric.core.locks import Locks
from zfabric.core.placement import Ending
from zfabric.core.questions import Questions
from zfabric.core.restart import Restart
from zfabric.core.runs import Runs
from zfabric.core.scheduler import Scheduler
from zfabric.core.session import Session
from zfabric.core.session_record import Peer, SessionRecord, saved_session, worker_record
from zfabric.core.switchboard import Switchboard
from zfabric.errors import RemoteProtocolError
from zfabric.wire import Header

FORMER_KEPT = 1024
"""Workers that are gone, and of which is remembered what their rows occupy."""


class Reception:
    """Lets peers in, and sees them off."""

    def __init__(
        self,
        board: Switchboard,
        scheduler: Scheduler,
        runs: Runs,
        locks: Locks,
        questions: Questions,
        *,
        settings: Settings,
        admission: Admission | None,
        version: str,
        python: str,
        first_number: int,
    ) -> None:
        """first_number: of the first session."""
        self.journal: JournalWriter | None = None
        self._board = board
        self._scheduler = scheduler
        self._runs = runs
        self._locks = locks
        self._questions = questions
        self._settings = settings
        self._admission = admission
        self._version = version
        self._python = python
        self._next_number = first_number
        self._former: dict[int, Ending | None] = {}
        """By the tokens of workers that left, oldest first; only of those with any."""
        self._restart: Restart | None = None

    def restore(self, restart: Restart, now: float) -> None:
        """Go on where the journal ends. Peers come back by themselves."""
        board = self._board
        self._restart = restart
        self.journal = restart.journal
        for record in restart.records(board.epoch, self._settings, now):
            if self._admission is not None and record.user:
                self._admission.opened(record.user)
            board.add(record)
            if record.hello.run:
                self._runs.begin(record)
        self._next_number = restart.next_number
        if restart.sessions:
            n_tasks = len(self._scheduler.tasks)
            text = f"{len(restart.sessions)} clients, {n_tasks} tasks restored"
            board.log.append((logging.INFO, text))

    # --- they begin ---------------------------------------------------------------------------

    def attach(self, hello: m.Hello, token: int, now: float) -> SessionRecord:
        """A worker in this very process: a session without a wire, for as long as we live."""
        record = self._add(hello, DirectSession(token, self._board.epoch), now)
        self._welcome(record)
        return record

    def hello(self, peer: Peer, header: Header, hello: m.Hello, now: float) -> None:
        """A peer wants a session: a new one, or that which it had."""
        board = self._board
        record = board.sessions.get(header.token) or self._unparked(peer, header.token)
        if record is not None:  # our Welcome was lost, or is on its way
            self._hello_again(record, peer, hello, now)
            return
        is_over = board.is_over(header.token)
        if is_over or (hello.role == m.CLIENT and hello.previous):
            board.refuse_unknown(peer, header.token, False, now)
            return
        admission = self._admission
        user = "" if admission is None else admission.identify(peer)
        refusal = self._why_not(peer, header, hello, user, now)
        if refusal is None and hello.run and self._runs.may_come_back(hello, user, now):
            return
        if refusal is not None:
            board.counts[f"refused:{refusal.code}"] += 1
            text = f"refused {hello.role} {hello.name!r} ({refusal.code}): {refusal.text}"
            board.log.append((logging.WARNING, text))
            board.reply(peer, header.token, refusal)
            return
        before = board.sessions.get(hello.previous)
        if (
            before is not None
            and hello.role == m.WORKER == before.hello.role
            and before.user == user
        ):
            self.end(before, "it begins again", now, may_return=True)
        session = Session(header.token, board.epoch, settings=self._settings, now=now)
        run = self._runs.by_name.get(hello.run) if hello.run else None
        record = self._add(hello, session, now, user) if run is None else run
        former = board.routes.get(peer)
        if former is not None:  # one session per connection: its peer has given that one up
            board.lost(peer, now)
            if not former.peers:
                self.end(former, "its peer began another session", now)
        if run is not None:
            self._take_over(run, hello, header.token, now)
        elif admission is not None:
            record.user = user
            admission.opened(user)
            if hello.role == m.WORKER:
                session.post(m.Admit(admission.keys))
        if self.journal is not None:
            if hello.role == m.WORKER:
                self.journal.joined(header.token, record.number)
            else:
                client = self._scheduler.clients[record.number]
                self.journal.begin(saved_session(record, client.counter))
        if run is not None:
            self._release_nameless(run, now)
        board.heard_on(record, peer)
        self._welcome(record)

    def _hello_again(self, record: SessionRecord, peer: Peer, hello: m.Hello, now: float) -> None:
        """From a peer that has a session, perhaps since before this broker began."""
        if record.peer != peer:
            if not self._board.is_owner(record, peer):
                return
            self._board.heard_on(record, peer)
        if record.is_restored and not record.resumed:
            record.resumed = True
            session = record.session
            assert isinstance(session, Session)
            session.received = max(session.received, hello.acked)
            session.last_heard = now
            record.hello = hello._replace(run=record.hello.run)
            if not hello.previous:
                self._scheduler.client_was_never_told(record.number)
        self._welcome(record)

    def _why_not(
        self, peer: Peer, header: Header, hello: m.Hello, user: str, now: float
    ) -> m.Refuse | None:
        refusal = why_not(
            header,
            hello,
            version=self._version,
            python=self._python,
            next_number=self._next_number,
        )
        if self._admission is not None:  # the key first: whoever has none is told nothing else
            refusal = self._admission.why_not(user, hello.role) or refusal
        if refusal is None and hello.run:
            refusal = self._why_no_run(peer, hello, user, now)
        return refusal

    def _add(
        self,
        hello: m.Hello,
        session: Session | DirectSession,
        now: float,
        user: str = "",
    ) -> SessionRecord:
        board, scheduler = self._board, self._scheduler
        number = self._next_number
        self._next_number += 1
        name = board.free_name(_name_of(hello))
        record = SessionRecord(number, name, hello, session)
        board.add(record)
        if hello.role == m.WORKER:
            worker = worker_record(number, name, hello, now)
            worker.former = self._former.pop(hello.previous, {})
            if hello.previous and not board.is_over(hello.previous):
                worker.former = None  # it was with a broker before this one
            scheduler.worker_joined(worker, now)
            board.log.append((logging.INFO, f"worker {name} joined with {hello.slots} slots"))
        else:
            scheduler.client_joined(number, name, hello.depth, user)
            if hello.run:
                self._runs.begin(record)
            board.log.append((logging.INFO, f"client {name} joined"))
        return record

    def _welcome(self, record: SessionRecord) -> None:
        settings = self._settings
        counter = self._scheduler.clients[record.number].counter if record.hello.run else 0
        welcome = m.Welcome(
            record.number,
            record.name,
            self._version,
            settings.inline_limit,
            settings.beat_s,
            settings.dead_s,
            record.resumed,
            counter or 0,
        )
        self._board.say(record, welcome)
        if self.journal is not None and self.journal.trouble:
            # That it began is not written either.
            record.session.hold()
            if record.hello.role == m.CLIENT:
                self._board.say(record, m.Alarm(self.journal.trouble))

    # --- they end -----------------------------------------------------------------------------

    def bye(self, record: SessionRecord, now: float) -> None:
        """A peer leaves; a run stays, with all that has a key."""
        if record.hello.run:
            self._release_nameless(record, now)
        self.end(record, "said good-bye", now)

    def end(
        self,
        record: SessionRecord,
        why: str,
        now: float,
        *,
        for_good: bool = False,
        may_return: bool = False,
    ) -> None:
        """A session is over; the peer's later messages are answered with "unknown".

        That of a run is parked, but for good.  may_return: see Scheduler.worker_left.
        """
        board = self._board
        if not board.take_token(record.session.token):
            return
        if record.hello.run and not for_good:
            board.log.append((logging.INFO, f"nobody holds run {record.hello.run}: {why}"))
            board.unroute(record)
            self._give_up_locks(record)
            self._questions.client_left(record.number)
            self._runs.park(record, now)
            return
        board.forget(record)
        if self._admission is not None and record.user:
            self._admission.ended(record.user)
        board.unroute(record)
        if record.hello.run:
            self._runs.end(record)
        role = record.hello.role
        board.log.append((logging.INFO, f"{role} {record.name} left: {why}"))
        if self.journal is not None and role == m.CLIENT:
            self.journal.end(record.session.token)
        if role == m.WORKER:
            worker = self._scheduler.worker_left(record.number, why, now, may_return=may_return)
            if self._restart is not None:
                until = now + self._settings.dead_s if may_return else 0.0
                self._restart.left(record.session.token, record.number, until)
            if worker.former or worker.former is None:
                self._former[record.session.token] = worker.former
                if len(self._former) > FORMER_KEPT:
                    del self._former[next(iter(self._former))]
            board.post(self._questions.worker_left(record.number))
        else:
            self._scheduler.client_left(record.number)
            self._questions.client_left(record.number)
            board.post(self._locks.session_ended(record.number))

    def expel(self, record: SessionRecord, exc: RemoteProtocolError, now: float) -> None:
        """A peer broke the protocol: it is told, and its session is over."""
        if record.peer is not None:
            refusal = m.Refuse("protocol", str(exc))
            self._board.reply(record.peer, record.session.token, refusal)
        self.end(record, f"broke the protocol: {exc}", now)

    def admit(self, users: frozenset[str], keys: Sequence[bytes], now: float) -> None:
        """From now on the keys of these users are admitted, and no others: theirs are the only
        sessions that go on. Workers hear of it for their data doors."""
        admission, board = self._admission, self._board
        assert admission is not None
        if not admission.admit(users, keys):
            return
        for record in list(self._runs.parked.values()):
            if record.user not in users:
                board.sessions[record.session.token] = record
        for record in list(board.sessions.values()):
            if record.user and record.user not in users:
                if record.peer is not None:
                    board.reply(record.peer, record.session.token, m.Refuse("key", REVOKED))
                self.end(record, "its key was revoked", now, for_good=True)
            elif record.hello.role == m.WORKER:
                board.say(record, m.Admit(admission.keys))

    # --- runs ---------------------------------------------------------------------------------

    def end_run(self, record: SessionRecord, name: str, now: float) -> str:
        """A client wants a run to be over. Returns why not, "" when it is."""
        run = self._runs.by_name.get(name)
        if run is None or run.user != record.user:
            return f"there is no run {name!r}"
        if run is not record and run.peer is not None:
            return f"the run {name!r} is held by client {run.name!r}: it has to detach first"
        self._board.sessions[run.session.token] = run
        if run is record:
            # It stays until it has read the answer; then it is gone like any other.
            self._runs.end(run)
            run.hello = run.hello._replace(run="")
            if self.journal is not None:  # a broker that goes on with it knows of no run either
                self.journal.begin(saved_session(run, 0))
        else:
            self.end(run, "the run was ended", now, for_good=True)
        return ""

    def _unparked(self, peer: Peer, token: int) -> SessionRecord | None:
        """The last holder of a run that was given up comes back, and nobody else holds it."""
        record = self._runs.parked.get(token)
        if record is None or not self._board.is_owner(record, peer):
            return None
        self._runs.unpark(token)
        self._board.sessions[token] = record
        return record

    def _why_no_run(self, peer: Peer, hello: m.Hello, user: str, now: float) -> m.Refuse | None:
        if hello.role != m.CLIENT:
            return m.Refuse("run", "only a client attaches to a run")
        held = self._board.routes.get(peer)
        if held is not None and held.hello.run == hello.run:
            return None  # it begins anew, by the same connection
        return self._runs.why_not(hello, user, now)

    def _take_over(self, run: SessionRecord, hello: m.Hello, token: int, now: float) -> None:
        """Another client goes on with a run."""
        board = self._board
        self.end(run, f"client {hello.name} attaches to it", now)
        self._runs.unpark(run.session.token)
        self._runs.take(run, hello, token, now)
        board.sessions[token] = run
        board.rename(run, _name_of(hello))
        board.log.append((logging.INFO, f"client {hello.name} holds run {hello.run}"))

    def _give_up_locks(self, run: SessionRecord) -> None:
        """What its holder had locked does not wait for the next one."""
        if self.journal is not None:
            for _, _, request in self._locks.requests(run.number):
                self.journal.in_its_place(run.session.token, m.Unlock(request))
        self._board.post(self._locks.session_ended(run.number))

    def _release_nameless(self, run: SessionRecord, now: float) -> None:
        ids = self._runs.nameless(run)
        if ids:
            release = m.Release(ids)
            if self.journal is not None:
                self.journal.in_its_place(run.session.token, release)
            self._scheduler.on_message(run.number, release, now)


def _name_of(hello: m.Hello) -> str:
    return hello.name or f"{hello.host}-{hello.pid}"
