"""How much one end of a comm may send, and how much it took in: credit in bytes.

Each end may have WINDOW bytes on their way that the other's user has not read. So a reader that
does not read holds up its own peer and nobody else, though all peers of a listener share a socket;
ZeroMQ's high-water marks are never reached, its I/O threads always read on, and its heartbeats
are answered even while Python is stuck.

No I/O, no clock: times are handed in.
"""

from __future__ import annotations

WINDOW = 64 * 1024 * 1024
"""Bytes. Enough for the link to stay busy while both ends wait for the GIL (two times 5 ms at
1 GB/s are 10 MB) and bounded per comm."""

LEAST = 64 * 1024
"""Bytes that a message counts at least, so that WINDOW also bounds small ones: 1024 of them."""

GIVE_BACK = WINDOW // 4
"""Bytes that were read before the sender is told: seldom, and well before it runs dry."""


def weight(nbytes: int) -> int:
    """What a message of so many bytes costs."""
    return nbytes if nbytes > LEAST else LEAST


class Flow:
    """The credit of one end. `rate` is the link's measured speed, bytes/s, None at first."""

    __slots__ = ("_busy_since", "credit", "eaten", "rate")

    def __init__(self) -> None:
        self.credit = WINDOW
        self.eaten = 0
        self.rate: float | None = None
        self._busy_since: float | None = None

    def spend(self, nbytes: int, now: float) -> None:
        """A message left. Allowed while `credit` is above 0."""
        if self._busy_since is None:
            self._busy_since = now
        self.credit -= weight(nbytes)

    def refund(self, nbytes: int, now: float) -> None:
        """The other end has read that many. Raises ValueError if it never got them."""
        if not 0 < nbytes <= WINDOW - self.credit:
            raise ValueError(f"{nbytes} bytes given back of {WINDOW - self.credit}")
        since = self._busy_since
        if since is not None and now > since:
            # What is read slowly makes the link look slow; hence the quickest of late counts.
            seen = nbytes / (now - since)
            old = self.rate or 0.0
            self.rate = max(seen, 0.9 * old + 0.1 * seen)
        self.credit += nbytes
        self._busy_since = None if self.credit == WINDOW else now

    def eat(self, nbytes: int) -> int:
        """Messages were read that spent so much. What to give back now, 0 if it can wait."""
        self.eaten += nbytes
        if self.eaten < GIVE_BACK:
            return 0
        eaten, self.eaten = self.eaten, 0
        return eaten
