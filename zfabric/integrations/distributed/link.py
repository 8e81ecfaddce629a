"""One comm's end of the wire: what waits to leave, what came, and whether it still stands.

A link lives in one event loop. Below it is a `send` that takes one transport message or says that
it cannot now, and somebody who calls `arrived`, `lost` and `flush`. A dialled link has a socket of
its own; those that a listener accepted share one.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any

from zfabric.errors import CodecError, TransportError
from zfabric.integrations.distributed.flow import Flow
from zfabric.integrations.distributed.framing import (
    CLOSE,
    CREDIT,
    DATA,
    PACKED,
    RAW,
    Assembly,
)

_U64 = struct.Struct("<Q")


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
        self._inbox: deque[Sequence[Any]] = deque()
        self._outbox: deque[Iterator[Sequence[Any]]] = deque()
        self._next: Sequence[Any] | None = None  # taken from the outbox, refused by the socket
        self._reader: asyncio.Future[None] | None = None
        self._writers: list[asyncio.Future[None]] = []

    # --- out ----------------------------------------------------------------------------------

    async def write(self, messages: Iterator[Sequence[Any]]) -> None:
        """Send these; returns when all are handed to the transport. Raises LinkEnded."""
        if self.ended is None:
            self._outbox.append(messages)
            self.flush()
        while self._outbox:
            writer = self.loop.create_future()
            self._writers.append(writer)
            await writer
        if self.ended is not None:
            raise LinkEnded(self.ended)

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
                if not self._send(message):
                    self._next = message
                    return
                self._next = None
                flow.spend(len(message[-1]), monotonic())
        except TransportError as exc:
            self.end(str(exc))
            return
        if not outbox and self._writers:
            self._wake_writers()

    def say(self, *message: bytes) -> None:
        """Send a word that needs no credit, ahead of everything; dropped if that is impossible."""
        try:
            self._send(message)
        except TransportError as exc:
            self.end(str(exc))

    # --- in -----------------------------------------------------------------------------------

    async def read(self, host_array: Callable[[int], memoryview]) -> list[memoryview]:
        """The next message's frames, writable. Raises LinkEnded."""
        try:
            (head,) = await self._take()
            assembly = Assembly(head, host_array)
            while assembly.missing:
                tag, *rest = await self._take()
                if tag == RAW:
                    assembly.add(*rest)
                elif tag == PACKED:
                    assembly.add_packed(*rest)
                else:
                    raise ValueError("a new message before the last one was complete")
        except (ValueError, TypeError, CodecError) as exc:
            self.abort(f"the peer sent what makes no sense: {exc}")
            raise LinkEnded(self.ended) from exc
        return assembly.frames

    async def _take(self) -> Sequence[Any]:
        while not self._inbox:
            if self.ended is not None:
                raise LinkEnded(self.ended)
            self._reader = self.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        message = self._inbox.popleft()
        back = self.flow.eat(len(message[-1]))
        if back and self.ended is None:
            self.say(CREDIT, _U64.pack(back))
        return message

    def arrived(self, message: Sequence[Any]) -> None:
        """The transport brought a message."""
        if self.ended is not None:
            return
        tag = message[0]
        if tag[:1] == DATA or tag == RAW or tag == PACKED:
            self._inbox.append(message)
            if self._reader is not None and not self._reader.done():
                self._reader.set_result(None)
        elif tag == CREDIT:
            try:
                self.flow.refund(_U64.unpack(message[1])[0], monotonic())
            except (ValueError, struct.error, IndexError) as exc:
                self.abort(f"the peer sent what makes no sense: {exc}")
                return
            self.flush()
        elif tag == CLOSE:
            reason = bytes(message[1]).decode(errors="replace") if len(message) > 1 else ""
            self.end(reason or "closed by the peer")
            self.dispose(0.0)

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
        self._wake_writers()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def close(self, patience_s: float) -> None:
        """Let what was written leave, tell the peer, and end. Never raises for a peer's sake."""
        if self.ended is None and self._outbox:
            writer = self.loop.create_future()
            self._writers.append(writer)
            await asyncio.wait([writer], timeout=patience_s)
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
            self._dispose(linger_s)

    def _wake_writers(self) -> None:
        writers, self._writers = self._writers, []
        for writer in writers:
            if not writer.done():
                writer.set_result(None)
