"""A slot's end of the pipe that takes its stdout and stderr: who wrote what.

All bytes written to descriptors 1 and 2 go into one pipe, those of C libraries and of processes
that a task starts as well. What Python writes by sys.stdout and sys.stderr is exact: a mark goes
ahead of it when another task writes, or by the other stream. For the rest, a mark follows when the
slot reports rows and anything was written: "what has no other owner was that row's". While rows
write, the slot reports them one by one; see Slot._flush. Silent rows cost one ioctl per report.

A mark is MARK, random bytes that only the two ends know, and WRITER.
"""

from __future__ import annotations

import io
import os
import sys
from array import array
from fcntl import ioctl
from struct import Struct
from termios import FIONREAD
from typing import Any

from zfabric.runtime import slot_protocol as p
from zfabric.runtime.slot_context import SlotContext

MARK = b"\0zf\1"
MARK_NBYTES = len(MARK) + 8
WRITER = Struct("<BQI")
"""1 or 2: what follows is from that stream. 0: the end of the row.  Then task id and attempt; id 0:
no row runs, it is the worker's own."""


class Streams:
    """Descriptors 1 and 2 of this process, which are the pipe's end."""

    def __init__(self, secret: bytes, context: SlotContext, words: memoryview) -> None:
        """secret: 8 bytes.  words: of the page."""
        self._mark = MARK + secret
        self._context = context
        self._words = words
        self._writer: tuple[int, int, int] | None = None
        """Whose mark stands in the pipe."""
        self._waiting = array("i", [0])
        self._n_known = 0
        """Bytes that had been written when the last mark was, with that mark."""
        self._texts = [self._text(1), self._text(2)]
        self.mend()

    def _text(self, number: int) -> Any:
        """Unbuffered: a process that dies has said all that it printed."""
        stream = io.TextIOWrapper(
            _Raw(number, self),  # type: ignore[arg-type]
            encoding="utf-8",
            errors="backslashreplace",
            write_through=True,
        )
        stream.mode = "w"
        return stream

    def mend(self) -> bool:
        """Set sys.stdout and sys.stderr; whether they were others, or closed."""
        for at, text in enumerate(self._texts):
            if text.closed:
                self._texts[at] = self._text(at + 1)
        texts = self._texts
        if [sys.stdout, sys.stderr] == texts:
            return False
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = texts
        return True

    def write(self, number: int, data: bytes | memoryview) -> None:
        """Write to a stream on behalf of the row that runs."""
        words, context = self._words, self._context
        if words[p.FINISHED] >= words[p.CLAIMED]:
            writer = (number, 0, 0)
        else:
            writer = (number, context.task_id, context.attempt)
        if writer != self._writer:
            self._writer = writer
            # In one piece with its mark: pipes keep pieces of up to 4 KiB together.
            data = b"%b%b%b" % (self._mark, WRITER.pack(*writer), bytes(data))
        left = memoryview(data)
        while left:
            left = left[os.write(number, left) :]

    def end_of_row(self) -> bool:
        """The last row that began has ended, and its report is about to leave. Whether anything
        was written since the last report."""
        words, known = self._words, self._n_known
        try:
            in_flight, n_read = words[p.READING], words[p.HEARD]
            ioctl(1, FIONREAD, self._waiting)
        except OSError:  # a task has closed it
            return False
        total = n_read + self._waiting[0]
        if total == known and self._writer is None and not in_flight and not words[p.READING]:
            return False  # else: it may be that something was written, and a mark does no harm
        self._writer = None
        context = self._context
        data = self._mark + WRITER.pack(0, context.task_id, context.attempt)
        try:
            os.write(1, data)
        except OSError:
            return False
        self._n_known = words[p.WROTE] = max(total, known) + len(data)
        return True


class _Raw(io.RawIOBase):
    """What is below sys.stdout or sys.stderr."""

    def __init__(self, number: int, streams: Streams) -> None:
        self._number = number
        self._streams = streams
        self.name = ("", "<stdout>", "<stderr>")[number]

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        self._streams.write(self._number, data)
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number
