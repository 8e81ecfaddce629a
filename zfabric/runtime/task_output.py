"""What the tasks of one worker write: read from its slots, echoed, gathered for their clients."""

from __future__ import annotations

import logging
import select
import sys
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any

from zfabric.config import Settings
from zfabric.core.output import OutputBook
from zfabric.core.supervisor import Supervisor
from zfabric.messages import Output
from zfabric.runtime import slot_context
from zfabric.runtime.echo import Echo
from zfabric.runtime.slot_output import HOLD_S, Piece, SlotOutput
from zfabric.runtime.slots import Slots

LAST_READS = 4
"""Of a slot that has ended: a pipe holds less."""

UNSENT_NBYTES = 1 << 20
"""Bytes that may wait for the broker and still be joined by output."""

TELL_AGAIN_S = 0.1
"""Between two looks whether it is less."""


class TaskOutput:
    """by_fd: slot numbers by the descriptors of their pipes."""

    def __init__(self, slots: Slots, epoll: select.epoll, settings: Settings) -> None:
        self._slots = slots
        self._epoll = epoll
        self._echo = Echo()
        self._shows = settings.echo == "on"
        self._book = OutputBook()
        self.by_fd: dict[int, int] = {}
        self.paused: dict[int, float] = {}
        """Slots that wrote too much, and when to read them again."""
        self._holding: set[int] = set()
        """Slots that wrote what nobody's mark told of so far."""
        self._tell_at = 0.0
        self._streams: tuple[Any, Any] | None = None
        self._written: deque[tuple[int, int, int, bytes, float]] = deque()
        """What slots that are threads have written: the arguments of OutputBook.write."""

    # --- slots that are processes -------------------------------------------------------------

    def watch(self, number: int) -> None:
        """A slot was started."""
        output = self._slots.outputs.get(number)
        if output is not None:
            self.by_fd[output.fd] = number
            self._epoll.register(output.fd, select.EPOLLIN)

    def unwatch(self, number: int) -> None:
        """A slot is about to be given up, after last()."""
        output = self._slots.outputs.get(number)
        if output is not None and self.by_fd.pop(output.fd, 0):
            self.paused.pop(number, None)
            self._holding.discard(number)
            if not output.closed:
                self._epoll.unregister(output.fd)

    def read(self, number: int, machine: Supervisor, now: float) -> None:
        """The poller says that a slot has written something."""
        output = self._slots.outputs[number]
        self._take(number, output, machine, now)
        if output.closed:
            self._epoll.unregister(output.fd)
        elif output.pause_s and number not in self.paused:
            self.paused[number] = now + output.pause_s
            self._epoll.modify(output.fd, 0)

    def catch_up(self, number: int, machine: Supervisor, now: float) -> None:
        """A slot reports, or is looked at: what its rows wrote comes first."""
        output = self._slots.outputs.get(number)
        if output is not None and not output.closed:
            self._take(number, output, machine, now)

    def resume(self, machine: Supervisor, now: float) -> None:
        """Do what wake_at() was about."""
        for number in list(self._holding):
            output = self._slots.outputs[number]
            if not output.holds or now - output.held_at >= HOLD_S:
                self._let_go(number, output, machine, now)
        for number in [n for n, at in self.paused.items() if at <= now]:
            del self.paused[number]
            self._epoll.modify(self._slots.outputs[number].fd, select.EPOLLIN)

    def last(self, number: int, machine: Supervisor, now: float) -> str:
        """A slot has ended: the last lines of the row that ran in it, to tell how it came."""
        output = self._slots.outputs.get(number)
        if output is None:
            return ""
        for _ in range(LAST_READS):
            if not self._take(number, output, machine, now):
                break
        self._let_go(number, output, machine, now)
        return self._book.died(number, machine.first_row(number))

    def _take(self, number: int, output: SlotOutput, machine: Supervisor, now: float) -> bool:
        link = self._slots.links.get(number)
        if link is not None:
            link.reading()
        pieces = output.read(now)
        if link is not None:
            link.heard(output.n_read)
        self._keep_all(number, pieces, machine, now)
        if output.holds:
            self._holding.add(number)
        return output.n_read > 0

    def _let_go(self, number: int, output: SlotOutput, machine: Supervisor, now: float) -> None:
        self._holding.discard(number)
        self._keep_all(number, output.let_go(), machine, now)

    def _keep_all(self, number: int, pieces: list[Piece], machine: Supervisor, now: float) -> None:
        link = self._slots.links.get(number)
        for piece in pieces:
            row = piece.row
            if row is None and link is not None:
                row = machine.row_at(number, link.begun())
            self._keep(number, row, piece, now)

    def _keep(self, number: int, row: tuple[int, int] | None, piece: Piece, now: float) -> None:
        if not piece.data:
            self._book.end(number)
        elif row is not None and row[0]:
            self._book.write(number, *row, piece.data, now)
        elif not self._shows:
            # No task's, so the worker's own.
            self._echo.write(piece.stream or 2, piece.data, number)
        if self._shows and piece.data:
            self._echo.write(piece.stream or 1, piece.data, number)

    # --- slots that are threads ---------------------------------------------------------------

    def capture_threads(self, call_soon: Callable[..., None], clock: Callable[[], float]) -> None:
        """Tell what slots of this process write by sys.stdout and sys.stderr from what others do.
        Threads that a task starts, and what is written below Python, are not told apart."""

        def wrote(slot: int, id_: int, attempt: int, text: str) -> None:
            data = text.encode(errors="backslashreplace")
            self._written.append((slot, id_, attempt, data, clock()))
            call_soon(self._take_written)

        show = self._shows
        self._handler = _Handler(wrote)
        logging.getLogger().addHandler(self._handler)
        self._streams = (sys.stdout, sys.stderr)
        sys.stdout = ThreadStream(sys.stdout, wrote, show)
        sys.stderr = ThreadStream(sys.stderr, wrote, show)

    def ended(self, number: int) -> None:
        """A slot that is a thread has reported rows. What they wrote was written before that, also
        where nobody has looked at it."""
        if self._streams is not None:
            self._take_written()
            if self._book.waits:
                self._book.end(number)

    def _take_written(self) -> None:
        while self._written:
            self._book.write(*self._written.popleft())

    # --- towards the broker -------------------------------------------------------------------

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is to be done or told on this account, now or later."""
        return not (self._book.waits or self.paused or self._holding)

    def message(self, session: Any, now: float) -> Output | None:
        """What to post ahead of the ends of tasks."""
        if session.nbytes > UNSENT_NBYTES:
            self._tell_at = now + TELL_AGAIN_S
        if now < self._tell_at:
            return None  # the broker is away, or slow: what there is stays, in bounds
        return self._book.take(now)

    def wake_at(self, now: float, joined: bool) -> float:
        """When to take a turn on this account; infinity: no need.  joined: the broker listens."""
        wake = min(self.paused.values(), default=inf)
        for number in self._holding:
            wake = min(wake, self._slots.outputs[number].held_at + HOLD_S)
        return min(wake, max(self._book.wake_at(now), self._tell_at)) if joined else wake

    def close(self, machine: Supervisor, now: float) -> None:
        """Write what slots have written so far, and leave sys.stdout as it was."""
        for number, output in self._slots.outputs.items():
            if not output.closed:
                self._take(number, output, machine, now)
            self._let_go(number, output, machine, now)
        self._echo.close()
        if self._streams is not None:
            sys.stdout, sys.stderr = self._streams
            logging.getLogger().removeHandler(self._handler)


class _Handler(logging.Handler):
    """Log records of tasks in slots that are threads. The worker's own handler, which was made
    before sys.stderr was replaced, writes them too."""

    def __init__(self, wrote: Callable[[int, int, int, str], None]) -> None:
        super().__init__()
        self._wrote = wrote

    def emit(self, record: logging.LogRecord) -> None:
        context = slot_context.current()
        if context is not None and context.task_id:
            text = self.format(record)
            self._wrote(context.slot, context.task_id, context.attempt, f"{text}\n")


class ThreadStream:
    """sys.stdout or sys.stderr where slots are threads. All but write() is the stream's own."""

    def __init__(
        self, stream: Any, wrote: Callable[[int, int, int, str], None], show: bool
    ) -> None:
        self._stream = stream
        self._wrote = wrote
        self._show = show

    def write(self, text: str) -> int:
        context = slot_context.current()
        if context is None or not context.task_id:
            return int(self._stream.write(text))
        self._wrote(context.slot, context.task_id, context.attempt, text)
        return int(self._stream.write(text)) if self._show else len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
