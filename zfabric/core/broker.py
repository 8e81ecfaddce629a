"""The broker without its sockets: what it hears, and how long it waits to hear it.

Frames of a peer come in through `receive`, news of a broken connection through `gone`, the time
through `tick`. What is to be sent stands in the sessions of `dirty`; the runtime moves it to the
sockets as fast as these take it.

How sessions begin and end is in `core.reception`, how they are reached in `core.switchboard`, what
they ask for besides tasks in `core.desk`. Of tasks the scheduler knows.

A session ends with a Bye, when its connection has been gone for `grace_s`, or after `dead_s` of
silence. Silence is counted on the peer's account only while this broker was awake: after a stop of
its own (SIGSTOP, a swapped-out machine) the deadlines move by as much.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from math import inf
from typing import Any

from zfabric import messages as m
from zfabric import wire
from zfabric.config import DEFAULTS, Settings
from zfabric.core.admission import Admission
from zfabric.core.desk import ASKED_HERE, Desk
from zfabric.core.journal import LOGGED, Entry, JournalWriter
from zfabric.core.locks import Locks
from zfabric.core.questions import Questions
from zfabric.core.reception import Reception
from zfabric.core.report import Report
from zfabric.core.restart import Restart
from zfabric.core.runs import Runs
from zfabric.core.scheduler import Scheduler
from zfabric.core.session_record import Peer, SessionRecord, patience
from zfabric.core.switchboard import Switchboard
from zfabric.errors import RemoteProtocolError
from zfabric.wire.header import decode_header

Frames = Sequence[bytes | memoryview]

RECALL_CHECK_S = 0.05
"""How often to look for rows stuck behind a long one, while there may be any."""

MANY = 100
"""Sessions above which ticks are put off until a look at all of them is worth it:"""

LOOK_S = 8e-5
"""Seconds per session between two looks: some forty times what a look costs."""


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
        self.settings = settings
        self.scheduler = Scheduler(settings, now)
        self.locks = Locks()
        self.runs = Runs(self.scheduler, settings)
        self.journal: JournalWriter | None = None
        self.board = Switchboard(epoch, self.scheduler, settings, admission)
        # The board's own tables, which are changed in place, within reach of every message.
        self.sessions = self.board.sessions
        self.by_number = self.board.by_number
        self.routes = self.board.routes
        self.dirty = self.board.dirty
        self.replies = self.board.replies
        self.counts = self.board.counts
        self.log = self.board.log
        self._questions = Questions(self.scheduler)
        self._report = Report(self.scheduler, settings, now)
        self.stalls = self._report.stalls
        """Pictures of the state at each stall that was noticed since the runtime last took them."""
        self._reception = Reception(
            self.board,
            self.scheduler,
            self.runs,
            self.locks,
            self._questions,
            settings=settings,
            admission=admission,
            version=version,
            python=python,
            first_number=first_number,
        )
        self._desk = Desk(
            self.board,
            self._reception,
            self.scheduler,
            self.runs,
            self.locks,
            self._questions,
            self._report,
            settings=settings,
            about={"address": address, "version": version, "python": python},
        )
        self._ticked = now
        self._alarm_at = now
        self._woke_at = -inf
        """When we last had slept."""
        self._restart: Restart | None = None
        if saved is not None:
            self._restart = Restart(self.scheduler, self.locks, saved, generation, settings, now)
            self.journal = self._desk.journal = self._restart.journal
            self._reception.restore(self._restart, now)

    # --- events -------------------------------------------------------------------------------

    def receive(self, peer: Peer, frames: Frames, now: float) -> None:
        """A message of a peer. Whatever it holds, nothing is raised."""
        try:
            header, message = wire.decode(frames)
        except RemoteProtocolError as exc:
            self.board.bad(peer, exc)
            self._unreadable(peer, frames, exc, now)
            return
        kind = type(message)
        if kind is m.Hello:
            assert isinstance(message, m.Hello)
            self._reception.hello(peer, header, message, now)
            return
        record = self.sessions.get(header.token)
        if record is None or header.epoch != self.epoch:
            if kind is not m.Refuse:
                knows = record is not None or header.token in self.runs.parked
                self.board.refuse_unknown(peer, header.token, knows, now)
            return
        journal = self.journal
        if journal is not None and journal.trouble and header.seq and kind is not m.Bye:
            return  # as if lost on its way
        if record.peer != peer:
            if not self.board.is_owner(record, peer):
                return
            self.board.heard_on(record, peer)
        try:
            if not record.session.receive(header, message, now, len(frames[1])):
                if kind is m.Beat:
                    assert isinstance(message, m.Beat)
                    self._desk.beat(record, message)
                if record.session.has_unsent:
                    self.dirty[record] = None
                return
            if record.session.has_unsent:
                self.dirty[record] = None
            if journal is not None and kind in LOGGED and record.hello.role == m.CLIENT:
                journal.message(frames)
            self.deliver(record, message, now)
        except RemoteProtocolError as exc:
            self.board.bad(peer, exc)
            self._reception.expel(record, exc, now)

    def end_unsendable(self, record: SessionRecord, text: str, now: float) -> None:
        """What is to be said to a peer does not fit its link: it cannot be left out, as all that
        follows is numbered after it."""
        self.log.append((logging.ERROR, f"{record.name}: {text}"))
        self._reception.end(record, text, now)

    def deliver(self, record: SessionRecord, message: m.Message, now: float) -> None:
        """A message that its session has let through. Raises RemoteProtocolError when it makes no
        sense from that peer."""
        kind = type(message)
        self._report.heard(now, record.name, message)
        if kind is m.Relay:
            assert isinstance(message, m.Relay)
            self._desk.relay(record, message)
        elif kind is m.Bye:
            self._reception.bye(record, now)
        elif kind is m.Ask and message.what in ASKED_HERE:  # type: ignore[union-attr]
            assert isinstance(message, m.Ask)
            self._desk.ask(record, message, now)
        elif kind is m.Query:
            assert isinstance(message, m.Query)
            self._desk.query(record, message, now)
        elif kind is m.Explained:
            assert isinstance(message, m.Explained)
            self.board.post(self._questions.explained(record.number, message))
        elif kind is m.Acquire or kind is m.Unlock:
            self._desk.lock(record, message)
        elif kind is m.Output:
            assert isinstance(message, m.Output)
            self._desk.pass_output(record, message)
        else:
            self.scheduler.on_message(record.number, message, now)
            if self.journal is not None and kind is m.Done:
                assert isinstance(message, m.Done)
                self.journal.done(message)
            elif self._restart is not None and kind is m.Inventory:
                assert isinstance(message, m.Inventory)
                self._restart.came_back(record, message)
                self._settle(now)

    def attach(self, hello: m.Hello, token: int, now: float) -> SessionRecord:
        """A worker in this very process: a session without a wire, for as long as we live."""
        return self._reception.attach(hello, token, now)

    def gone(self, peer: Peer, now: float) -> None:
        """A peer's connection broke."""
        self.board.lost(peer, now)

    def tick(self, now: float) -> float:
        """What time alone brings about. Returns when to be called again at the latest."""
        settings = self.settings
        gap = now - self._ticked
        self._ticked = now
        asleep = gap if gap > 2 * settings.beat_s else 0.0
        if asleep > settings.suspect_s:
            self._woke_at = now
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
            if record.gone_at is not None and record.gone_at < self._woke_at + settings.suspect_s:
                # Its end took us for dead, too, and may dial again only every other second.
                grace_s = max(grace_s, settings.suspect_s)
            if record.gone_at is not None and now - record.gone_at >= grace_s:
                text = "its connection broke and it did not come back"
                self._reception.end(record, text, now, may_return=True)
                continue
            if silent >= settings.suspect_s or record.gone_at is not None:
                if session.nbytes > settings.lease_bytes:
                    self._reception.end(record, "it does not read what is kept for it", now)
                    continue
            if silent >= dead_s:
                text = f"silent for {silent:.0f} s"
                self._reception.end(record, text, now, may_return=True)
                continue
            if record.hello.role == m.WORKER:
                suspect = silent >= settings.suspect_s or record.gone_at is not None
                self.scheduler.set_suspect(record.number, suspect)
            if record.gone_at is not None:
                wake = min(wake, record.gone_at + grace_s)
            wake = min(wake, session.tick(now))
            if session.has_unsent:
                self.dirty[record] = None
        if len(self.sessions) > MANY:
            # Beats of many fall due at any moment, and each look is at all of them.
            wake = max(wake, now + min(len(self.sessions) * LOOK_S, settings.beat_s / 2))
        if self._restart is not None:
            self._restart.tick(now)
            self._settle(now)
        if self.journal is not None and self.journal.trouble and now >= self._alarm_at:
            self._alarm_at = now + settings.beat_s
            self._tell_clients(m.Alarm(self.journal.trouble))
        self.scheduler.tick(now)
        stall = self._report.look(now, asleep, self.board.silence(now))
        if stall:
            self.log.append((logging.WARNING, stall))
        self.board.post(self._questions.tick(now))
        wake = min(wake, self._questions.wake_at() or wake)
        wake = min(wake, self.scheduler.due_at)
        if self.scheduler.has_surplus():
            wake = min(wake, now + RECALL_CHECK_S)
        return wake

    def turn(self) -> None:
        """The end of a turn: what the scheduler has to say goes into the sessions."""
        if self.board.full:
            self.board.look_at_full()
        self.board.post(self.scheduler.flush())

    def admit(self, users: frozenset[str], keys: Sequence[bytes], now: float) -> None:
        """From now on the keys of these users are admitted, and no others."""
        self._reception.admit(users, keys, now)

    def snapshot(self) -> Iterator[Entry]:
        """All that a journal has to hold, in place of what it holds now."""
        assert self._restart is not None
        return self._restart.snapshot(self.by_number.values())

    def cannot_write(self, text: str) -> None:
        """The journal takes nothing: until it does, nobody hears of what would have to be in it,
        and no work is taken in. What only wants to know is answered."""
        assert self.journal is not None
        begins = not self.journal.trouble
        self.journal.trouble = text
        if begins:
            for record in self.sessions.values():
                record.session.hold()
            self._tell_clients(m.Alarm(text))

    def can_write(self) -> None:
        """It holds all that has happened."""
        assert self.journal is not None
        self.journal.trouble = ""
        for record in self.sessions.values():
            record.session.let_go()
            self.dirty[record] = None
        self._tell_clients(m.Alarm(""))

    def _settle(self, now: float) -> None:
        """Begin to place work, once nobody from before the restart is waited for any more."""
        assert self._restart is not None
        if self.scheduler.settling and self._restart.is_over(now):
            text = self._restart.settle(now)
            if text:
                self.log.append((logging.WARNING, text))

    def _tell_clients(self, message: m.Message) -> None:
        for record in self.sessions.values():
            if record.hello.role == m.CLIENT and record.peer is not None:
                self.board.say(record, message)

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
        return self._desk.info(now)

    def _unreadable(self, peer: Peer, frames: Frames, exc: RemoteProtocolError, now: float) -> None:
        """A session's own message that cannot be read would be sent again for ever, and all that
        follows it with it: the session is over. Strangers are only counted."""
        try:
            token = decode_header(bytes(frames[0])).token if frames else 0
        except RemoteProtocolError:
            return
        record = self.sessions.get(token)
        if record is not None and record.peer == peer:
            self._reception.expel(record, exc, now)
