"""Who waits for the broker's answers: user threads, each with an alarm and a place for them."""

from __future__ import annotations

import itertools

from zfabric.client.alarm import Alarm


class Questions:
    """Open questions by number. User threads put them in and take them out, the I/O thread answers.

    All its tables are changed by single operations, so no lock is needed.
    """

    def __init__(self) -> None:
        self.answers: dict[int, tuple[Alarm, list[bytes]]] = {}
        """Who waits for an Answer or a Reply, and where its payload is put."""
        self.lockers: dict[int, tuple[Alarm, list[tuple[bool, int]]]] = {}
        """Who waits for Locked, and where what it says is put: (held, lock_era)."""
        self._numbers = itertools.count(1)

    def new_number(self) -> int:
        """Of the next question."""
        return next(self._numbers)

    def answered(self, number: int, payload: bytes) -> None:
        """An answer has come. Where nobody waits any more it is dropped."""
        waiting = self.answers.get(number)
        if waiting is not None:
            waiting[1].append(payload)
            waiting[0]()

    def locked(self, number: int, told: tuple[bool, int]) -> bool:
        """A lock was given or refused. Returns whether somebody waits for that."""
        waiting = self.lockers.get(number)
        if waiting is None:
            return False
        waiting[1].append(told)
        waiting[0]()
        return True

    def wake_lockers(self) -> None:
        """They shall ask anew."""
        for alarm, _ in list(self.lockers.values()):
            alarm()

    def wake_all(self) -> None:
        """No answer will come."""
        for alarm, _ in list(self.answers.values()):
            alarm()
        self.wake_lockers()
