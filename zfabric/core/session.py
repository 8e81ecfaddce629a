"""A session: what makes a lossy link between two peers lose nothing.

ZeroMQ gives whole messages, in order, at most once, per connection; a reconnect silently cuts
off both directions. So each end numbers its messages 1, 2, 3, ..., keeps them in an outbox until
the other end's cumulative ack covers them, and takes in only the next number that it expects:

  - a number already seen is a duplicate and dropped;
  - a number beyond the next one shows a gap: a Nack names the first one missing, and the sender
    goes back to it (go-back-N: after a cut everything behind the gap is lost as well, so keeping
    later messages would not save any);
  - a cut at the tail leaves no gap behind. Each Beat therefore says how far the sender has
    counted, and a receiver that is behind sends the Nack.

The outbox is the truth, the socket's queue is not. At most `window` messages are on their way
without an ack, so ZeroMQ's high-water mark is never reached. Whoever has much to say asks `is_full`
first: the outbox then holds little more than `window_bytes`. Acks ride on every message; where
nothing else is to be said, a Beat carries them after a quarter of the window, in messages or bytes.

Relays have a lane of their own, behind all else. As nothing overtakes what a socket has taken, at
most RELAY_WINDOW bytes of them go out before the other end's Beat says that it has received them.
What a broken connection swallowed is not waited for, and what got lost in another way is forgiven
when PATIENCE Beats in a row know of nothing new.

Both ends use this same class. It does no I/O and reads no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from zfabric import wire
from zfabric.config import DEFAULTS, Settings
from zfabric.errors import RemoteProtocolError
from zfabric.messages import Beat, Message, Nack, Relay
from zfabric.wire import Body, Header

Frames = list[bytes | memoryview]

MAX_CONTROL = 1024
"""Unsequenced messages that wait for a link at most; older ones are dropped, as their senders
say them again when they still matter."""

RELAY_WINDOW = 2 * 1024 * 1024
"""Bytes relayed over one link that its other end has not told of: what a control message may have
to wait for, 16 ms at 1 Gbit/s."""

PATIENCE = 8
"""Beats."""

_NACK = wire.encode_body(Nack(0)).kind


class Session:
    """One end of a session.

    token: says which session a message belongs to.  epoch: the broker's incarnation, 0 while
    unknown.  posted, acked: the last number given out, the last one that the peer has for sure.
    received: the last number taken in sequence.  last_heard: when anything arrived, in seconds.
    """

    __slots__ = (
        "_ack_told",
        "_beat_at",
        "_cursor",
        "_control",
        "_bytes_told",
        "_lane",
        "_nacked",
        "_outbox",
        "_queue",
        "_relay_heard",
        "_relay_idle",
        "_relay_sent",
        "_relay_told",
        "_settings",
        "_starts",
        "_starts_epoch",
        "acked",
        "duplicates",
        "epoch",
        "gaps",
        "last_heard",
        "lane_nbytes",
        "held",
        "load",
        "nbytes",
        "posted",
        "received",
        "relayed",
        "token",
    )

    def __init__(
        self, token: int, epoch: int = 0, *, settings: Settings = DEFAULTS, now: float
    ) -> None:
        self.token = token
        self.epoch = epoch
        self.posted = 0
        self.acked = 0
        self.received = 0
        self.last_heard = now
        self.load: tuple[int, ...] = ()
        """What this end's beats tell of its load; see messages.Beat."""
        self.duplicates = 0
        self.gaps = 0
        self._settings = settings
        self._outbox: deque[Body] = deque()
        """Messages acked + 1 .. posted, oldest first."""
        self._cursor = 0
        """How many of the outbox's messages have been put on the wire."""
        self.nbytes = 0
        """Of them."""
        self._control: deque[Body] = deque(maxlen=MAX_CONTROL)
        self._lane: deque[Body] = deque()
        """Relays that wait for the link."""
        self.lane_nbytes = 0
        """Of them."""
        self._relay_sent = 0
        """Bytes relayed to the peer, and how many of them it has told of:"""
        self._relay_heard = 0
        self._relay_idle = 0
        """Beats in a row that told of no more."""
        self.relayed = 0
        """Bytes of Relays from the peer, and how many of them it was told of:"""
        self._relay_told = 0
        self.held = False
        """See hold()."""
        self._queue = 0
        """Where next_frames() found what it gave: _CONTROL, _OUTBOX or _LANE."""
        self._starts: dict[int, bytes] = {}
        """The parts of headers that stay the same, by kind, for this epoch:"""
        self._starts_epoch = epoch
        self._ack_told = 0
        self._bytes_told = 0
        """Bytes taken in since the last ack."""
        self._nacked = 0
        """The gap that was complained of last, so that each is named once per beat."""
        self._beat_at = now + settings.beat_s

    # --- sending ------------------------------------------------------------------------------

    def post(self, message: Message) -> int:
        """Queue a message; returns its number, 0 for one that is not sequenced."""
        body = wire.encode_body(message)
        if not body.sequenced:
            if type(message) is Relay:
                self._post_relay(body)
            else:
                self._control.append(body)
            return 0
        self._outbox.append(body)
        self.nbytes += body.nbytes
        self.posted += 1
        return self.posted

    def _post_relay(self, body: Body) -> None:
        if len(self._lane) >= MAX_CONTROL:
            self.lane_nbytes -= self._lane.popleft().nbytes
        self._lane.append(body)
        self.lane_nbytes += body.nbytes

    def next_frames(self) -> Frames | None:
        """The next message due on the wire; None when there is none or the window is full."""
        cursor = self._cursor if not self.held else len(self._outbox)
        seq = 0
        if self._control:
            self._queue = _CONTROL
            body = self._control[0]
        elif cursor < len(self._outbox) and cursor < self._settings.window:
            self._queue = _OUTBOX
            body = self._outbox[cursor]
            seq = self.acked + cursor + 1
        elif self._lane and self._relay_sent - self._relay_heard < RELAY_WINDOW:
            self._queue = _LANE
            body = self._lane[0]
        else:
            return None
        starts = self._starts
        if self._starts_epoch != self.epoch:
            self._starts_epoch = self.epoch
            starts.clear()
        start = starts.get(body.kind)
        if start is None:
            start = starts[body.kind] = wire.header_start(body.kind, self.token, self.epoch)
        ack = self.received if not self.held else 0
        return [start + wire.header_end(seq, ack), *body.frames]

    def sent(self) -> None:
        """The transport took what next_frames() gave."""
        if self._queue == _OUTBOX:
            self._cursor += 1
        elif self._queue == _CONTROL:
            self._control.popleft()
        else:
            body = self._lane.popleft()
            self.lane_nbytes -= body.nbytes
            self._relay_sent += _relayed(body.frames[1:])
        if not self.held:
            self._ack_told = self.received
            self._bytes_told = 0

    def reconnected(self) -> None:
        """The connection broke: whatever is unacked goes out again, behind a Beat that shows
        the other end where this session now lives."""
        self._cursor = 0
        self._nacked = 0
        self._relay_sent = self._relay_heard
        self._beat()

    def hold(self) -> None:
        """Until let_go() nothing goes out that is in sequence, and nothing that acknowledges."""
        self.held = True
        kept = [body for body in self._control if body.kind != _NACK]
        self._control.clear()
        self._control.extend(kept)

    def let_go(self) -> None:
        """All may go out again, and what was not taken in meanwhile is asked for."""
        self.held = False

    def pause(self) -> None:
        """The other end is not the one that we spoke with: until go_on() only what is not in
        sequence goes out."""
        self._cursor = len(self._outbox)
        self._control.clear()
        self._lane.clear()
        self.lane_nbytes = 0

    def go_on(self) -> None:
        """The other end begins anew, with our messages up to an ack that came with its first:
        its own are numbered from 1 again, and ours from there on go out again."""
        self.received = 0
        self._ack_told = 0
        self._nacked = 0
        self._cursor = 0
        self._relay_sent = self._relay_heard = 0

    @property
    def is_full(self) -> bool:
        """Whether the peer has yet to take so much that more of it can wait."""
        settings = self._settings
        return len(self._outbox) >= settings.window or self.nbytes >= settings.window_bytes

    def unacked(self, kind: int) -> list[Body]:
        """Messages of one kind that the peer may not have, to be said in another session."""
        return [body for body in self._outbox if body.kind == kind]

    def repost(self, bodies: Iterable[Body]) -> None:
        """Queue what another session had queued."""
        for body in bodies:
            self._outbox.append(body)
            self.nbytes += body.nbytes
            self.posted += 1

    @property
    def n_control(self) -> int:
        """Messages out of sequence that wait for the link."""
        return len(self._control)

    @property
    def n_unacked(self) -> int:
        """Messages that the peer may not have."""
        return len(self._outbox)

    @property
    def has_unsent(self) -> bool:
        """Whether next_frames() would give one."""
        cursor = self._cursor
        if self._control:
            return True
        if cursor < len(self._outbox) and cursor < self._settings.window and not self.held:
            return True
        return bool(self._lane) and self._relay_sent - self._relay_heard < RELAY_WINDOW

    # --- receiving ----------------------------------------------------------------------------

    def receive(self, header: Header, message: Message, now: float, nbytes: int = 0) -> bool:
        """Whether to hand the message to the machine. Beats and Nacks are handled here.

        nbytes: of a message in sequence.
        Raises RemoteProtocolError when the peer acknowledges what was never sent.
        """
        self.last_heard = now
        if header.ack > self.acked:
            self._on_ack(header.ack)
        seq = header.seq
        if seq:
            if seq == self.received + 1:
                self.received = seq
                self._bytes_told += nbytes
                if (
                    seq - self._ack_told >= self._settings.window >> 2
                    or self._bytes_told >= self._settings.window_bytes >> 2
                ):
                    self._beat()
                    self._ack_told = seq
                    self._bytes_told = 0
                return True
            if seq <= self.received:
                self.duplicates += 1
            else:
                self._complain()
            return False
        if isinstance(message, Relay):
            self.relayed += _relayed(message.frames)
            if self.relayed - self._relay_told >= RELAY_WINDOW >> 2:
                self._beat()
            return True
        if isinstance(message, Beat):
            self._on_relayed(message.relayed)
            if message.sent > self.received:
                self._nacked = 0
                self._complain()
            return False
        if isinstance(message, Nack):
            self._on_nack(message.expected)
            return False
        return True

    def _on_ack(self, ack: int) -> None:
        if ack > self.posted:
            raise RemoteProtocolError("ack", f"message {ack} acknowledged, {self.posted} sent")
        outbox = self._outbox
        for _ in range(ack - self.acked):
            self.nbytes -= outbox.popleft().nbytes
        self._cursor = max(0, self._cursor - (ack - self.acked))
        self.acked = ack

    def _on_relayed(self, relayed: int) -> None:
        if relayed > self._relay_heard:
            self._relay_heard = relayed
            self._relay_idle = 0
            # What was forgiven has come after all, or another incarnation counted it.
            self._relay_sent = max(self._relay_sent, relayed)
        elif self._relay_sent > self._relay_heard:
            self._relay_idle += 1
            if self._relay_idle >= PATIENCE:
                self._relay_idle = 0
                self._relay_sent = self._relay_heard

    def _complain(self) -> None:
        if self.held:
            return
        expected = self.received + 1
        if self._nacked != expected:
            self._nacked = expected
            self.gaps += 1
            self.post(Nack(expected))

    def _on_nack(self, expected: int) -> None:
        if expected > self.posted + 1:
            raise RemoteProtocolError("nack", f"message {expected} missed, {self.posted} sent")
        # A Nack also acknowledges what lies before it; its header's ack has done that already.
        self._cursor = max(0, min(self._cursor, expected - self.acked - 1))

    # --- time ---------------------------------------------------------------------------------

    def tick(self, now: float) -> float:
        """Post the beat when it is due. Returns when to call again."""
        if now >= self._beat_at:
            # What a full link could not take yet is not worth saying twice.
            if len(self._control) < 4:
                self._beat()
            self._nacked = 0
            self._beat_at = now + self._settings.beat_s
        return self._beat_at

    def _beat(self) -> None:
        self._relay_told = self.relayed
        self.post(Beat(self.acked + self._cursor, self.load, self.relayed))


_CONTROL, _OUTBOX, _LANE = range(3)


def _relayed(frames: Sequence[bytes | memoryview]) -> int:
    """Bytes that one Relay carries."""
    return sum(map(len, frames))
