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
without an ack, so ZeroMQ's high-water mark is never reached. Acks ride on every message; where
nothing else is to be said, a Beat carries them after `window / 4` messages.

Both ends use this same class. It does no I/O and reads no clock.
"""

from __future__ import annotations

from collections import deque

from zfabric import wire
from zfabric.config import DEFAULTS, Settings
from zfabric.errors import RemoteProtocolError
from zfabric.messages import Beat, Message, Nack
from zfabric.wire import Body, Header

Frames = list[bytes | memoryview]

MAX_CONTROL = 1024
"""Unsequenced messages that wait for a link at most; older ones are dropped, as their senders
say them again when they still matter."""


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
        "_from_control",
        "_nacked",
        "_outbox",
        "_settings",
        "_starts",
        "_starts_epoch",
        "acked",
        "duplicates",
        "epoch",
        "gaps",
        "last_heard",
        "load",
        "posted",
        "received",
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
        self._control: deque[Body] = deque(maxlen=MAX_CONTROL)
        self._from_control = False
        self._starts: dict[int, bytes] = {}
        """The parts of headers that stay the same, by kind, for this epoch:"""
        self._starts_epoch = epoch
        self._ack_told = 0
        self._nacked = 0
        """The gap that was complained of last, so that each is named once per beat."""
        self._beat_at = now + settings.beat_s

    # --- sending ------------------------------------------------------------------------------

    def post(self, message: Message) -> int:
        """Queue a message; returns its number, 0 for one that is not sequenced."""
        body = wire.encode_body(message)
        if not body.sequenced:
            self._control.append(body)
            return 0
        self._outbox.append(body)
        self.posted += 1
        return self.posted

    def next_frames(self) -> Frames | None:
        """The next message due on the wire; None when there is none or the window is full."""
        if self._control:
            self._from_control = True
            body = self._control[0]
            seq = 0
        else:
            cursor = self._cursor
            if cursor >= len(self._outbox) or cursor >= self._settings.window:
                return None
            self._from_control = False
            body = self._outbox[cursor]
            seq = self.acked + cursor + 1
        starts = self._starts
        if self._starts_epoch != self.epoch:
            self._starts_epoch = self.epoch
            starts.clear()
        start = starts.get(body.kind)
        if start is None:
            start = starts[body.kind] = wire.header_start(body.kind, self.token, self.epoch)
        return [start + wire.header_end(seq, self.received), *body.frames]

    def sent(self) -> None:
        """The transport took what next_frames() gave."""
        if self._from_control:
            self._control.popleft()
        else:
            self._cursor += 1
        self._ack_told = self.received

    def reconnected(self) -> None:
        """The connection broke: whatever is unacked goes out again, behind a Beat that shows
        the other end where this session now lives."""
        self._cursor = 0
        self._nacked = 0
        self.post(Beat(self.acked, self.load))

    def pause(self) -> None:
        """The other end is not the one that we spoke with: until go_on() only what is not in
        sequence goes out."""
        self._cursor = len(self._outbox)
        self._control.clear()

    def go_on(self) -> None:
        """The other end begins anew, with our messages up to an ack that came with its first:
        its own are numbered from 1 again, and ours from there on go out again."""
        self.received = 0
        self._ack_told = 0
        self._nacked = 0
        self._cursor = 0

    @property
    def n_unacked(self) -> int:
        """Messages that the peer may not have."""
        return len(self._outbox)

    def unacked_nbytes(self) -> int:
        """Bytes kept for the peer. Counted anew each time, for moments when nothing moves."""
        return sum(body.nbytes for body in self._outbox)

    @property
    def has_unsent(self) -> bool:
        """Whether next_frames() would give one."""
        cursor = self._cursor
        return bool(self._control) or (
            cursor < len(self._outbox) and cursor < self._settings.window
        )

    # --- receiving ----------------------------------------------------------------------------

    def receive(self, header: Header, message: Message, now: float) -> bool:
        """Whether to hand the message to the machine. Beats and Nacks are handled here.

        Raises RemoteProtocolError when the peer acknowledges what was never sent.
        """
        self.last_heard = now
        if header.ack > self.acked:
            self._on_ack(header.ack)
        seq = header.seq
        if seq:
            if seq == self.received + 1:
                self.received = seq
                if seq - self._ack_told >= self._settings.window >> 2:
                    self.post(Beat(self._sent(), self.load))
                    self._ack_told = seq
                return True
            if seq <= self.received:
                self.duplicates += 1
            else:
                self._complain()
            return False
        if isinstance(message, Beat):
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
            outbox.popleft()
        self._cursor = max(0, self._cursor - (ack - self.acked))
        self.acked = ack

    def _complain(self) -> None:
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
                self.post(Beat(self._sent(), self.load))
            self._nacked = 0
            self._beat_at = now + self._settings.beat_s
        return self._beat_at

    def _sent(self) -> int:
        return self.acked + self._cursor
