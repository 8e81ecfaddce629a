"""Connections of a listener over which nothing has come for too long: their other end is gone.

Who dials asks for a sign of life by itself, every sixth of the time that is allowed, so that
something comes over each connection whose other end lives. The kernel knows when it last did: one
question per connection now and then is all that a listener spends on ten thousand peers. A timer
of libzmq's for each would take the whole of its thread, as that searches all timers to end one.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from math import inf
from os import dup

AT_ONCE = 500
"""Connections that one look asks for, at some 4 us each; the rest follow in further looks."""

PAUSE_S = 0.05
"""Between those."""

_LAST_RECEIVED = slice(52, 56)
"""Where struct tcp_info of Linux has tcpi_last_data_recv, in ms."""


class SilentConnections:
    """Looks at a listener's TCP connections."""

    def __init__(self, dead_s: float) -> None:
        """dead_s: after which time without a byte a connection is shut, to within a sixth."""
        self._dead_ms = dead_s * 1000.0
        self._every_s = dead_s / 6.0
        self._left: list[int] = []
        self.look_at = 0.0 if sys.platform == "linux" else inf
        """When to call `look`."""

    def look(self, descriptors: Iterable[int], now: float) -> None:
        """Shut those that are silent; libzmq then closes them.

        descriptors: all that are open. One that is closed meanwhile, and is another connection's by
        now, tells of that one.
        """
        left = self._left
        if not left:
            left.extend(descriptors)
        for descriptor in left[-AT_ONCE:]:
            try:
                copy = dup(descriptor)  # so that it stays what it is while we look
            except OSError:
                continue
            # As the family is given, none has to be asked for; the wrong one does no harm here.
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, copy) as connection:
                if _silent_ms(connection) > self._dead_ms:
                    with suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
        del left[-AT_ONCE:]
        self.look_at = now + (PAUSE_S if left else self._every_s)


def _silent_ms(connection: socket.socket) -> int:
    try:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64)
    except OSError:  # no TCP
        return 0
    return int.from_bytes(told[_LAST_RECEIVED], sys.byteorder)
