"""How far ahead of need a worker asks for rows and hands them to its slots.

Both depths follow the duration of recent rows. A row of 5 us wants hundreds of companions, or
the slot stands still while messages are under way; a row of ten seconds wants none, because a
row waiting behind it could run elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable

SLOT_AHEAD_S = 0.004
"""Seconds of work in a slot's socket. A slot reports after 1 ms of work and the supervisor takes
up to 1 ms to answer when the machine is full, so 4 ms never run dry."""

SLOT_AHEAD_ROWS = 512
"""Rows ahead at most: 4 ms of rows of 8 us."""

LONG_S = 0.05
"""Above this a slot gets one row at a time: the hop of 0.1 ms between two is 0.2 %."""

MEMORY = 0.75
"""What one more row leaves of the weight of all earlier ones."""


class Pace:
    """The durations of rows, and what follows from them. row_s is 0.0 until the first ended."""

    __slots__ = ("_lookahead_s", "_max_rows", "row_s")

    def __init__(self, lookahead_s: float, max_rows: int) -> None:
        self.row_s = 0.0
        self._lookahead_s = lookahead_s
        self._max_rows = max_rows

    def sample(self, busy_s: float, n_rows: int) -> None:
        """`n_rows` rows took `busy_s` seconds of a slot."""
        mean = max(busy_s / n_rows, 1e-7)
        if self.row_s:
            kept: float = MEMORY**n_rows
            self.row_s = kept * self.row_s + (1.0 - kept) * mean
        else:
            self.row_s = mean

    def depth(self) -> int:
        """Rows that a slot holds at most, the running one included; >= 1."""
        row_s = self.row_s
        if not row_s:
            return 2
        if row_s >= LONG_S:
            return 1
        return 1 + max(1, min(SLOT_AHEAD_ROWS, int(SLOT_AHEAD_S / row_s)))

    def credit(self, n_slots: int, quiet_s: Iterable[float]) -> int:
        """Rows that the worker is willing to hold, running ones included.

        quiet_s: for each busy slot, the seconds since it last reported: its row has run for
        about so long. A slot stuck in a long row counts for that row alone.
        """
        row_s = self.row_s
        if not row_s:
            return 2 * n_slots
        lookahead_s = self._lookahead_s
        busy = list(quiet_s)
        ahead = max(0, n_slots - len(busy)) * lookahead_s / row_s
        for quiet in busy:
            ahead += lookahead_s / max(row_s, quiet)
        spare = 1 if row_s < 5 * LONG_S else 0
        return min(self._max_rows, n_slots + max(spare, int(ahead)))
