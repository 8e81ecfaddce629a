"""The sessions of a broker, the connections that they speak by, and what is to go out to them.

A peer is known by the token in its messages, not by its connection: after a redial its messages
come by another route, and whatever it missed goes out again on that one. Which sessions there are
is decided in `core.reception`; here they are found, and reached.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence

from zfabric import messages as m
from zfabric import wire
from zfabric.config import Settings
from zfabric.core.admission import Admission
from zfabric.core.outbound import Outgoing
from zfabric.core.scheduler import Scheduler
from zfabric.core.session_record import Peer, SessionRecord
from zfabric.core.why import Silence
from zfabric.errors import RemoteProtocolError

MAX_REPLIES = 1024
"""Replies to peers without a session that wait for a link at most."""

REFUSALS_KEPT = 4096
"""Unknown peers whose last refusal is remembered, so that none is answered more than once per
beat."""

TOKENS_KEPT = 4096
"""Ended sessions whose tokens are remembered."""


class Switchboard:
    """Who is here, and by which connection."""

    def __init__(
        self, epoch: int, scheduler: Scheduler, settings: Settings, admission: Admission | None
    ) -> None:
        self.epoch = epoch
        self.sessions: dict[int, SessionRecord] = {}
        """By token."""
        self.by_number: dict[int, SessionRecord] = {}
        self.routes: dict[Peer, SessionRecord] = {}
        self.dirty: dict[SessionRecord, None] = {}
        """Sessions that may have something to send."""
        self.full: dict[SessionRecord, None] = {}
        """Sessions that have to take in some of it before rows follow."""
        self.replies: list[tuple[Peer, list[bytes | memoryview]]] = []
        """To peers without a session; sent once, lost when their link is full."""
        self.counts: Counter[str] = Counter()
        """Protocol errors by reason, and other events worth a figure."""
        self.log: list[tuple[int, str]] = []
        """(level, text) since the runtime last took them."""
        self._scheduler = scheduler
        self._settings = settings
        self._admission = admission
        self._names: set[str] = set()
        self._refused: OrderedDict[Peer, float] = OrderedDict()
        self._ended: dict[int, None] = {}
        """Tokens of sessions that are over, oldest first."""

    # --- who is here --------------------------------------------------------------------------

    def add(self, record: SessionRecord) -> None:
        """A session is here from now on."""
        self.sessions[record.session.token] = record
        self.by_number[record.number] = record
        self._names.add(record.name)

    def take_token(self, token: int) -> bool:
        """That session is over, or nobody holds it; whether it was here.

        Its token begins no other one: a Hello that was said twice may come after the end, and its
        peer would take the first Welcome for that of the second session.
        """
        if self.sessions.pop(token, None) is None:
            return False
        self._ended.pop(token, None)  # that of a run may end more than once: the latest counts
        self._ended[token] = None
        if len(self._ended) > TOKENS_KEPT:
            del self._ended[next(iter(self._ended))]
        return True

    def is_over(self, token: int) -> bool:
        """Whether a session had that token, not long ago."""
        return token in self._ended

    def forget(self, record: SessionRecord) -> None:
        """It is over: its number and its name stand for nobody. Its token was taken before."""
        del self.by_number[record.number]
        self._names.discard(record.name)

    def rename(self, record: SessionRecord, name: str) -> None:
        """It goes by another name, or by one like it when that is taken."""
        self._names.discard(record.name)
        record.name = self.free_name(name)
        self._names.add(record.name)

    def free_name(self, name: str) -> str:
        """The name, or the name with a number behind it when it is taken."""
        unique, n = name, 1
        while unique in self._names:
            n += 1
            unique = f"{name}-{n}"
        return unique

    def is_owner(self, record: SessionRecord, peer: Peer) -> bool:
        """Whether a connection came in with the key that opened the session."""
        if self._admission is None or self._admission.identify(peer) == record.user:
            return True
        self.counts["bad:other-key"] += 1
        return False

    def silence(self, now: float) -> Silence:
        """How long a worker has been silent, by its number."""
        return lambda number: max(0.0, now - self.by_number[number].session.last_heard)

    # --- connections --------------------------------------------------------------------------

    def heard_on(self, record: SessionRecord, peer: Peer) -> None:
        """A session speaks by another connection than it is spoken to.

        A new one takes over. One that was left before does not: what the broken connection
        still delivers may be read after the first messages of the next one.
        """
        if peer not in record.peers:
            record.peers.append(peer)
            self.routes[peer] = record
            self._route(record, peer)

    def lost(self, peer: Peer, now: float) -> None:
        """A connection broke."""
        record = self.routes.pop(peer, None)
        if record is None:
            return
        record.peers.remove(peer)
        if record.peer == peer:
            record.peer = None
            record.gone_at = now
            if record.peers:
                self._route(record, record.peers[-1])

    def unroute(self, record: SessionRecord) -> None:
        """Nothing goes out to it any more."""
        self.dirty.pop(record, None)
        self.full.pop(record, None)
        for peer in record.peers:
            if self.routes.get(peer) is record:
                del self.routes[peer]

    def _route(self, record: SessionRecord, peer: Peer) -> None:
        """Messages go out by another connection, and with them what the last one swallowed."""
        if record.peer is not None or record.gone_at is not None:
            record.session.reconnected()
            self.counts["reconnects"] += 1
        record.peer = peer
        record.gone_at = None
        self.dirty[record] = None

    # --- what goes out ------------------------------------------------------------------------

    def say(self, record: SessionRecord, message: m.Message) -> None:
        """To one session, whether or not it is full."""
        record.session.post(message)
        self.dirty[record] = None

    def post(self, said: Sequence[Outgoing]) -> None:
        """To sessions by their numbers; those that ended meanwhile are left out. No rows follow
        to one that is full, until it has taken in some of it."""
        by_number = self.by_number
        for number, message in said:
            record = by_number.get(number)
            if record is not None:
                session = record.session
                session.post(message)
                self.dirty[record] = None
                if session.is_full and record not in self.full:
                    self.full[record] = None
                    self._scheduler.set_full(number, True)

    def look_at_full(self) -> None:
        """Sessions that were full may have taken in enough."""
        for record in list(self.full):
            if not record.session.is_full:
                del self.full[record]
                self._scheduler.set_full(record.number, False)

    def reply(self, peer: Peer, token: int, message: m.Message) -> None:
        """To a peer without a session."""
        if len(self.replies) < MAX_REPLIES:
            self.replies.append((peer, wire.encode(message, token, self.epoch)))

    def refuse_unknown(self, peer: Peer, token: int, is_restored: bool, now: float) -> None:
        """A message of a session that is not here; is_restored: but it may say Hello again."""
        last = self._refused.get(peer)
        if last is not None and now - last < self._settings.beat_s:
            return
        self._refused[peer] = now
        self._refused.move_to_end(peer)
        if len(self._refused) > REFUSALS_KEPT:
            self._refused.popitem(last=False)
        if is_restored:
            self.reply(peer, token, m.Refuse("epoch", "the broker restarted; say Hello again"))
            return
        text = "the broker does not know this session: it restarted, or gave the session up"
        self.reply(peer, token, m.Refuse("unknown", text))

    def bad(self, peer: Peer, exc: RemoteProtocolError) -> None:
        """A message made no sense."""
        self.counts[f"bad:{exc.reason}"] += 1
        self.log.append((logging.DEBUG, f"bad message from {peer.hex()}: {exc}"))
