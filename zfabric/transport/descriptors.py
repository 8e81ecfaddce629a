"""A listener that keeps a few descriptors free, whoever connects.

Where none is left, libzmq's thread asks for the next connection again and again: it takes up to a
core, and newcomers wait until a stranger gives up. So connections whose peer has not said who it
is (a stranger's, or one that has only just dialled) are shut, the oldest first, as soon as so few
descriptors are left that the next burst might take them all. Who is connected is never shut, and
who was shut by mistake dials again.
"""

from __future__ import annotations

import os
import resource
import socket
from contextlib import suppress

MOST = 32
"""Descriptors that are kept free; of a low limit an eighth, at least:"""

LEAST = 4


class Strangers:
    """The connections of one listener whose peers are not known yet, in the order they came."""

    def __init__(self) -> None:
        self._waiting: dict[int, None] = {}
        self._shut: set[int] = set()
        """Connections that are shut, and that libzmq has yet to close."""
        self._room = 0
        """Descriptors that were free at the last look, less those that connections took since.
        Counting them takes microseconds per peer, so that is done only when this runs low."""

    def came(self, descriptor: int) -> None:
        """A connection was accepted."""
        self._waiting.pop(descriptor, None)
        self._waiting[descriptor] = None
        self._shut.discard(descriptor)
        self._room -= 1
        limit, spare = _limits()
        if descriptor >= limit - spare:
            # The kernel gives the lowest that is free: somebody has lowered the limit, or opened
            # many files.
            self._room = 0

    def known(self, descriptor: int) -> None:
        """Its peer has said who it is."""
        self._waiting.pop(descriptor, None)

    def left(self, descriptor: int) -> None:
        """A connection is closed."""
        self._waiting.pop(descriptor, None)
        self._shut.discard(descriptor)
        self._room += 1

    def thin_out(self) -> int:
        """Shut as many as are too many. Returns how many."""
        if not self._waiting:
            return 0
        limit, spare = _limits()
        if self._room >= 2 * spare:
            return 0
        self._room = limit - _n_open(limit)
        n_shut = min(spare - self._room - len(self._shut), len(self._waiting))
        for descriptor in list(self._waiting)[: max(0, n_shut)]:
            del self._waiting[descriptor]
            self._shut.add(descriptor)
            _shut(descriptor)
        return max(0, n_shut)


def _limits() -> tuple[int, int]:
    """Descriptors that this process may have, and how many of them are to stay free."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return 1 << 62, 0
    return limit, max(LEAST, min(MOST, limit // 8))


def _n_open(limit: int) -> int:
    """How many this process has; `limit` where not even this look finds a free one."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1
    except FileNotFoundError:  # not Linux
        return 0
    except OSError:
        return limit


def _shut(descriptor: int) -> None:
    """End a connection that libzmq's thread owns, which then closes it.

    No copy of the descriptor is made first, as there may be none left. If that thread has closed
    it in this very moment, its number may be another connection's already: that one dials again.
    """
    with suppress(OSError):
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
        try:
            connection.shutdown(socket.SHUT_RDWR)
        finally:
            connection.detach()
