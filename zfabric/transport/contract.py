"""What every transport promises, and the one thing that waits for all of them.

A transport moves messages between a listener and the channels that dial it. A message is a
list of frames, a frame one contiguous buffer; what is in them is none of its business. What
all of them promise, and `zfabric.testing.contract` checks:

* Messages arrive whole, in order, at most once *per connection*. A connection that breaks takes
  an unknown number of the last messages with it, in both directions, and says so with `[]`.
  Counting, acknowledging and sending again is the session's work, not done here.
* No call blocks. `send` that cannot be taken now returns False with nothing sent; only
  `Poller.wait` waits.
* A full peer holds up nobody else.
* True from `send` says "taken", never "arrived".

An endpoint belongs to the thread that first sends or receives on it, for life. `Poller`s too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from zfabric.clock import now_s

if TYPE_CHECKING:
    import zmq

Buffer: TypeAlias = bytes | bytearray | memoryview
"""A frame on its way out: anything contiguous with the buffer protocol."""

PeerId: TypeAlias = bytes
"""A connection, as its listener names it: opaque, and never used again for another one."""

LARGE = 64 * 1024
"""Bytes. Frames from here on are neither copied on the way out (if immutable) nor on the way in:
below, a copy costs less than the bookkeeping that avoids it."""

REFUSED_KEY = "the key is not admitted there: it was revoked, or never added"
OTHER_KEYS = (
    "the handshake failed: one side has keys and the other has none, or this is another broker than"
    " the one that the key is for, or no zfabric broker at all"
)


class Capabilities(NamedTuple):
    """What a transport is good at, so that nobody above has to look at address schemes."""

    scheme: str
    ordered: bool
    """Messages of one connection arrive in the order they were sent."""
    copies: bool
    """The bytes are copied on their way (False: both ends may see the same memory)."""
    same_host: bool
    """Both ends are certainly on one host: compressing never pays."""
    max_frame: int
    """Bytes of the largest frame that is taken."""
    detects_close: bool
    """The death of either end's process is told in band, soon, as `[]`."""


class Endpoint(ABC):
    """What listeners and channels have in common: an address and a way to wait for them."""

    address: str
    """The real one, with the port filled in."""
    capabilities: Capabilities
    pollable: Any
    """A ZeroMQ socket or a file descriptor, readable when `recv` may have something."""
    side_pollable: Any = None
    """A second one, for transports whose connections come and go on another descriptor. Only
    `Poller` knows it; who waits on `pollable` alone hears of lost connections late."""

    def stir(self) -> None:  # noqa: B027 - most transports have no side_pollable
        """`Poller` calls this when `side_pollable` is readable, before it reports us ready."""

    def idle_s(self) -> float | None:
        """How long a Poller may sleep for our sake, in seconds; None: as long as it likes.

        0 says that `recv` has something which no descriptor shows. Above 0: a timer of ours is
        due then. A timer that is due (such as the next redial) is looked after in this very call.
        """
        return None

    @abstractmethod
    def close(self, linger_s: float = 0.0) -> None:
        """Free the address and all descriptors. Closing twice is fine.

        linger_s: seconds that messages already taken may still need to leave, behind our back or
        (where there is no thread to do it) while this call waits. What has not left by then is
        dropped, how much is unknown. Afterwards send and recv raise ChannelClosed.
        """


class Listener(Endpoint):
    """The side that has an address. Its peers are known once they are connected."""

    refused: int = 0
    """Connections that were turned away, or shut before they said who they are, for want of
    descriptors."""

    @abstractmethod
    def send(self, peer: PeerId, frames: Sequence[Buffer]) -> bool:
        """Hand one message over for a peer; never blocks.

        frames: at least one; each at most `capabilities.max_frame` bytes. Those of 64 KiB and
        more must not change afterwards if they are `bytes` or a read-only memoryview, for they
        are read later; others are copied.

        True: taken, as a whole; whether it arrives is unknown. False: the peer is full, nothing
        was sent. Raises ChannelClosed: the peer is gone (or this listener is closed), nothing was
        sent. FrameTooLarge: nothing was sent. ValueError: no frames.
        """

    @abstractmethod
    def recv(self) -> tuple[PeerId, list[bytes]] | None:
        """The next message and who sent it; None: nothing now; never blocks.

        Empty frames say that this peer's connection is gone: all that arrived from it came before,
        its PeerId will never be seen again, and what was sent to it last may not have arrived.
        (It may come for a peer that connected and never said a word.)
        Frames of 64 KiB and more may come as read-only memoryviews of the receive buffer
        (typed as bytes for the sake of all others); they hold its memory while they live.
        Raises ChannelClosed after close.
        """

    def shut_endless(self) -> int:
        """Shut down connections that bring bytes, and no messages, since the last call. Returns how
        many; 0 where the transport bounds messages itself."""
        return 0

    def user_of(self, peer: PeerId) -> str:
        """Whose key a peer came in with, as the keys of this listener name it; "" without keys."""
        return ""

    def evict(self, admits: Callable[[str], bool]) -> None:
        """Know the peers no longer whose user is not admitted: what they say is dropped."""


