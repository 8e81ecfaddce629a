"""What the worker's machine knows of each slot, and of each row that has dependencies.

An *entry* is a row as the machine keeps it, a plain tuple, because a worker sees a hundred
thousand of them per second: (id, attempt, function id, payload), or with a Linked as fifth:
rows with dependencies or a time limit.
"""

from __future__ import annotations

from collections import deque
from typing import Any

Entry = tuple[Any, ...]

STUCK_S = 0.003
"""A slot that has not reported for so long is in a long row: slots report after 1 ms of work."""

NOWHERE = -1
"""Linked.home: none of the rows that it waits for is in a slot."""
SCATTERED = -2
"""Linked.home: they are in several slots, or their results will not stay there."""


class Linked:
    """What only some rows have: dependencies, a time limit.

    values: one per dependency, as SendRows tells; None while it is not here.
    deps: their ids.  need: how many are not here yet.
    home, near: the slot in which `near` of those are, in line to run, with their results kept.
    sent: the row itself is in a slot.  limit_s: how long it may run; 0.0: as long as it likes.
    """

    __slots__ = ("deps", "home", "limit_s", "near", "need", "sent", "values")

    def __init__(self) -> None:
        self.deps: list[int] = []
        self.values: list[Any] = []
        self.need = 0
        self.home = NOWHERE
        self.near = 0
        self.sent = False
        self.limit_s = 0.0


class SlotRecord:
    """One slot.

    sent: entries in it that it has not reported, in the order in which they run; all but the
    first may not have begun.  followers: entries that may be sent behind those they wait for.
    quiet_since: when it last reported, or got its first row after being idle; seconds.
    peek_at, peek_pause: when to look for results that it keeps to itself, and how long after
    that again.  check_at: when to look whether its first row has run too long, if it may.
    """

    __slots__ = (
        "asked",
        "bare",
        "blocked",
        "check_at",
        "doomed",
        "followers",
        "functions",
        "kill_at",
        "kill_pause",
        "nbytes",
        "number",
        "parked",
        "peek_at",
        "peek_pause",
        "quiet_since",
        "resetting",
        "sent",
        "started",
        "verdict",
    )

    def __init__(self, number: int, now: float) -> None:
        self.number = number
        self.sent: deque[Entry] = deque()
        self.followers: deque[Entry] = deque()
        self.functions: set[int] = set()
        self.nbytes = 0.0
        """Of the payloads in `sent`, about."""
        self.started = False
        self.blocked = False
        self.parked = False
        """It ends what it has and gets nothing new: there are slots enough."""
        self.asked = 0
        """Rows that a TakeBack on its way asks for. Until it is known how many came of it nothing
        may be sent: what is taken are the last rows sent, and which those are must not change."""
        self.resetting = False
        """Rows were taken back, and it has not said yet that it knows."""
        self.bare = False
        """No row can be taken back: those in it have begun, or were asked for in vain."""
        self.doomed: Entry | None = None
        """The row because of which it is to be killed. It gets no other one meanwhile."""
        self.verdict: tuple[int, str] | None = None
        """How that row then ends, and why; None: as one that nobody wants."""
        self.kill_at = self.kill_pause = 0.0
        """When to ask again for its death, as the row may only just have begun or ended."""
        self.heard(now)

    def heard(self, now: float) -> None:
        """It reported, or has its first row."""
        self.quiet_since = now
        self.peek_at = now + STUCK_S
        self.peek_pause = STUCK_S
        self.check_at = 0.0

    @property
    def takes_rows(self) -> bool:
        """Whether rows may be sent to it."""
        return self.started and not (
            self.blocked or self.parked or self.resetting or self.asked or self.doomed
        )
