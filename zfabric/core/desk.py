"""What a broker does for its peers besides tasks: answers questions, keeps their locks, passes on
frames and what tasks print."""

from __future__ import annotations

from typing import Any

from msgpack import packb

from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core.journal import JournalWriter
from zfabric.core.locks import Locks
from zfabric.core.questions import Questions
from zfabric.core.reception import Reception
from zfabric.core.report import Report
from zfabric.core.runs import Runs
from zfabric.core.scheduler import Scheduler
from zfabric.core.session_record import SessionRecord
from zfabric.core.switchboard import Switchboard
from zfabric.errors import RemoteProtocolError

ASKED_HERE = frozenset(("info", "why", "locked", "sync", "run", "runs", "end run"))
"""Questions that are not the scheduler's."""

MOST_CONTROL = 64
"""Messages out of sequence that may wait for a client and still be joined by an answer."""

OUTPUT_NBYTES = 4 << 20
"""Bytes that may wait for a client and still be joined by what its tasks write."""


class Desk:
    """Serves sessions one message at a time."""

    def __init__(
        self,
        board: Switchboard,
        reception: Reception,
        scheduler: Scheduler,
        runs: Runs,
        locks: Locks,
        questions: Questions,
        report: Report,
        *,
        settings: Settings,
        about: dict[str, str],
    ) -> None:
        """about: what to say of this broker itself: address, version, python."""
        self.journal: JournalWriter | None = None
        self._board = board
        self._reception = reception
        self._scheduler = scheduler
        self._runs = runs
        self._locks = locks
        self._questions = questions
        self._report = report
        self._settings = settings
        self._about = about

    def ask(self, record: SessionRecord, message: m.Ask, now: float) -> None:
        """A question of ASKED_HERE."""
        if message.what == "info":
            self._answer(record, message.request, self.info(now))
        elif message.what == "sync":
            self._answer(record, message.request, None)
        elif message.what == "runs":
            self._answer(record, message.request, self._runs.listed(record.user, now))
        elif message.what == "run":
            self._answer(record, message.request, self._runs.page(record, message.text))
        elif message.what == "end run":
            why_not = self._reception.end_run(record, message.text, now)
            self._answer(record, message.request, why_not)
        elif message.what == "locked":
            self._answer(record, message.request, self._locks.is_locked(message.text))
        elif record.hello.role == m.CLIENT:
            silent_s = self._board.silence(now)
            self._board.post(self._questions.why(record.number, message, silent_s, now))
        else:
            raise RemoteProtocolError("role", "a worker asked why")

    def query(self, record: SessionRecord, message: m.Query, now: float) -> None:
        """A question out of sequence, which is answered while nothing else is."""
        if record.hello.role != m.CLIENT:
            raise RemoteProtocolError("role", "a worker put a query")
        if record.session.n_control > MOST_CONTROL:
            return  # its link takes nothing; it asks again
        trouble = self.journal.trouble if self.journal is not None else ""
        if not trouble:
            self._board.say(record, m.Alarm(""))  # the last one was lost
        answer: Any
        if message.what == "info":
            answer = self.info(now)
        elif message.what == "runs":
            answer = self._runs.listed(record.user, now)
        elif message.what == "why":
            answer = self._questions.known(message, self._board.silence(now), trouble)
        else:
            raise RemoteProtocolError("ask", f"nobody can tell {message.what!r} out of sequence")
        self._board.say(record, m.Reply(message.request, packb(answer)))

    def lock(self, record: SessionRecord, message: m.Message) -> None:
        """A client wants a lock, or wants it no more."""
        if record.hello.role != m.CLIENT:
            raise RemoteProtocolError("role", "a worker wanted a lock")
        if isinstance(message, m.Acquire):
            self._board.post(self._locks.acquire(record.number, message))
        else:
            assert isinstance(message, m.Unlock)
            self._board.post(self._locks.unlock(record.number, message))

    def beat(self, record: SessionRecord, message: m.Beat) -> None:
        """A worker lives, and says how busy it is."""
        worker = self._scheduler.workers.get(record.number)
        if worker is not None:
            worker.load = message.load
            worker.n_beats += 1
            if worker.suspect:
                self._scheduler.set_suspect(record.number, False)

    def relay(self, record: SessionRecord, message: m.Relay) -> None:
        """Pass frames on, unread, or say by empty ones that there is no such session."""
        board = self._board
        target = board.by_number.get(message.peer)
        if target is not None and (target.peer is not None or target.direct):
            if target.session.lane_nbytes >= self._settings.relay_bytes:
                board.counts["relays_dropped"] += 1
                return
            board.say(target, m.Relay(record.number, message.frames))
        elif target is None:
            # Numbers are not used again: whoever asks need not ask for anything else of it.
            board.say(record, m.Relay(message.peer, ()))

    def pass_output(self, record: SessionRecord, message: m.Output) -> None:
        """What tasks wrote goes to their clients, unread. Where a client does not keep up, it is
        left out rather than kept here: it is nobody's result."""
        if record.hello.role != m.WORKER:
            raise RemoteProtocolError("role", "a client told of a task's output")
        tasks = self._scheduler.tasks
        by_owner: dict[int, m.Output] = {}
        rows = zip(message.ids, message.attempts, message.starts, message.texts, strict=True)
        for row in rows:
            task = tasks.get(row[0])
            if task is not None and task.wanted:
                part = by_owner.setdefault(task.owner.number, m.Output([], [], [], []))
                for column, entry in zip(part, row, strict=True):
                    column.append(entry)  # type: ignore[attr-defined]
        for number, part in by_owner.items():
            owner = self._board.by_number.get(number)
            if owner is not None and owner.session.nbytes < OUTPUT_NBYTES:
                self._board.say(owner, part)

    def info(self, now: float) -> dict[str, Any]:
        """Figures for people: plain values only."""
        board, journal = self._board, self.journal
        counts = board.counts
        info = self._scheduler.info()
        for worker in info["workers"]:
            record = board.by_number[worker["number"]]
            worker["silent_s"] = round(max(0.0, now - record.session.last_heard), 3)
        info.update(self._about)
        info.update(self._report.times(now))
        info["journal"] = "off" if journal is None else journal.trouble or "on"
        for figure in ("bytes_in", "bytes_out", "messages_in", "messages_out", "relays_dropped"):
            info[figure] = counts[figure]
        sessions = board.sessions.values()
        info["unacked_bytes"] = sum(r.session.nbytes + r.session.lane_nbytes for r in sessions)
        info["errors"] = {k: n for k, n in counts.items() if k.startswith("bad:")}
        return info

    def _answer(self, record: SessionRecord, request: int, answer: Any) -> None:
        if record.session.nbytes > self._settings.lease_bytes:
            raise RemoteProtocolError("unread", "it asks, and does not read the answers")
        self._board.say(record, m.Answer(request, packb(answer)))