class Channel(Endpoint):
    """The side that dials. It dials again by itself, until it is closed."""

    trouble: str = ""
    """Why the last dial was turned down by the listener: `REFUSED_KEY`, `OTHER_KEYS` or "". Empty
    while connected, and where nothing answered at all."""

    @abstractmethod
    def send(self, frames: Sequence[Buffer]) -> bool:
        """Hand one message over for the listener; never blocks. Frames as in Listener.send.

        True: taken, as a whole; whether it arrives is unknown. False: full, or not connected now,
        or connected again while `recv` has yet to give `[]`; nothing was sent. (A Poller reports
        the channel when it becomes connected.) Raises ChannelClosed after close; FrameTooLarge,
        ValueError: nothing was sent.
        """

    @abstractmethod
    def recv(self) -> list[bytes] | None:
        """The next message's frames; None: nothing now; never blocks.

        `[]` says that the connection was lost: what was sent last may not have arrived, and what
        the listener sent last will not arrive. What `send` takes from then on goes over a new
        connection. Frames as in Listener.recv. Raises ChannelClosed after close.
        """


class Poller:
    """Waits until one of several endpoints, ZeroMQ sockets or file descriptors has something."""

    def __init__(self) -> None:
        import zmq

        self._poller: zmq.Poller = zmq.Poller()
        self._owner: dict[Any, Any] = {}  # what zmq polls -> what was added
        self._sides: dict[Any, Endpoint] = {}
        self._endpoints: list[Endpoint] = []

    def add(self, thing: Any) -> None:
        """Watch an endpoint, a ZeroMQ socket or a file descriptor for reading."""
        pollable = thing
        if isinstance(thing, Endpoint):
            pollable = thing.pollable
            if thing not in self._endpoints:
                self._endpoints.append(thing)
            if thing.side_pollable is not None:
                self._sides[thing.side_pollable] = thing
                self._poller.register(thing.side_pollable, 1)  # zmq.POLLIN
        self._owner[pollable] = thing
        self._poller.register(pollable, 1)

    def discard(self, thing: Any) -> None:
        """Watch it no longer. Does nothing for what is not watched. Call it before closing."""
        for watched in [p for p, owner in self._owner.items() if owner is thing or p is thing]:
            del self._owner[watched]
            self._poller.unregister(watched)
        for side in [p for p, owner in self._sides.items() if owner is thing]:
            del self._sides[side]
            self._poller.unregister(side)
        self._endpoints = [e for e in self._endpoints if e is not thing]

    def wait(self, timeout_s: float | None = None) -> list[Any]:
        """What was added and has something to read now; waits at most `timeout_s` (None: for ever).

        May also report what turns out to have nothing, so a `recv` that gives None is normal.
        An empty list: the time is over.
        """
        deadline = None if timeout_s is None else now_s() + timeout_s
        owner = self._owner
        while True:
            ready: list[Any] = []
            pause_s = timeout_s
            for endpoint in self._endpoints:
                idle_s = endpoint.idle_s()
                if idle_s is not None:
                    if idle_s <= 0.0:
                        ready.append(endpoint)
                    if pause_s is None or idle_s < pause_s:
                        pause_s = idle_s
            # Rounded up: a rest of 0.3 ms must not become a loop of polls with timeout 0.
            pause_ms = None if pause_s is None else math.ceil(pause_s * 1000.0)
            for pollable, _events in self._poller.poll(pause_ms):
                thing = owner.get(pollable)
                if thing is None:
                    thing = self._sides[pollable]
                    thing.stir()
                if thing not in ready:
                    ready.append(thing)
            if ready or pause_s == timeout_s:
                return ready
            # Only an endpoint's own timer was due: idle_s() lets it act, and we wait on.
            if deadline is not None:
                timeout_s = max(0.0, deadline - now_s())
