"""The broker without its sockets: sessions, their routes, and the scheduler behind them.

Frames of a peer come in through `receive`, news of a broken connection through `gone`, the time
through `tick`. What is to be sent stands in the sessions of `dirty`; the runtime moves it to the
sockets as fast as these take it.

A peer is known by the token in its messages, not by its connection: after a redial its messages
come by another route, and whatever it missed goes out again on that one. A session ends with a
Bye, when its connection has been gone for `grace_s`, or after `dead_s` of silence. Silence is
counted on the peer's account only while this broker was awake: after a stop of its own (SIGSTOP,
a swapped-out machine) the deadlines move by as much.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from msgpack import packb

from zfabric import messages as m
from zfabric import wire
from zfabric.config import DEFAULTS, Settings
from zfabric.core.admission import REVOKED, Admission
from zfabric.core.direct import DirectSession
from zfabric.core.greeting import why_not
from zfabric.core.journal import LOGGED, Entry, JournalWriter
from zfabric.core.locks import Locks
from zfabric.core.outbound import Outgoing
from zfabric.core.questions import Questions
from zfabric.core.report import Report
from zfabric.core.restart import Restart
from zfabric.core.runs import Runs
from zfabric.core.scheduler import Scheduler
from zfabric.core.session import Session
from zfabric.core.session_record import (
    Peer,
    SessionRecord,
    patience,
    saved_session,
    worker_record,
)
from zfabric.core.why import Silence
from zfabric.errors import RemoteProtocolError
from zfabric.wire import Header
from zfabric.wire.header import decode_header

Frames = Sequence[bytes | memoryview]

MAX_REPLIES = 1024
"""Replies to peers without a session that wait for a link at most."""

REFUSALS_KEPT = 4096
"""Unknown peers whose last refusal is remembered, so that none is answered more than once per
beat."""


class BrokerMachine:
    """Everything that a broker decides."""

    def __init__(
        self,
        *,
        epoch: int,
        address: str = "",
        version: str = "",
        python: str = "",
        settings: Settings = DEFAULTS,
        now: float,
        first_number: int = 1,
        admission: Admission | None = None,
        saved: Iterable[Entry] | None = None,
        generation: int = 1,
    ) -> None:
        """epoch: of this incarnation, random.  first_number: of its sessions.
        admission: who may hold which session; None: everybody, as there are no keys.
        saved: what the journal holds; None: none is written.  generation: how often a broker has
        begun with it, this time included.

        As ids of tasks and values are made from session numbers, those of two incarnations should
        differ: a client that has not noticed a restart may still put a value into a worker's store,
        where the id must not be that of somebody else's task.
        """
        self.epoch = epoch
        self.address = address
        self.version = version
        self.python = python
        self.settings = settings
        self.admission = admission
        self.scheduler = Scheduler(settings, now)
        self._questions = Questions(self.scheduler)
        self._report = Report(self.scheduler, settings, now)
        self.stalls = self._report.stalls
        """Pictures of the state at each stall that was noticed since the runtime last took them."""
        self.locks = Locks()
        self.sessions: dict[int, SessionRecord] = {}
        """By token."""
        self.by_number: dict[int, SessionRecord] = {}
        self.routes: dict[Peer, SessionRecord] = {}
        self.runs = Runs(self.scheduler, settings)
        self.dirty: dict[SessionRecord, None] = {}
        """Sessions that may have something to send."""
        self._full: dict[SessionRecord, None] = {}
        """Sessions that have to take in some of it before rows follow."""
        self.replies: list[tuple[Peer, list[bytes | memoryview]]] = []
        """To peers without a session; sent once, lost when their link is full."""
        self.counts: Counter[str] = Counter()
        """Protocol errors by reason, and other events worth a figure."""
        self.log: list[tuple[int, str]] = []
        """(level, text) since the runtime last took them."""
        self._ticked = now
        self._next_number = first_number
        self._names: set[str] = set()
        self._refused: OrderedDict[Peer, float] = OrderedDict()
        self.journal: JournalWriter | None = None
        self.journal_trouble = ""
        """Why nothing can be written now. Messages that would have to be written are taken for
        lost on their way until it can: their senders send them again."""
        self._restart: Restart | None = None
        if saved is not None:
            self._restart = Restart(self.scheduler, saved, generation, settings, now)
            self.journal = self._restart.journal
            self._restore(self._restart, now)

    # --- events -------------------------------------------------------------------------------

    def receive(self, peer: Peer, frames: Frames, now: float) -> None:
        """A message of a peer. Whatever it holds, nothing is raised."""
        try:
            header, message = wire.decode(frames)
        except RemoteProtocolError as exc:
            self._bad(peer, exc)
            self._unreadable(peer, frames, exc, now)
            return
        kind = type(message)
        if kind is m.Hello:
            assert isinstance(message, m.Hello)
            self._hello(peer, header, message, now)
            return
        record = self.sessions.get(header.token)
        if record is None or header.epoch != self.epoch:
            if kind is not m.Refuse:
                knows = record is not None or header.token in self.runs.parked
                self._refuse_unknown(peer, header.token, knows, now)
            return
        if self.journal_trouble and header.seq and kind is not m.Ask and kind is not m.Bye:
            return
        if record.peer != peer:
            if not self._is_owner(record, peer):
                return
            self._heard_on(record, peer)
        try:
            if not record.session.receive(header, message, now, len(frames[1])):
                if kind is m.Beat:
                    self._beat(record, message)
                if record.session.has_unsent:
                    self.dirty[record] = None
                return
            if record.session.has_unsent:
                self.dirty[record] = None
            if self.journal is not None and kind in LOGGED and record.hello.role == m.CLIENT:
                self.journal.message(frames)
            self.deliver(record, message, now)
        except RemoteProtocolError as exc:
            self._bad(peer, exc)
            self._expel(record, exc, now)

    def end_unsendable(self, record: SessionRecord, text: str, now: float) -> None:
        """What is to be said to a peer does not fit its link: it cannot be left out, as all that
        follows is numbered after it."""
        self.log.append((logging.ERROR, f"{record.name}: {text}"))
        self._end(record, text, now)

    def deliver(self, record: SessionRecord, message: m.Message, now: float) -> None:
        """A message that its session has let through. Raises RemoteProtocolError when it makes no
        sense from that peer."""
        kind = type(message)
        self._report.heard(now, record.name, message)
        if kind is m.Relay:
            self._relay(record, message)
        elif kind is m.Bye:
            self._bye(record, now)
        elif kind is m.Ask and message.what in ASKED_HERE:  # type: ignore[union-attr]
            assert isinstance(message, m.Ask)
            self._ask(record, message, now)
        elif kind is m.Explained:
            assert isinstance(message, m.Explained)
            self._post(self._questions.explained(record.number, message))
        elif kind is m.Acquire or kind is m.Unlock:
            self._lock(record, message)
        elif kind is m.Output:
            self._pass_output(record, message)
        else:
            self.scheduler.on_message(record.number, message, now)
            if self.journal is not None and kind is m.Done:
                assert isinstance(message, m.Done)
                self.journal.done(message)
            elif self._restart is not None and kind is m.Inventory:
                assert isinstance(message, m.Inventory)
                self._restart.came_back(record, message)

    def attach(self, hello: m.Hello, token: int, now: float) -> SessionRecord:
        """A worker in this very process: a session without a wire, for as long as we live."""
        record = self._add(hello, DirectSession(token, self.epoch), now)
        self._welcome(record)
        return record

    def gone(self, peer: Peer, now: float) -> None:
        """A peer's connection broke."""
        record = self.routes.pop(peer, None)
        if record is None:
            return
        record.peers.remove(peer)
        if record.peer == peer:
            record.peer = None
            record.gone_at = now
            if record.peers:
                self._route(record, record.peers[-1])

    def tick(self, now: float) -> float:
        """What time alone brings about. Returns when to be called again at the latest."""
        settings = self.settings
        gap = now - self._ticked
        self._ticked = now
        asleep = gap if gap > 2 * settings.beat_s else 0.0
        wake = now + settings.beat_s
        for record in list(self.sessions.values()):
            session = record.session
            if asleep:
                # While we slept nobody could be heard: that silence is ours.
                if not record.direct:
                    session.last_heard = min(now, session.last_heard + asleep)
                if record.gone_at is not None:
                    record.gone_at = min(now, record.gone_at + asleep)
            silent = now - session.last_heard
            grace_s, dead_s = patience(record, settings)
            if record.gone_at is not None and now - record.gone_at >= grace_s:
                self._end(record, "its connection broke and it did not come back", now)
                continue
            if silent >= settings.suspect_s or record.gone_at is not None:
                if session.nbytes > settings.lease_bytes:
                    self._end(record, "it does not read what is kept for it", now)
                    continue
            if silent >= dead_s:
                self._end(record, f"silent for {silent:.0f} s", now)
                continue
            if record.hello.role == m.WORKER:
                suspect = silent >= settings.suspect_s or record.gone_at is not None
                self.scheduler.set_suspect(record.number, suspect)
            if record.gone_at is not None:
                wake = min(wake, record.gone_at + grace_s)
            wake = min(wake, session.tick(now))
            if session.has_unsent:
                self.dirty[record] = None
        if self.scheduler.settling:
            assert self._restart is not None
            if self._restart.is_over(now):
                text = self._restart.settle(now)
                if text:
                    self.log.append((logging.WARNING, text))
        self.scheduler.tick(now)
        stall = self._report.look(now, asleep, self._silence(now))
        if stall:
            self.log.append((logging.WARNING, stall))
        self._post(self._questions.tick(now))
        wake = min(wake, self._questions.wake_at() or wake)
        wake = min(wake, self.scheduler.due_at)
        if self.scheduler.has_surplus():
            wake = min(wake, now + RECALL_CHECK_S)
        return wake

    def turn(self) -> None:
        """The end of a turn: what the scheduler has to say goes into the sessions."""
        if self._full:
            for record in list(self._full):
                if not record.session.is_full:
                    del self._full[record]
                    self.scheduler.set_full(record.number, False)
        self._post(self.scheduler.flush())

    def _post(self, said: Sequence[Outgoing]) -> None:
        by_number = self.by_number
        for number, message in said:
            record = by_number.get(number)
            if record is not None:
                session = record.session
                session.post(message)
                self.dirty[record] = None
                if session.is_full and record not in self._full:
                    self._full[record] = None
                    self.scheduler.set_full(number, True)

    def admit(self, users: frozenset[str], keys: Sequence[bytes], now: float) -> None:
        """From now on the keys of these users are admitted, and no others: theirs are the only
        sessions that go on. Workers hear of it for their data doors."""
        admission = self.admission
        assert admission is not None
        if not admission.admit(users, keys):
            return
        for record in list(self.runs.parked.values()):
            if record.user not in users:
                self.sessions[record.session.token] = record
        for record in list(self.sessions.values()):
            if record.user and record.user not in users:
                if record.peer is not None:
                    self._reply(record.peer, record.session.token, m.Refuse("key", REVOKED))
                self._end(record, "its key was revoked", now, for_good=True)
            elif record.hello.role == m.WORKER:
                record.session.post(m.Admit(admission.keys))
                self.dirty[record] = None

    def snapshot(self) -> Iterator[Entry]:
        """All that a journal has to hold, in place of what it holds now."""
        assert self._restart is not None
        return self._restart.snapshot(self.by_number.values())

    def _restore(self, restart: Restart, now: float) -> None:
        """Go on where the journal ends. Peers come back by themselves."""
        for record in restart.records(self.epoch, self.settings, now):
            if self.admission is not None and record.user:
                self.admission.opened(record.user)
            self.sessions[record.session.token] = self.by_number[record.number] = record
            self._names.add(record.name)
            if record.hello.run:
                self.runs.begin(record)
        self._next_number = restart.next_number
        if restart.sessions:
            text = f"{len(restart.sessions)} clients, {len(self.scheduler.tasks)} tasks restored"
            self.log.append((logging.INFO, text))

    def close(self, text: str = "the broker was stopped") -> None:
        """Tell everybody that this broker ends, unless another will go on with its journal."""
        if self.journal is not None:
            return
        for record in self.sessions.values():
            if record.peer is not None:
                refusal = wire.encode(m.Refuse("closing", text), record.session.token, self.epoch)
                self.replies.append((record.peer, refusal))

    def info(self, now: float) -> dict[str, Any]:
        """Figures for people: plain values only."""
        info = self.scheduler.info()
        for worker in info["workers"]:
            record = self.by_number[worker["number"]]
            worker["silent_s"] = round(max(0.0, now - record.session.last_heard), 3)
        info["address"] = self.address
        info["version"] = self.version
        info["python"] = self.python
        info.update(self._report.times(now))
        info["journal"] = self.journal_trouble or ("off" if self.journal is None else "on")
        info["bytes_in"] = self.counts["bytes_in"]
        info["bytes_out"] = self.counts["bytes_out"]
        info["messages_in"] = self.counts["messages_in"]
        info["messages_out"] = self.counts["messages_out"]
        info["relays_dropped"] = self.counts["relays_dropped"]
        sessions = self.sessions.values()
        info["unacked_bytes"] = sum(r.session.nbytes + r.session.lane_nbytes for r in sessions)
        info["errors"] = {k: n for k, n in self.counts.items() if k.startswith("bad:")}
        return info

    # --- sessions -----------------------------------------------------------------------------

    def _hello(self, peer: Peer, header: Header, hello: m.Hello, now: float) -> None:
        record = self.sessions.get(header.token) or self._unparked(peer, header.token)
        if record is not None:  # our Welcome was lost, or is on its way
            if record.peer != peer:
                if not self._is_owner(record, peer):
                    return
                self._heard_on(record, peer)
            if record.is_restored and not record.resumed:
                record.resumed = True
                session = record.session
                assert isinstance(session, Session)
                session.received = max(session.received, hello.acked)
                session.last_heard = now
                record.hello = hello._replace(run=record.hello.run)
                if not hello.previous:
                    self.scheduler.client_was_never_told(record.number)
            self._welcome(record)
            return
        if hello.role == m.CLIENT and hello.previous:
            self._refuse_unknown(peer, header.token, False, now)
            return
        admission = self.admission
        user = "" if admission is None else admission.identify(peer)
        refusal = why_not(
            header,
            hello,
            version=self.version,
            python=self.python,
            next_number=self._next_number,
        )
        if admission is not None:  # the key first: whoever has none is told nothing else
            refusal = admission.why_not(user, hello.role) or refusal
        if refusal is None and hello.run:
            refusal = self._why_no_run(peer, hello, user, now)
        if refusal is not None:
            self.counts[f"refused:{refusal.code}"] += 1
            text = f"refused {hello.role} {hello.name!r} ({refusal.code}): {refusal.text}"
            self.log.append((logging.WARNING, text))
            self._reply(peer, header.token, refusal)
            return
        before = self.sessions.get(hello.previous)
        if (
            before is not None
            and hello.role == m.WORKER == before.hello.role
            and before.user == user
        ):
            self._end(before, "it begins again", now)
        session = Session(header.token, self.epoch, settings=self.settings, now=now)
        run = self.runs.by_name.get(hello.run) if hello.run else None
        record = self._add(hello, session, now, user) if run is None else run
        former = self.routes.get(peer)
        if former is not None:  # one session per connection: its peer has given that one up
            self.gone(peer, now)
            if not former.peers:
                self._end(former, "its peer began another session", now)
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
                client = self.scheduler.clients[record.number]
                self.journal.begin(saved_session(record, client.counter))
        if run is not None:
            self._release_nameless(run, now)
        self._heard_on(record, peer)
        self._welcome(record)

    def _add(
        self,
        hello: m.Hello,
        session: Session | DirectSession,
        now: float,
        user: str = "",
    ) -> SessionRecord:
        number = self._next_number
        self._next_number += 1
        name = self._unique(hello.name or f"{hello.host}-{hello.pid}")
        record = SessionRecord(number, name, hello, session)
        self.sessions[session.token] = record
        self.by_number[number] = record
        if hello.role == m.WORKER:
            self.scheduler.worker_joined(worker_record(number, name, hello, now), now)
            self.log.append((logging.INFO, f"worker {name} joined with {hello.slots} slots"))
        else:
            self.scheduler.client_joined(number, name, hello.depth, user)
            if hello.run:
                self.runs.begin(record)
            self.log.append((logging.INFO, f"client {name} joined"))
        return record

    def _welcome(self, record: SessionRecord) -> None:
        settings = self.settings
        record.session.post(
            m.Welcome(
                record.number,
                record.name,
                self.version,
                settings.inline_limit,
                settings.beat_s,
                settings.dead_s,
                record.resumed,
                (self.scheduler.clients[record.number].counter or 0) if record.hello.run else 0,
            )
        )
        self.dirty[record] = None

    def _is_owner(self, record: SessionRecord, peer: Peer) -> bool:
        """Whether a connection came in with the key that opened the session."""
        if self.admission is None or self.admission.identify(peer) == record.user:
            return True
        self.counts["bad:other-key"] += 1
        return False

    def _heard_on(self, record: SessionRecord, peer: Peer) -> None:
        """A session speaks by another connection than it is spoken to.

        A new one takes over. One that was left before does not: what the broken connection
        still delivers may be read after the first messages of the next one.
        """
        if peer not in record.peers:
            record.peers.append(peer)
            self.routes[peer] = record
            self._route(record, peer)

    def _route(self, record: SessionRecord, peer: Peer) -> None:
        """Messages go out by another connection, and with them what the last one swallowed."""
        if record.peer is not None or record.gone_at is not None:
            record.session.reconnected()
            self.counts["reconnects"] += 1
        record.peer = peer
        record.gone_at = None
        self.dirty[record] = None

    def _end(self, record: SessionRecord, why: str, now: float, *, for_good: bool = False) -> None:
        """A session is over; the peer's later messages are answered with "unknown".

        That of a run is parked, but for good.
        """
        if self.sessions.pop(record.session.token, None) is None:
            return
        if record.hello.run and not for_good:
            self.log.append((logging.INFO, f"nobody holds run {record.hello.run}: {why}"))
            self._unroute(record)
            self._post(self.locks.session_ended(record.number))
            self.runs.park(record, now)
            return
        del self.by_number[record.number]
        self._names.discard(record.name)
        if self.admission is not None and record.user:
            self.admission.ended(record.user)
        self._unroute(record)
        if record.hello.run:
            self.runs.end(record)
        role = record.hello.role
        self.log.append((logging.INFO, f"{role} {record.name} left: {why}"))
        if self.journal is not None:
            tell = self.journal.left if role == m.WORKER else self.journal.end
            tell(record.session.token)
        if role == m.WORKER:
            self.scheduler.worker_left(record.number, why, now)
            self._post(self._questions.worker_left(record.number))
        else:
            self.scheduler.client_left(record.number)
            self._post(self.locks.session_ended(record.number))

    def _unroute(self, record: SessionRecord) -> None:
        """Nothing goes out to it any more."""
        self.dirty.pop(record, None)
        self._full.pop(record, None)
        for peer in record.peers:
            if self.routes.get(peer) is record:
                del self.routes[peer]

    # --- runs ---------------------------------------------------------------------------------

    def _bye(self, record: SessionRecord, now: float) -> None:
        """A peer leaves; a run stays, with all that has a key."""
        if record.hello.run:
            self._release_nameless(record, now)
        self._end(record, "said good-bye", now)

    def _unparked(self, peer: Peer, token: int) -> SessionRecord | None:
        """The last holder of a run that was given up comes back, and nobody else holds it."""
        record = self.runs.parked.get(token)
        if record is None or not self._is_owner(record, peer):
            return None
        self.runs.unpark(token)
        self.sessions[token] = record
        return record

    def _why_no_run(self, peer: Peer, hello: m.Hello, user: str, now: float) -> m.Refuse | None:
        if hello.role != m.CLIENT:
            return m.Refuse("run", "only a client attaches to a run")
        held = self.routes.get(peer)
        if held is not None and held.hello.run == hello.run:
            return None  # it begins anew, by the same connection
        return self.runs.why_not(hello, user, now)

    def _take_over(self, run: SessionRecord, hello: m.Hello, token: int, now: float) -> None:
        """Another client goes on with a run."""
        self._end(run, f"client {hello.name} attaches to it", now)
        self.runs.unpark(run.session.token)
        self.runs.take(run, hello, token, now)
        self.sessions[token] = run
        self._names.discard(run.name)
        run.name = self._unique(hello.name or f"{hello.host}-{hello.pid}")
        self.log.append((logging.INFO, f"client {hello.name} holds run {hello.run}"))

    def _release_nameless(self, run: SessionRecord, now: float) -> None:
        ids = self.runs.nameless(run)
        if ids:
            release = m.Release(ids)
            if self.journal is not None:
                self.journal.in_its_place(run.session.token, release)
            self.scheduler.on_message(run.number, release, now)

    def _end_run(self, record: SessionRecord, name: str, now: float) -> str:
        """A client wants a run to be over. Returns why not, "" when it is."""
        run = self.runs.by_name.get(name)
        if run is None or run.user != record.user:
            return f"there is no run {name!r}"
        if run is not record and run.peer is not None:
            return f"the run {name!r} is held by client {run.name!r}: it has to detach first"
        self.sessions[run.session.token] = run
        if run is record:
            # It stays until it has read the answer; then it is gone like any other.
            self.runs.end(run)
            run.hello = run.hello._replace(run="")
        else:
            self._end(run, "the run was ended", now, for_good=True)
        return ""

    def _unique(self, name: str) -> str:
        """The name, or the name with a number behind it when it is taken."""
        unique, n = name, 1
        while unique in self._names:
            n += 1
            unique = f"{name}-{n}"
        self._names.add(unique)
        return unique

    def _unreadable(self, peer: Peer, frames: Frames, exc: RemoteProtocolError, now: float) -> None:
        """A session's own message that cannot be read would be sent again for ever, and all that
        follows it with it: the session is over. Strangers are only counted."""
        try:
            token = decode_header(bytes(frames[0])).token if frames else 0
        except RemoteProtocolError:
            return
        record = self.sessions.get(token)
        if record is not None and record.peer == peer:
            self._expel(record, exc, now)

    def _expel(self, record: SessionRecord, exc: RemoteProtocolError, now: float) -> None:
        if record.peer is not None:
            self._reply(record.peer, record.session.token, m.Refuse("protocol", str(exc)))
        self._end(record, f"broke the protocol: {exc}", now)

    # --- small matters ------------------------------------------------------------------------

    def _beat(self, record: SessionRecord, message: m.Message) -> None:
        assert isinstance(message, m.Beat)
        worker = self.scheduler.workers.get(record.number)
        if worker is not None:
            worker.load = message.load
            worker.n_beats += 1
            if worker.suspect:
                self.scheduler.set_suspect(record.number, False)

    def _relay(self, record: SessionRecord, message: m.Message) -> None:
        """Pass frames on, unread, or say by empty ones that there is no such session."""
        assert isinstance(message, m.Relay)
        target = self.by_number.get(message.peer)
        if target is not None and (target.peer is not None or target.direct):
            if target.session.lane_nbytes >= self.settings.relay_bytes:
                self.counts["relays_dropped"] += 1
                return
            target.session.post(m.Relay(record.number, message.frames))
            self.dirty[target] = None
        elif target is None:
            # Numbers are not used again: whoever asks need not ask for anything else of it.
            record.session.post(m.Relay(message.peer, ()))
            self.dirty[record] = None

    def _pass_output(self, record: SessionRecord, message: m.Message) -> None:
        """What tasks wrote goes to their clients, unread. Where a client does not keep up, it is
        left out rather than kept here: it is nobody's result."""
        assert isinstance(message, m.Output)
        if record.hello.role != m.WORKER:
            raise RemoteProtocolError("role", "a client told of a task's output")
        tasks = self.scheduler.tasks
        by_owner: dict[int, m.Output] = {}
        rows = zip(message.ids, message.attempts, message.dropped, message.texts, strict=True)
        for row in rows:
            task = tasks.get(row[0])
            if task is not None and task.wanted:
                part = by_owner.setdefault(task.owner.number, m.Output([], [], [], []))
                for column, entry in zip(part, row, strict=True):
                    column.append(entry)  # type: ignore[attr-defined]
        for number, part in by_owner.items():
            owner = self.by_number.get(number)
            if owner is not None and owner.session.nbytes < OUTPUT_NBYTES:
                owner.session.post(part)
                self.dirty[owner] = None

    def _ask(self, record: SessionRecord, message: m.Ask, now: float) -> None:
        if message.what == "info":
            self._answer(record, message.request, self.info(now))
        elif message.what == "sync":
            self._answer(record, message.request, None)
        elif message.what == "runs":
            self._answer(record, message.request, self.runs.listed(record.user, now))
        elif message.what == "run":
            self._answer(record, message.request, self.runs.page(record, message.text))
        elif message.what == "end run":
            self._answer(record, message.request, self._end_run(record, message.text, now))
        elif message.what == "locked":
            self._answer(record, message.request, self.locks.is_locked(message.text))
        elif record.hello.role == m.CLIENT:
            self._post(self._questions.why(record.number, message, self._silence(now), now))
        else:
            raise RemoteProtocolError("role", "a worker asked why")

    def _lock(self, record: SessionRecord, message: m.Message) -> None:
        if record.hello.role != m.CLIENT:
            raise RemoteProtocolError("role", "a worker wanted a lock")
        if isinstance(message, m.Acquire):
            self._post(self.locks.acquire(record.number, message))
        else:
            assert isinstance(message, m.Unlock)
            self._post(self.locks.unlock(record.number, message))

    def _silence(self, now: float) -> Silence:
        """How long a worker has been silent, by its number."""
        return lambda number: max(0.0, now - self.by_number[number].session.last_heard)

    def _answer(self, record: SessionRecord, request: int, answer: Any) -> None:
        if record.session.nbytes > self.settings.lease_bytes:
            raise RemoteProtocolError("unread", "it asks, and does not read the answers")
        record.session.post(m.Answer(request, packb(answer)))
        self.dirty[record] = None

    def _reply(self, peer: Peer, token: int, message: m.Message) -> None:
        if len(self.replies) < MAX_REPLIES:
            self.replies.append((peer, wire.encode(message, token, self.epoch)))

    def _refuse_unknown(self, peer: Peer, token: int, is_restored: bool, now: float) -> None:
        last = self._refused.get(peer)
        if last is not None and now - last < self.settings.beat_s:
            return
        self._refused[peer] = now
        self._refused.move_to_end(peer)
        if len(self._refused) > REFUSALS_KEPT:
            self._refused.popitem(last=False)
        if is_restored:
            self._reply(peer, token, m.Refuse("epoch", "the broker restarted; say Hello again"))
            return
        text = "the broker does not know this session: it restarted, or gave the session up"
        self._reply(peer, token, m.Refuse("unknown", text))

    def _bad(self, peer: Peer, exc: RemoteProtocolError) -> None:
        self.counts[f"bad:{exc.reason}"] += 1
        self.log.append((logging.DEBUG, f"bad message from {peer.hex()}: {exc}"))


ASKED_HERE = frozenset(("info", "why", "locked", "sync", "run", "runs", "end run"))
"""Questions that are not the scheduler's."""

OUTPUT_NBYTES = 4 << 20
"""Bytes that may wait for a client and still be joined by what its tasks write."""

RECALL_CHECK_S = 0.05
"""How often to look for rows stuck behind a long one, while there may be any."""
