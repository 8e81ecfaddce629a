"""A session between two machines of one process and thread: nothing is packed, nothing is lost.

It answers to the same names as `core.session.Session`, for what owns one end: what is posted lies
in `inbox` until the other end takes it, in order, within the same turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import inf

from zfabric.messages import Message
from zfabric.wire import Body, Header


class DirectSession:
    """One direction of a direct link; each end posts to its own.

    inbox: what the other end has not taken yet.  last_heard: for ever, as both ends live and die
    together.
    """

    __slots__ = ("acked", "epoch", "inbox", "last_heard", "load", "posted", "token")

    has_unsent = False
    n_unacked = 0
    n_control = 0
    is_full = False
    nbytes = 0
    """Nothing waits for a wire."""
    lane_nbytes = 0

    def __init__(self, token: int = 0, epoch: int = 0) -> None:
        self.token = token
        self.epoch = epoch
        self.inbox: deque[Message] = deque()
        self.last_heard = inf
        self.load: tuple[int, ...] = ()
        self.posted = 0
        self.acked = 0

    def post(self, message: Message) -> int:
        """Hand a message over; returns its number."""
        self.inbox.append(message)
        self.posted += 1
        return self.posted

    def next_frames(self) -> None:
        """Nothing ever goes on a wire."""
        return None

    def sent(self) -> None:
        """Never called, as next_frames() never gives anything."""

    def receive(self, header: Header, message: Message, now: float, nbytes: int = 0) -> bool:
        """Nothing ever comes from a wire."""
        return False

    def hold(self) -> None:
        """Nothing of it goes on a wire, so nothing is to be held."""

    def let_go(self) -> None:
        """Likewise."""

    def unacked(self, kind: int) -> list[Body]:
        """Nothing waits for an answer."""
        return []

    def repost(self, bodies: Iterable[Body]) -> None:
        """Never with any, as unacked() gives none."""

    def reconnected(self) -> None:
        """A link without a wire does not break."""

    def tick(self, now: float) -> float:
        """No beats: when one end stops, so does the other."""
        return inf
