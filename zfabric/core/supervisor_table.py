"""The rows and values of one worker: which row waits for what, and what goes back to the broker.

Shared by the two halves of the worker's machine: `core.supervisor` takes in what the broker, the
slots and the store say; `core.supervisor_slots` shares the ready rows out among the slots.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from zfabric.core.supervisor_effects import Effect
from zfabric.core.supervisor_rows import Entry


class RowTable:
    """What is here. All fields are read and changed by both halves."""

    def __init__(self) -> None:
        self.functions: dict[int, tuple[int, str, bytes]] = {}
        self.rows: dict[int, Entry] = {}
        """Every row that is here and wanted. One that is in a slot but not here was dropped, or
        what it waits for ended without a value."""
        self.ready: deque[Entry] = deque()
        self.waiters: dict[int, list[tuple[Entry, int]]] = {}
        """For a value that is not here: rows that need it, and as which of their values."""
        self.inline: dict[int, bytes] = {}
        self.given: dict[int, bytes] = {}
        """Small values that the broker sent ahead of the rows that need them."""
        self.held: dict[int, int] = {}
        """Values in the store, with their sizes."""
        self.fetching: set[int] = set()
        self.dropped: set[tuple[int, int]] = set()
        """(id, attempt) of rows that were dropped while they were in a slot. The broker hears of
        the end of each: it keeps what they occupy until then."""
        self.recalled: set[int] = set()
        self.returned: tuple[list[int], list[int]] = ([], [])
        """Ids and attempts of rows that go back to the broker at the end of this turn."""
        self.effects: list[Effect] = []

    def is_waiting(self, entry: Entry) -> bool:
        """Whether this very row is here and wanted, and not another attempt."""
        return self.rows.get(entry[0]) is entry

    def resolve(self, id_: int, value: Any) -> None:
        """A value is here: rows that only waited for it are ready, in front of those that came
        after them."""
        ready: list[Entry] = []
        for entry, index in self.waiters.pop(id_, ()):
            if self.rows.get(entry[0]) is not entry:
                continue
            linked = entry[4]
            linked.values[index] = value
            linked.need -= 1
            if linked.near:
                linked.near -= 1
            if not linked.need and not linked.sent:
                ready.append(entry)
        if ready:
            self.ready.extendleft(reversed(ready))

    def return_waiters(self, id_: int) -> None:
        """A row ended without a value: those that wait for it are given back, and so on."""
        ended = [id_]
        while ended:
            for entry, _ in self.waiters.pop(ended.pop(), ()):
                if self.rows.get(entry[0]) is entry:
                    del self.rows[entry[0]]
                    self.hand_back(entry)
                    ended.append(entry[0])

    def hand_back(self, row: Entry) -> None:
        """Tell the broker that this attempt will not run."""
        self.returned[0].append(row[0])
        self.returned[1].append(row[1])

    def was_dropped(self, entry: Entry) -> bool:
        """Whether a row that is in a slot no more was dropped there; that is then forgotten."""
        if not self.dropped or (entry[0], entry[1]) not in self.dropped:
            return False
        self.dropped.discard((entry[0], entry[1]))
        return True

    def give_back(self, entry: Entry) -> None:
        """The broker gets a row back that has not begun, unless that vanished with another."""
        if self.rows.get(entry[0]) is not entry:
            return
        del self.rows[entry[0]]
        self.hand_back(entry)
        self.return_waiters(entry[0])
