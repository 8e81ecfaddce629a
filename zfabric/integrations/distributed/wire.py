"""An endpoint of zfabric's transport in an event loop.

A ZeroMQ socket has a descriptor that becomes readable when something *changed*, and any call may
swallow that news. So whoever was woken takes all there is, and whoever has sent looks whether
something came meanwhile. That costs a microsecond and no thread: a thread of our own would have to
win the GIL once more for each message, which is what this transport is there to avoid.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import zmq

from zfabric.errors import TransportError

_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_get: Any = zmq.backend.Socket.get

STUCK_S = 0.02
"""Credit keeps the queues below their marks, so a full one is an exception: look again then."""


class Wire:
    """Watches an endpoint for its owner.

    take: takes all that the endpoint has; called in the loop whenever it may have something.
    """

    def __init__(self, endpoint: Any, take: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._socket = endpoint.pollable
        self._descriptors = [int(self._socket.get(zmq.FD)), int(endpoint.side_pollable)]
        self._pending = False
        self._retry: asyncio.TimerHandle | None = None
        self.closed = False
        self._loop.add_reader(self._descriptors[0], self._news)
        self._loop.add_reader(self._descriptors[1], self._side_news)

    def sent(self) -> None:
        """Call after sending: messages may have come whose news the call swallowed."""
        if not self._pending and not self.closed and _get(self._socket, _EVENTS) & _POLLIN:
            self._soon()

    def stuck(self) -> None:
        """Call when a send was refused, to be called again."""
        if self._retry is None and not self.closed:
            self._retry = self._loop.call_later(STUCK_S, self._try_again)

    def close(self, linger_s: float) -> None:
        """Close the endpoint, from whatever thread."""
        if self.closed:
            return
        self.closed = True
        if threading.get_ident() == self._thread or self._loop.is_closed():
            self._shut(linger_s)
        else:
            try:
                self._loop.call_soon_threadsafe(self._shut, linger_s)
            except RuntimeError:  # the loop was closed in between
                self._shut(linger_s)

    def _shut(self, linger_s: float) -> None:
        if self._retry is not None:
            self._retry.cancel()
        if not self._loop.is_closed():
            for descriptor in self._descriptors:
                self._loop.remove_reader(descriptor)
        self._endpoint.close(linger_s)

    def _news(self) -> None:
        if self.closed:
            return
        try:
            self._take()
        except TransportError:  # closed under our hands, at the loop's end
            return
        if not self.closed:
            self.sent()

    def _side_news(self) -> None:
        self._endpoint.stir()
        self._news()

    def _soon(self) -> None:
        self._pending = True
        self._loop.call_soon(self._now)

    def _now(self) -> None:
        self._pending = False
        self._news()

    def _try_again(self) -> None:
        self._retry = None
        self._news()
