"""A worker's slots as its loop sees them: what they say, what they are told, how they end.

`slots.py` starts processes and threads, `slot_link.py` speaks with one of them, `task_output.py`
reads what their tasks write. Here that meets the worker's machine: reports become its events, and
its effects about slots become writes. Whatever one slot brings about ends that slot alone.
"""

from __future__ import annotations

import logging
import os
import select
import struct
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic, monotonic_ns
from typing import Any

from zfabric.config import Settings
from zfabric.core.supervisor import Supervisor
from zfabric.core.supervisor_effects import (
    AgeOfRow,
    Effect,
    ForgetFunctions,
    KillRow,
    PeekSlot,
    SendRows,
    StartSlot,
    StopSlot,
    TakeBack,
)
from zfabric.errors import CodecError
from zfabric.runtime import slot_protocol as p
from zfabric.runtime.host_memory import resident
from zfabric.runtime.read_ahead import ReadAhead
from zfabric.runtime.slot_link import SlotLink
from zfabric.runtime.slot_memory import MemoryWatch
from zfabric.runtime.slots import Slots
from zfabric.runtime.store import Store
from zfabric.runtime.task_output import TaskOutput

log = logging.getLogger(__name__)

SLOT_ERRORS = (CodecError, OSError, IndexError, struct.error)
"""What one slot can bring about, by what it sends or for want of descriptors: it ends alone."""


