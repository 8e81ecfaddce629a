"""A supervisor's machine with real slots and no network: what tests of slots drive."""

from __future__ import annotations

import select
from collections.abc import Callable
from time import monotonic, monotonic_ns
from typing import Any

from zfabric.codec.arguments import dump_call
from zfabric.codec.functions import dump_function
from zfabric.codec.serialise import loads_inline, pack
from zfabric.config import Settings
from zfabric.core.supervisor import Supervisor
from zfabric.core.supervisor_effects import (
    FreeValues,
    KeepValue,
    PeekSlot,
    SendRows,
    StartSlot,
    StopSlot,
    TakeBack,
)
from zfabric.messages import VALUE, Done, Returned, Run
from zfabric.runtime import slot_protocol as p
from zfabric.runtime.slots import Slots
from zfabric.runtime.store import Store


class Crew:
    """outcomes: (status, payload) by task id.  returned: ids.  deaths: texts of dead slots."""

    def __init__(self, n_slots: int = 1, kind: str = "process", **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.slots = Slots(kind)
        self.store = Store()
        self.machine = Supervisor(n_slots, settings=self.settings, now=monotonic())
        self.outcomes: dict[int, tuple[int, Any]] = {}
        self.returned: list[int] = []
        self.deaths: list[str] = []
        self.epoll = select.epoll()
        self.by_fd: dict[int, int] = {}
        self._ids = 0

    def submit(self, fn: Callable[..., Any], *args: Any, deps: list[Any] | None = None) -> int:
        """One row; deps: as Run has them, for args given as codec references."""
        self._ids += 1
        self.run(fn, [(self._ids, args)], {0: deps} if deps else {})
        return self._ids

    def map(self, fn: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[int]:
        """One row per tuple of arguments, in one Run."""
        ids = list(range(self._ids + 1, self._ids + len(calls) + 1))
        self._ids += len(calls)
        self.run(fn, list(zip(ids, calls, strict=True)), {})
        return ids

    def run(self, fn: Callable[..., Any], rows: list[tuple[int, Any]], deps: Any) -> None:
        dumped = dump_function(fn)
        payloads = [bytes(pack(dump_call(args, {})[0])) for _, args in rows]
        ids = [id_ for id_, _ in rows]
        self.machine.run(
            Run(
                [tuple(dumped)],
                ids,
                [1] * len(ids),
                [dumped.id] * len(ids),
                payloads,
                list(deps.items()),
            )
        )

    def value(self, id_: int) -> Any:
        """The inline value of a row that ended well."""
        status, payload = self.outcomes[id_]
        assert status == VALUE, (status, payload)
        return loads_inline(payload)

    def until(self, condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
        """Turn until something holds."""
        deadline = monotonic() + timeout_s
        while not condition():
            left = deadline - monotonic()
            assert left > 0, f"not within {timeout_s} s; outcomes {self.outcomes!r:.500}"
            self.turn(left)

    def wait(self, *ids: int) -> None:
        """Until these rows have ended."""
        self.until(lambda: all(id_ in self.outcomes for id_ in ids))

    def turn(self, most_s: float) -> None:
        """What the worker's loop does once."""
        now = monotonic()
        while effects := self.machine.effects(now):
            for effect in effects:
                self.perform(effect, now)
        for message in self.machine.messages(now):
            if isinstance(message, Done):
                self.outcomes.update(
                    zip(message.ids, zip(message.statuses, message.payloads), strict=True)
                )
            elif isinstance(message, Returned):
                self.returned += message.ids
        wake = self.machine.wake_at(now)
        for fd, _ in self.epoll.poll(min(0.5, most_s if wake is None else max(0.0, wake - now))):
            self.read(self.by_fd[fd])

    def perform(self, effect: Any, now: float) -> None:
        links = self.slots.links
        if isinstance(effect, SendRows):
            links[effect.slot].send_rows(effect.functions, effect.rows, self.store)
        elif isinstance(effect, StartSlot):
            link = self.slots.start(effect.slot)
            self.by_fd[link.fd] = effect.slot
            self.epoll.register(link.fd, select.EPOLLIN)
            link.send_config("ipc:///nowhere", "crew", self.settings.inline_limit)
        elif isinstance(effect, TakeBack):
            taken = links[effect.slot].take_back(effect.most)
            self.machine.taken_back(effect.slot, taken)
        elif isinstance(effect, PeekSlot):
            batch = links[effect.slot].peek()
            if batch is not None:
                self.machine.slot_done(effect.slot, *batch[:3], now, batch.ids)
            if links[effect.slot].is_settled(monotonic_ns()):
                self.machine.slot_settled(effect.slot)
        elif isinstance(effect, KeepValue):
            self.store.put(effect.id, effect.value)  # type: ignore[arg-type]
        elif isinstance(effect, FreeValues):
            self.store.free(effect.ids)
        elif isinstance(effect, StopSlot):
            self.epoll.unregister(links[effect.slot].fd)
            self.slots.stop(effect.slot)

    def read(self, number: int) -> None:
        link, now = self.slots.links[number], monotonic()
        report = link.read()
        for event in report.events:
            if not isinstance(event, int):
                self.machine.slot_done(number, *event[:3], now, event.ids)
            elif event == p.READY:
                self.machine.slot_started(number, now)
            elif event == p.RESET_DONE:
                self.machine.slot_reset(number)
            elif event == p.BLOCKED:
                self.perform(PeekSlot(number), now)
                self.machine.slot_blocked(number)
            elif event == p.UNBLOCKED:
                self.machine.slot_unblocked(number)
        if report.closed:
            self.perform(PeekSlot(number), now)
            running = link.is_running()
            self.epoll.unregister(link.fd)
            self.deaths.append(self.slots.bury(number))
            self.machine.slot_died(number, self.deaths[-1], running, now)

    def close(self) -> None:
        self.epoll.close()
        self.slots.kill_all()
        self.store.clear()
