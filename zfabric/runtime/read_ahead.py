"""Rows on their way to slots whose values are on disk: read back by a thread of its own.

A disk takes milliseconds or seconds. Meanwhile the worker's loop has beats to send and other slots
to serve, so a row waits here until its values are in memory, and the rows behind it for the same
slot wait as well: slots run rows in the order in which they were sent. Values of one row after the
other are read, not of all, or the first would be back on disk before the last is read.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeAlias

from zfabric.runtime.store import Store

Function: TypeAlias = tuple[int, str, bytes]
Send: TypeAlias = Callable[[list[Function], list[Any]], None]


class ReadAhead:
    """Lines of rows, one for each slot that has rows which wait.

    call_soon: has a function called in the thread that calls everything here.
    """

    def __init__(self, store: Store, call_soon: Callable[..., None]) -> None:
        self._store = store
        self._call_soon = call_soon
        self._lines: dict[int, _Line] = {}
        self._wanted: SimpleQueue[tuple[list[int], int, _Line] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, slot: int, functions: list[Function], rows: Sequence[Any], send: Send) -> None:
        """Have send(functions, rows) called, at once or in parts, in this order for each slot."""
        line = self._lines.get(slot)
        if line is None:
            if not any(len(row) > 4 and self._on_disk(row) for row in rows):
                send(functions, list(rows))
                return
            line = self._lines[slot] = _Line(send)
            line.add(functions, rows)
            self._go_on(slot, line)
        else:
            line.add(functions, rows)

    def take_back(self, slot: int, count: int) -> int:
        """Up to `count` of the rows sent last will not be sent; how many."""
        line = self._lines.get(slot)
        if line is None:
            return 0
        taken = min(count, len(line.rows))
        for _ in range(taken):
            line.rows.pop()
        return taken

    def drop(self, slot: int) -> None:
        """The slot is gone."""
        self._lines.pop(slot, None)

    def close(self) -> None:
        """End the thread, once it has read what it is reading."""
        self._lines.clear()
        if self._thread is not None:
            self._wanted.put(None)
            self._thread.join(5.0)

    def _on_disk(self, row: Any) -> list[int]:
        store = self._store
        return [v[0] for v in row[4] if type(v) is tuple and store.is_on_disk(v[0])]

    def _go_on(self, slot: int, line: _Line) -> None:
        """Send what can be sent now, and ask for the values of the row after."""
        if self._lines.get(slot) is not line:
            return  # that slot is gone
        ready: list[Any] = []
        ids: list[int] = []
        while line.rows:
            row = line.rows[0]
            # Once read they count as here: where memory is too short to keep them, who sends the
            # row reads them again rather than wait for ever.
            ids = [] if len(row) <= 4 or row is line.read else self._on_disk(row)
            if ids:
                break
            ready.append(line.rows.popleft())
        functions, line.functions = line.functions, []
        if ids:
            line.read = line.rows[0]
            self._start()
            self._wanted.put((ids, slot, line))
        else:
            del self._lines[slot]
        if ready or functions:
            line.send(functions, ready)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._read, name="zfabric-read-ahead", daemon=True
            )
            self._thread.start()

    def _read(self) -> None:
        """The thread."""
        while (wanted := self._wanted.get()) is not None:
            ids, slot, line = wanted
            for id_ in ids:
                with contextlib.suppress(OSError):  # who sends the row will say so
                    self._store.get(id_)
            self._call_soon(self._go_on, slot, line)


class _Line:
    """Rows for one slot that wait, functions that it has not been sent, and the row whose values
    are being read, or were."""

    __slots__ = ("functions", "read", "rows", "send")

    def __init__(self, send: Send) -> None:
        self.send = send
        self.functions: list[Function] = []
        self.rows: deque[Any] = deque()
        self.read: Any = None

    def add(self, functions: list[Function], rows: Sequence[Any]) -> None:
        self.functions += functions
        self.rows.extend(rows)