class SlotKeeper:
    """Between the worker's machine and its slots.

    machine: what hears of them; another one from reset() on.  output: what their tasks write.
    fd: a descriptor that is readable when a slot has something to say.
    """

    def __init__(
        self,
        kind: str,
        machine: Supervisor,
        store: Store,
        settings: Settings,
        *,
        way_in: str,
        name: str,
        memory_limit: int,
        on_unreadable: Callable[[], None],
        call_soon: Callable[..., None],
    ) -> None:
        """kind: "process" or "thread".  way_in: what tasks make clients of this fabric with.
        memory_limit: bytes that a slot may take, 0: any.  on_unreadable: a row could not be sent,
        perhaps because a value could not be read.  call_soon: from any thread, has a function
        called in the one that calls this."""
        self.machine = machine
        self._store = store
        self._ahead = ReadAhead(store, call_soon)
        self._killed: dict[int, int] = {}
        """Tasks for which slots were killed that have not been seen to be dead."""
        self._way_in = way_in
        self._name = name
        self._inline_limit = settings.inline_limit
        self._log_level = settings.log_level
        self._on_unreadable = on_unreadable
        self._memory = MemoryWatch(memory_limit)
        self._epoll = select.epoll()
        self._slots = Slots(kind, capture=True)
        self.output = TaskOutput(self._slots, self._epoll, settings)
        self._slot_by_fd: dict[int, int] = {}
        self._exit_fds: dict[int, int] = {}
        """By slot number; see Slots.exit_fd."""
        self._events: list[tuple[int, int]] = []
        self.fd = self._epoll.fileno()

    def waits(self, most_s: float) -> bool:
        """Whether a slot says something within so short a time; read() then takes it in.

        The full Poller asks libzmq about four sockets, twice; for a lone short row, whose result
        is back before that is done, waiting for the slots alone saves a third of the turn.
        """
        self._events = self._epoll.poll(most_s)
        return bool(self._events)

    def configure(self, name: str, inline_limit: int) -> None:
        """What the broker has said of this worker; slots that start later hear it as well."""
        self._name, self._inline_limit = name, inline_limit
        for link in self._slots.links.values():
            self._configure(link)

    def look_at(self) -> float:
        """When look_at_memory() is due; infinity while it never is."""
        return self._memory.look_at(self.machine)

    def memory_nbytes(self) -> int:
        """Resident bytes of the slots' processes."""
        return sum(resident(str(pid)) for n in self._slots.links if (pid := self._slots.pid(n)))

    def reap(self) -> None:
        """Look for stopped slots that have ended."""
        self._slots.reap()

    def reset(self, machine: Supervisor) -> None:
        """End all slots, now; another machine hears of those that start from here on."""
        for number in list(self._slots.links):
            self._unwatch(number)
        self._slots.kill_all()
        self.machine = machine

    def close(self) -> None:
        """End all slots and what they started."""
        self._ahead.close()
        self.output.close(self.machine, monotonic())
        self._slots.kill_all()
        self._epoll.close()

    # --- what the machine asks for ------------------------------------------------------------

    def send_rows(self, effect: SendRows, now: float) -> None:
        """Rows for a slot."""
        number = effect.slot
        link = self._slots.links.get(number)
        if link is None:
            return  # it was given up while these effects were performed
        self._ahead.send(number, effect.functions, effect.rows, partial(self._send, link))

    def _send(
        self, link: SlotLink, functions: list[tuple[int, str, bytes]], rows: list[Any]
    ) -> None:
        try:
            link.send_rows(functions, rows, self._store)
        except SLOT_ERRORS as exc:
            self._on_unreadable()
            self._bury(link.number, monotonic(), exc)
            return
        if link.has_unsent:
            self._epoll.modify(link.fd, select.EPOLLIN | select.EPOLLOUT)

    def _take_back(self, link: SlotLink, most: int) -> None:
        number = link.number
        waiting = self._ahead.take_back(number, most)
        taken = link.take_back(most - waiting) if waiting < most else 0
        self.machine.taken_back(number, waiting + taken)
        if waiting and not link.resetting:
            self.machine.slot_reset(number)  # which never had them, and has nothing to say of it

    def perform(self, effect: Effect, now: float) -> None:
        """Any other effect that is about a slot."""
        if isinstance(effect, StartSlot):
            self._start(effect.slot, now)
            return
        number = getattr(effect, "slot", 0)
        link = self._slots.links.get(number)
        if link is None:
            return  # it was given up while these effects were performed
        if isinstance(effect, TakeBack):
            self._take_back(link, effect.most)
        elif isinstance(effect, PeekSlot):
            self._peek(number, now)
        elif isinstance(effect, KillRow):
            self._kill_row(effect, now)
        elif isinstance(effect, AgeOfRow):
            self._tell_age(effect, now)
        elif isinstance(effect, ForgetFunctions):
            try:
                link.forget(effect.fns)
            except SLOT_ERRORS as exc:
                self._bury(number, now, exc)
        elif isinstance(effect, StopSlot):
            self._unwatch(number)
            self._slots.stop(number)

    def unmap(self, ids: Sequence[int]) -> None:
        """Values are no longer in memory here: slots shall not keep them there."""
        if not ids:
            return
        for number, link in list(self._slots.links.items()):
            try:
                link.unmap(ids)
            except SLOT_ERRORS as exc:
                self._bury(number, monotonic(), exc)
                continue
            if link.has_unsent:
                self._epoll.modify(link.fd, select.EPOLLIN | select.EPOLLOUT)

    def _start(self, number: int, now: float) -> None:
        try:
            link = self._slots.start(number)
        except OSError as exc:
            self.machine.slot_died(number, f"cannot start a slot: {exc}", False, now)
            return
        self._slot_by_fd[link.fd] = number
        self._epoll.register(link.fd, select.EPOLLIN)
        exit_fd = self._slots.exit_fd(number)
        if exit_fd >= 0:
            self._exit_fds[number] = exit_fd
            self._slot_by_fd[exit_fd] = number
            self._epoll.register(exit_fd, select.EPOLLIN)
        self.output.watch(number)
        self._configure(link)

    def _configure(self, link: SlotLink) -> None:
        link.send_config(self._way_in, self._name, self._inline_limit, self._log_level)

    def _unwatch(self, number: int) -> None:
        self._ahead.drop(number)
        self.output.unwatch(number)
        fd = self._slots.links[number].fd
        self._epoll.unregister(fd)
        del self._slot_by_fd[fd]
        exit_fd = self._exit_fds.pop(number, -1)
        if exit_fd >= 0:
            self._epoll.unregister(exit_fd)
            del self._slot_by_fd[exit_fd]
            os.close(exit_fd)

    # --- what slots say -----------------------------------------------------------------------

    def read(self, now: float) -> None:
        """Take in what slots have said."""
        ready, self._events = self._events or self._epoll.poll(0), []
        outputs = self.output.by_fd
        for fd, _ in ready:  # first: what a row wrote goes ahead of its end
            if fd in outputs:
                self.output.read(outputs[fd], self.machine, now)
        for fd, events in ready:
            number = self._slot_by_fd.get(fd, 0)
            if not number:
                continue  # it was buried a moment ago, in this very loop
            link = self._slots.links[number]
            if events & select.EPOLLOUT:
                link.send_more()
                if not link.has_unsent:
                    self._epoll.modify(fd, select.EPOLLIN)
            has_ended = fd != link.fd
            while self._read_slot(number, now) and has_ended:
                pass  # all that it said before its end
            if has_ended and number in self._slots.links:
                self._bury(number, now)

    def _read_slot(self, number: int, now: float) -> bool:
        """Take in what one slot says. False: there is nothing more for now, or no slot."""
        machine, link = self.machine, self._slots.links[number]
        try:
            report = link.read()
        except SLOT_ERRORS as exc:
            self._bury(number, now, exc, blame=True)
            return False
        if report.events and link.has_output():
            self.output.catch_up(number, machine, now)
        for event in report.events:
            if not isinstance(event, int):
                self.output.ended(number)
                machine.slot_done(number, *event[:3], now, event.ids)
            elif event == p.READY:
                machine.slot_started(number, now)
            elif event == p.RESET_DONE:
                machine.slot_reset(number)
            elif event == p.BLOCKED:
                if not self._peek(number, now):
                    return False
                machine.slot_blocked(number)
            elif event == p.UNBLOCKED:
                machine.slot_unblocked(number)
        if report.closed and number in self._slots.links:
            self._bury(number, now)
        return bool(report.events) and not report.closed

    def _kill_row(self, effect: KillRow, now: float) -> None:
        number = effect.slot
        if self._peek(number, now) and self._runs(number, effect.id):
            if self._killed.get(number) != effect.id:
                self._killed[number] = effect.id
                log.info("slot %d is killed for task %x: %s", number, effect.id, effect.why)
            self._slots.kill(number)

    def _tell_age(self, effect: AgeOfRow, now: float) -> None:
        number, age = effect.slot, None
        if not self._peek(number, now):
            return
        if self._runs(number, effect.id):
            age = (monotonic_ns() - self._slots.links[number].started_ns()) * 1e-9
        self.machine.row_age(number, effect.id, age, now)

    def look_at_memory(self, now: float) -> None:
        """End the tasks that take more memory than a slot may."""
        for number, text in self._memory.over(self.machine, self._slots, now):
            if self._peek(number, now):
                running = self._slots.links[number].is_running()
                self.machine.slot_too_large(number, running, text, now)

    def _runs(self, number: int, id_: int) -> bool:
        """Whether that row runs in a slot, of which everything finished was taken in just now."""
        return self._slots.links[number].is_running() and self.machine.first_row(number) == id_

    def _peek(self, number: int, now: float) -> bool:
        """Take in what a slot has finished and not told. False: it was given up."""
        link = self._slots.links[number]
        try:
            batch = link.peek()
        except SLOT_ERRORS as exc:
            self._bury(number, now, exc, blame=True)
            return False
        if batch is not None:
            self.output.catch_up(number, self.machine, now)
            self.machine.slot_done(number, *batch[:3], now, batch.ids)
        if link.is_settled(monotonic_ns()):
            self.machine.slot_settled(number)
        return True

    def _bury(
        self, number: int, now: float, error: Exception | None = None, blame: bool = False
    ) -> None:
        """A slot is gone: save what it had finished, blame what it ran.

        error: why it has to go. What it had finished is not to be had then; with `blame`, that
        may be because of a result, and its first row counts as what killed it: no row may come
        back for ever.
        """
        self._killed.pop(number, None)
        if error is None and not self._peek(number, now):
            return
        running = blame or self._slots.links[number].is_running()
        last = self.output.last(number, self.machine, now)
        self._unwatch(number)
        text = self._slots.bury(number)
        if error is not None:
            text = f"slot {number} was given up: {error or repr(error)}; {text}"
        task = self.machine.running_in(number) if running else ""
        level = logging.INFO if self.machine.is_doomed(number) else logging.WARNING
        log.log(level, "%s%s", text, f" ({task})" if task else "")
        if last and running:
            text += f"; its last output:\n{textwrap.indent(last, '  ')}"
        self.machine.slot_died(number, text, running, now)
