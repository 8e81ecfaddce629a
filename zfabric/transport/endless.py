"""Messages that never end: libzmq collects the frames of one before anybody sees it, without limit.

Nothing of ours knows of them, so the kernel is asked: a connection over which ENDLESS bytes have
come since the last look, and of which no message has been read meanwhile, is shut down, and libzmq
gives back what it had collected.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress

ENDLESS = 64 * 1024 * 1024
"""Bytes; a whole message of ours has 8 frames of 4 MiB at most."""

_RECEIVED = slice(128, 136)
"""Where struct tcp_info of Linux has tcpi_bytes_received."""


class EndlessMessages:
    """Looks at a listener's TCP connections now and then."""

    def __init__(self) -> None:
        self.watched: set[bytes] = set()
        """Peers that sent much before the last look; a listener takes them out with a message."""
        self._counted: dict[int, int] = {}

    def look(self, descriptors: Iterable[int], peers: Mapping[int, bytes]) -> int:
        """Shut down those in question. Returns how many.

        descriptors: all open connections.  peers: whose they are, where a peer is known.
        """
        counted: dict[int, int] = {}
        watched: set[bytes] = set()
        n_shut = 0
        for descriptor in descriptors:
            try:
                connection = socket.socket(fileno=os.dup(descriptor))
            except OSError:  # closed meanwhile by libzmq's thread, which owns it
                continue
            with connection:
                received = _received(connection)
                counted[descriptor] = received
                if received - self._counted.get(descriptor, 0) < ENDLESS:
                    continue
                peer = peers.get(descriptor)
                if peer is not None and peer not in self.watched:
                    watched.add(peer)
                    continue
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                    n_shut += 1
        self._counted = counted
        self.watched = watched
        return n_shut


def _received(connection: socket.socket) -> int:
    """Bytes that a connection has brought so far; 0 where nobody knows."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return 0
    try:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except (OSError, AttributeError):
        return 0
    return int.from_bytes(told[_RECEIVED], "little")
