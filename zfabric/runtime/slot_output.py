"""The supervisor's end of a slot's output pipe: reads it, in bounds, and says whose it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from zfabric.runtime.slot_streams import MARK, WRITER

READ_NBYTES = 1 << 16
"""At a time: what a pipe holds."""

RATE = 8 << 20
"""Bytes/s that are read of one slot; a task that writes more waits for us."""

BURST = 1 << 20


HOLD_S = 0.1
"""What nobody's mark tells of waits so long for one: rows end with a mark when they wrote such."""


class Piece(NamedTuple):
    """What one writer wrote.  stream: 1, 2; 0 when nobody knows.
    row: (task id, attempt); None: the row that runs now; task id 0: none.
    data: b"" at the end of the row.
    """

    stream: int
    row: tuple[int, int] | None
    data: bytes


class SlotOutput:
    """fd: the end to read, non-blocking; it is ours.  secret: as the slot was told."""

    def __init__(self, fd: int, secret: bytes) -> None:
        self.fd = fd
        self._mark = MARK + secret
        self._row: tuple[int, int] | None = None
        self._stream = 0
        self._rest = b""
        """The beginning of a mark that was cut off."""
        self._left = float(BURST)
        self._at = 0.0
        self._held = b""
        """What has no owner so far."""
        self.held_at = 0.0
        self.n_read = 0
        """Bytes of the last read()."""
        self.closed = False
        """Nobody holds the other end."""

    def read(self, now: float) -> list[Piece]:
        """What has been written; [] when there is nothing."""
        self._left = min(float(BURST), self._left + RATE * (now - self._at))
        self._at = now
        self.n_read = 0
        try:
            data = os.read(self.fd, READ_NBYTES)
        except BlockingIOError:
            return []
        self.closed = not data
        self.n_read = len(data)
        self._left -= len(data)
        return list(self._pieces(data))

    @property
    def holds(self) -> bool:
        """Whether something waits for a mark."""
        return bool(self._held)

    def let_go(self) -> list[Piece]:
        """What was held, as of the row that runs now: no mark will come soon."""
        held, self._held = self._held, b""
        return [Piece(0, None, held)] if held else []

    @property
    def pause_s(self) -> float:
        """How long to leave it alone; 0.0: not at all."""
        return max(0.0, -self._left / RATE)

    def _pieces(self, data: bytes) -> Iterator[Piece]:
        data = self._rest + data
        self._rest = b""
        mark, size = self._mark, WRITER.size
        first, *marked = data.split(mark)
        if marked and len(marked[-1]) < size:
            self._rest = mark + marked.pop()
        elif marked:
            self._rest = _beginning(marked[-1][size:], mark)
            marked[-1] = marked[-1][: len(marked[-1]) - len(self._rest)]
        else:
            self._rest = _beginning(first, mark)
            first = first[: len(first) - len(self._rest)]
        text = first
        for part in marked:
            stream, id_, attempt = WRITER.unpack_from(part)
            if self._row is not None:
                if text:
                    yield Piece(self._stream, self._row, text)
            else:
                self._hold(text)
                if not stream:
                    held, self._held = self._held, b""
                    if held:
                        yield Piece(0, (id_, attempt), held)
            if not stream:
                yield Piece(0, (id_, attempt), b"")
            self._row, self._stream = ((id_, attempt) if stream else None), stream
            text = part[size:]
        if self._row is None:
            self._hold(text)
        elif text:
            yield Piece(self._stream, self._row, text)
        if len(self._held) > READ_NBYTES:
            yield from self.let_go()

    def _hold(self, text: bytes) -> None:
        if text and not self._held:
            self.held_at = self._at
        self._held += text

    def close(self) -> None:
        os.close(self.fd)


def _beginning(data: bytes, mark: bytes) -> bytes:
    """What may be the beginning of a mark at the end of these bytes."""
    for n in range(min(len(mark) - 1, len(data)), 0, -1):
        if data.endswith(mark[:n]):
            return mark[:n]
    return b""
