"""One comm's end of the wire: what waits to leave, what came, and whether it still stands.

What comes is put in its place as it comes, while it is in the caches, also when nobody reads yet:
credit bounds that. So a reader is woken once per message, and a message that was handed over whole
before its sender closed is here, even if parts of it lay in the sender's memory.

A link lives in one event loop. Below it is a `send` that takes one transport message or says that
it cannot now, and somebody who calls `arrived`, `lost` and `flush`. A dialled link has a socket of
its own; those that a listener accepted share one.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from distributed.protocol.utils import host_array

from zfabric.errors import CodecError, TransportError
from zfabric.integrations.distributed.flow import Flow, weight
from zfabric.integrations.distributed.framing import (
    CLOSE,
    CREDIT,
    DATA,
    FETCHED,
    MEMORY,
    MOST_TOLD,
    NEIGHBOUR,
    PACKED,
    RAW,
    SPAN,
    Assembly,
    Held,
    Messages,
    n_fetched,
    small,
    spans_of,
)
from zfabric.integrations.distributed.memory import Cell, Neighbour

_U64 = struct.Struct("<Q")

_REPORT = 8 * 1024 * 1024
"""Bytes of a fetched piece of which the peer hears at once."""

_REPORT_S = 0.005
"""Smaller ones wait so long for a message of ours to go along with: a word of its own takes 50 us
here and wakes the peer, where the answer of 1 MB comes 0.1 ms sooner without."""


class LinkEnded(Exception):
    """Nothing more comes by this link, or leaves by it. The text says why."""


class Link:
    """See the module.

    send: takes the frames of one transport message; False if it cannot now. Raises
        TransportError when the connection is gone.
    dispose: called once, when nothing of the link is left to do; its argument says how many
        seconds what was sent may still need to leave.
    """

    def __init__(
        self, send: Callable[[Sequence[Any]], bool], dispose: Callable[[float], None]
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self.flow = Flow()
        self.ended: str | None = None
        """Why nothing more is sent, and nothing comes beyond what is in the inbox."""
        self._send = send
        self._dispose = dispose
        self._disposed = False
        self.fetched = False
        """The peer can read our memory, so large frames need not travel."""
        self._inbox: deque[tuple[list[memoryview], int]] = deque()  # messages, and what they spent
        self._assembly: Assembly | None = None  # the message that is on its way in
        self._uneaten = 0  # what it spent so far that was not given back
        self._neighbour: Neighbour | None = None
        self._unreported = 0  # pieces fetched of which the peer was not told
        self._reporting: asyncio.TimerHandle | None = None
        self._cell: Cell | None = None
        self._held: deque[Any] = deque()  # pieces of our memory that the peer has yet to fetch
        self._outbox: deque[Messages] = deque()
        self._next: Sequence[Any] | Held | None = None  # of the outbox, refused by the socket
        self._reader: asyncio.Future[None] | None = None
        self._writers: list[asyncio.Future[None]] = []
        self._closers: list[asyncio.Future[None]] = []

    @property
    def is_read(self) -> bool:
        """Whether somebody waits for a message, and so hears of the end."""
        return self._reader is not None

    # --- out ----------------------------------------------------------------------------------

    async def write(self, messages: Messages) -> bool:
        """Send these; returns when all are handed to the transport.

        False if the link had ended, or did so at once. Raises LinkEnded if it ends while they wait.
        """
        if self.ended is None:
            self._outbox.append(messages)
            self.flush()
        waited = False
        while self._outbox:
            waited = True
            writer = self.loop.create_future()
            self._writers.append(writer)
            await writer
        if waited and self.ended is not None:
            raise LinkEnded(self.ended)
        return self.ended is None

    def flush(self) -> None:
        """Send what credit and the socket allow."""
        outbox, flow = self._outbox, self.flow
        try:
            while outbox and flow.credit > 0:
                message = self._next
                if message is None:
                    message = next(outbox[0], None)
                    if message is None:
                        outbox.popleft()
                        continue
                if self._unreported:  # as the middle of a message cannot tell, or it was refused
                    self._report()  # ahead of it, as one wake-up there
                if type(message) is Held:
                    taken, nbytes = self._send(message.words), message.nbytes
                    if taken:
                        self._held.append(message.pieces)
                else:
                    taken, nbytes = self._send(message), len(message[-1])
                if not taken:
                    self._next = message
                    return
                self._next = None
                flow.spend(nbytes, monotonic())
        except TransportError as exc:
            self.end(str(exc))
            return
        if not outbox and self._writers:
            self._wake(self._writers)

    def say(self, *message: bytes) -> None:
        """Send a word that needs no credit, ahead of everything; dropped if that is impossible."""
        try:
            self._send(message)
        except TransportError as exc:
            self.end(str(exc))

    # --- in -----------------------------------------------------------------------------------

    async def read(self) -> list[memoryview]:
        """The next message's frames, writable. Raises LinkEnded."""
        while not self._inbox:
            if self.ended is not None:
                raise LinkEnded(self.ended)
            # What follows of a message that somebody waits for is given back as it comes, or one
            # that is larger than all credit would never be complete.
            spent, self._uneaten = self._uneaten, 0
            self._give_back(spent)
            self._reader = self.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        frames, spent = self._inbox.popleft()
        self._give_back(spent)
        return frames

    def _give_back(self, spent: int) -> None:
        back = self.flow.eat(spent) if spent else 0
        if back and self.ended is None:
            self.say(CREDIT, _U64.pack(back))

    def arrived(self, message: Sequence[Any]) -> None:
        """The transport brought a message."""
        if self.ended is not None:
            return
        tag = message[0]
        try:
            if tag[:1] == DATA or tag == RAW or tag == PACKED or tag == MEMORY:
                self._add(tag, message)
            elif tag == CREDIT:
                self.flow.refund(_U64.unpack(message[1])[0], monotonic())
                self.flush()
            elif tag == FETCHED:
                self._let_go(_U64.unpack(message[1])[0])
            elif tag == NEIGHBOUR:
                self.meet(message[1])
                self.fetched = True
            elif tag == CLOSE:
                reason = bytes(message[1]).decode(errors="replace") if len(message) > 1 else ""
                self.end(reason or "closed by the peer")
                self.dispose(0.0)
        except (ValueError, TypeError, IndexError, struct.error, CodecError, MemoryError) as exc:
            self.abort(f"the peer sent what makes no sense: {exc}")
        except OSError as exc:
            self.abort(str(exc))

    def _add(self, tag: Any, message: Sequence[Any]) -> None:
        """Data: the head of a message, or more of the one that is on its way."""
        assembly = self._assembly
        nbytes = len(message[-1])
        if assembly is None:
            head = message[0]
            pieces = n_fetched(head)
            if pieces:
                self._let_go(pieces)
            if len(message) == 3:
                self._gather(*message)
                return
            frames = small(head)
            if frames is not None:
                self._complete(frames, nbytes)
                return
            self._assembly = assembly = Assembly(head, host_array)
        elif tag == RAW:
            assembly.add(message[1])
        elif tag == PACKED:
            assembly.add_packed(message[1], message[2])
        elif tag == MEMORY and self._neighbour is not None:
            address, nbytes = SPAN.unpack(message[1])
            self._neighbour.fetch(address, assembly.room(nbytes))
            self._fetched(nbytes)
        else:
            raise ValueError("a new message before the last one was complete")
        if not assembly.missing:
            self._assembly = None
            self._complete(assembly.frames, nbytes)
        elif self._reader is not None and not self._reader.done():
            self._give_back(weight(nbytes))
        else:
            self._uneaten += weight(nbytes)

    def _gather(self, head: Any, spans: Any, joined: Any) -> None:
        """A message in one, of which the large frames lie in the peer's memory."""
        if self._neighbour is None:
            raise ValueError("a message that lies in memory which was not offered")
        assembly = Assembly(head, host_array)
        nbytes = assembly.missing
        rest = memoryview(joined)
        for address, length in spans_of(spans):
            if address:
                self._neighbour.fetch(address, assembly.room(length))
            else:
                if not 0 < length <= len(rest):
                    raise ValueError(f"{length} bytes wanted of {len(rest)} that came")
                assembly.add(rest[:length])
                rest = rest[length:]
        if assembly.missing or rest:
            raise ValueError(f"{assembly.missing} bytes are missing and {len(rest)} left over")
        self._fetched(nbytes)
        self._complete(assembly.frames, nbytes)

    def _complete(self, frames: list[memoryview], nbytes: int) -> None:
        """A message is here; its last part had so many bytes."""
        self._inbox.append((frames, self._uneaten + weight(nbytes)))
        self._uneaten = 0
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # --- a neighbour's memory -----------------------------------------------------------------

    def offer(self) -> bytes:
        """What a peer on this host needs to read our memory."""
        if self._cell is None:
            self._cell = Cell()
        return self._cell.offer

    def meet(self, offer: Any) -> None:
        """The peer offers its memory; if we can read it, it hears so, with the same offer of ours.

        Does nothing where that was done, or cannot be.
        """
        if self._neighbour is None:
            try:
                self._neighbour = Neighbour(offer)
            except OSError:
                return
            self.say(NEIGHBOUR, self.offer())

    def _fetched(self, nbytes: int) -> None:
        """Let the peer drop what we have: at once if it is much, else with our next message."""
        self._unreported += 1
        if nbytes >= _REPORT:
            self._report()
        elif self._reporting is None:
            self._reporting = self.loop.call_later(_REPORT_S, self._report)

    def told(self) -> int:
        """How many fetched pieces the message tells of that is made now, up to MOST_TOLD."""
        pieces = min(self._unreported, MOST_TOLD)
        if pieces:
            self._unreported -= pieces
            self._calm()
        return pieces

    def _report(self) -> None:
        self._calm()
        pieces, self._unreported = self._unreported, 0
        if pieces and self.ended is None:
            self.say(FETCHED, _U64.pack(pieces))

    def _calm(self) -> None:
        if self._reporting is not None:
            self._reporting.cancel()
            self._reporting = None

    def _let_go(self, pieces: int) -> None:
        if not 0 < pieces <= len(self._held):
            raise ValueError(f"{pieces} pieces fetched of {len(self._held)}")
        for _ in range(pieces):
            self._held.popleft()
        if not self._held:
            self._wake(self._closers)

    def lost(self) -> None:
        """The transport says that the connection is gone."""
        self.end("the connection to the peer is gone")
        self.dispose(0.0)

    # --- the end ------------------------------------------------------------------------------

    def end(self, reason: str) -> None:
        """Nothing more is sent; what came can still be read."""
        if self.ended is not None:
            return
        self.ended = reason
        self._outbox.clear()
        self._next = None
        self._assembly = None
        self._drop_memory()
        self._wake(self._writers)
        self._wake(self._closers)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def close(self, patience_s: float) -> None:
        """Let what was written leave, tell the peer, and end. Never raises for a peer's sake."""
        deadline = monotonic() + patience_s
        while self.ended is None and (self._outbox or self._held) and monotonic() < deadline:
            waiter = self.loop.create_future()
            (self._writers if self._outbox else self._closers).append(waiter)
            await asyncio.wait([waiter], timeout=deadline - monotonic())
        self.abort("closed here", linger_s=5.0)

    def abort(self, reason: str = "closed here", linger_s: float = 1.0) -> None:
        """Tell the peer, and end now: what was not sent yet is dropped, what came as well."""
        if self.ended is None:
            self.say(CLOSE)
        self.end(reason)
        self._inbox.clear()
        self.dispose(linger_s)

    def dispose(self, linger_s: float) -> None:
        """Give up the place in the socket, or the socket. Doing it twice is fine."""
        if not self._disposed:
            self._disposed = True
            self._drop_memory()
            self._dispose(linger_s)

    def _drop_memory(self) -> None:
        if self._reporting is not None and not self.loop.is_closed():
            self._reporting.cancel()
            self._reporting = None
        if self._cell is not None:
            self._cell.wipe()  # first: whoever still fetches must find out
        self._held.clear()

    def _wake(self, waiters: list[asyncio.Future[None]]) -> None:
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        waiters.clear()
