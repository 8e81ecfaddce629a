"""Which stored values a slot keeps mapped, as its supervisor knows it.

A mapping costs a fault for every few pages that are touched for the first time, which for a large
value is as long as reading it. So a slot keeps the mappings of values that were read lately, and
the next row that reads one finds its pages in place. The supervisor decides: slots do what they
are told, in the order in which they are told, so nothing has to be asked.

Kept memory is free while the store has the value. What is kept of a value that left the store is
lost to its limit until the slot reads the order to let go, between two rows: hence the bounds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

MOST = 64
"""Mappings per slot: each takes a descriptor there."""


class KeptMappings:
    """One slot's.  nbytes: of all that it keeps."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, tuple[int, int]] = OrderedDict()
        """Serial number of the memory and bytes by value, the least recently used first."""
        self.nbytes = 0

    def has(self, id_: int, serial: int) -> bool:
        """Whether the slot has this very memory mapped; counts as a use."""
        kept = self._kept.get(id_)
        if kept is None or kept[0] != serial:
            return False
        self._kept.move_to_end(id_)
        return True

    def add(self, id_: int, serial: int, nbytes: int) -> None:
        """The slot is about to map this memory, in place of what it had under this id."""
        self.discard((id_,))
        self._kept[id_] = (serial, nbytes)
        self.nbytes += nbytes

    def trim(self, limit: int) -> list[int]:
        """What the slot has to let go to stay within `limit` bytes; it is forgotten here."""
        gone: list[int] = []
        while self.nbytes > limit or len(self._kept) > MOST:
            gone.append(next(iter(self._kept)))
            self.discard(gone[-1:])
        return gone

    def discard(self, ids: Iterable[int]) -> list[int]:
        """Forget these; which of them the slot has mapped."""
        found = []
        for id_ in ids:
            kept = self._kept.pop(id_, None)
            if kept is not None:
                self.nbytes -= kept[1]
                found.append(id_)
        return found
