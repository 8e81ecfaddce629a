"""Rows whose values are on a slow disk: nobody but them waits for it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from tests.unit.supervisor_bench import FN
from zfabric.codec.arguments import dump_call
from zfabric.codec.functions import dump_function
from zfabric.codec.references import Reference
from zfabric.codec.serialise import dumps, loads_inline, pack
from zfabric.config import Settings
from zfabric.core.supervisor import Supervisor
from zfabric.core.supervisor_effects import FreeValues, KeepValue
from zfabric.messages import LOCAL, VALUE, Done, Returned, Run
from zfabric.runtime.read_ahead import ReadAhead
from zfabric.runtime.slot_keeper import SlotKeeper
from zfabric.runtime.slot_values import InFile
from zfabric.runtime.spill import SpillFiles
from zfabric.runtime.store import Store
from zfabric.runtime.value import Value

NBYTES = 100_000


class SlowFiles(SpillFiles):
    """A disk that gives nothing back before it is told to."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.go_on = threading.Event()
        self.reading = threading.Event()

    def read(self, part: Any, to: Any) -> None:
        self.reading.set()
        assert self.go_on.wait(20)
        super().read(part, to)


class Disk:
    """A store of which values 1 to 4 are on disk and 9 is not, and what its thread calls."""

    def __init__(self, tmp_path: Path, wait_until: Callable[..., Any]) -> None:
        self.files = SlowFiles(str(tmp_path))
        self.store = Store(10 * NBYTES, self.files)
        self.calls: deque[tuple[Any, ...]] = deque()
        for number in range(1, 10):
            frames = dumps(bytes([number]) * NBYTES)
            file = InFile(frames, [len(frame) for frame in frames])
            self.store.put(number, Value.from_file(file.sizes, os.dup(file.fd)))
        wait_until(lambda: self.store.is_on_disk(1) and self.store.nbytes <= 6 * NBYTES)
        assert not self.store.is_on_disk(9)

    def call_soon(self, function: Callable[..., None], *args: Any) -> None:
        self.calls.append((function, *args))

    def run_calls(self) -> None:
        while self.calls:
            function, *args = self.calls.popleft()
            function(*args)


@pytest.fixture
def disk(tmp_path: Path, wait_until: Callable[..., Any]) -> Iterator[Disk]:
    made = Disk(tmp_path, wait_until)
    yield made
    made.files.go_on.set()
    made.store.close()


def row(id_: int, *values: int) -> Any:
    return (id_, 1, 5, b"", [(v,) for v in values], False) if values else (id_, 1, 5, b"")


def test_rows_wait_in_order_and_only_behind_their_own_slot(
    disk: Disk, wait_until: Callable[..., Any]
) -> None:
    ahead = ReadAhead(disk.store, disk.call_soon)
    sent: list[Any] = []

    def send(functions: Any, rows: Any) -> None:
        sent.append((functions, [each[0] for each in rows]))

    ahead.send(1, [FN], [row(10), row(11, 9), row(12, 1), row(13)], send)
    assert sent == [([FN], [10, 11])]
    ahead.send(1, [], [row(14, 2), row(15)], send)
    ahead.send(2, [FN], [row(20, 9)], send)
    assert sent[1:] == [([FN], [20])]
    assert ahead.take_back(1, 1) == 1 and ahead.take_back(2, 1) == 0
    assert disk.files.reading.wait(10) and not disk.calls
    disk.files.go_on.set()
    wait_until(lambda: disk.calls)
    disk.run_calls()
    assert sent[2:] == [([], [12, 13])]
    wait_until(lambda: disk.calls)
    disk.run_calls()
    assert sent[3:] == [([], [14])]
    ahead.send(1, [], [row(16)], send)
    assert sent[4:] == [([], [16])]
    ahead.close()


def test_a_slot_that_is_gone_gets_nothing(disk: Disk, wait_until: Callable[..., Any]) -> None:
    ahead = ReadAhead(disk.store, disk.call_soon)
    sent: list[Any] = []
    ahead.send(1, [], [row(10, 1)], lambda functions, rows: sent.append(rows))
    ahead.drop(1)
    disk.files.go_on.set()
    wait_until(lambda: disk.calls)
    disk.run_calls()
    assert sent == []
    ahead.close()


class Held(Reference):
    """A future as arguments have it."""

    __slots__ = ("task_id",)

    def __init__(self, task_id: int) -> None:
        self.task_id = task_id


class Loop:
    """A machine, its keeper and the store of a `Disk`, as the worker's loop drives them."""

    def __init__(self, disk: Disk, kind: str) -> None:
        self.disk = disk
        self.machine = Supervisor(2, now=monotonic(), can_kill=kind == "process")
        self.keeper = SlotKeeper(
            kind,
            self.machine,
            disk.store,
            Settings(),
            way_in="",
            name="w",
            memory_limit=0,
            on_unreadable=lambda: None,
            call_soon=disk.call_soon,
        )
        self.values: dict[int, Any] = {}
        self.returned: list[int] = []
        self.longest_s = 0.0
        for number in range(1, 10):
            self.machine.value_put(number, NBYTES)

    def run(self, fn: Any, ids: list[int], values: list[int] | None = None) -> None:
        """values: the argument of each row, else it is 3."""
        dumped = dump_function(fn)
        arguments = [(3,)] * len(ids) if values is None else [(Held(v),) for v in values]
        payloads = [bytes(pack(dump_call(args, {})[0])) for args in arguments]
        deps = [(i, [(v, LOCAL, 0)]) for i, v in enumerate(values or ())]
        self.machine.run(
            Run([tuple(dumped)], ids, [1] * len(ids), [dumped.id] * len(ids), payloads, deps)
        )

    def turn(self) -> None:
        began = monotonic()
        self.disk.run_calls()
        self.keeper.read(began)
        while effects := self.machine.effects(monotonic()):
            for effect in effects:
                if isinstance(effect, KeepValue):
                    raise AssertionError("no result here is large")
                if not isinstance(effect, FreeValues):
                    send = type(effect).__name__ == "SendRows"
                    act = self.keeper.send_rows if send else self.keeper.perform
                    act(effect, monotonic())
        for message in self.machine.messages(monotonic()):
            if isinstance(message, Done):
                for id_, status, data in zip(message.ids, message.statuses, message.payloads):
                    assert status == VALUE
                    self.values[id_] = loads_inline(data)
            elif isinstance(message, Returned):
                self.returned += message.ids
        self.longest_s = max(self.longest_s, monotonic() - began)


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_other_rows_run_while_one_waits_for_the_disk(
    disk: Disk, kind: str, wait_until: Callable[..., Any]
) -> None:
    loop = Loop(disk, kind)

    def until(condition: Callable[[], Any]) -> None:
        wait_until(lambda: loop.turn() or condition())

    try:
        until(lambda: all(slot.started for slot in loop.machine.crew.slots.values()))
        loop.longest_s = 0.0
        loop.run(len, [101], [1])
        until(disk.files.reading.is_set)
        loop.run(abs, [201, 202, 203])
        until(lambda: loop.values.keys() >= {201, 202, 203})
        # One that waits behind it for the disk comes back when the broker wants it.
        loop.run(len, [102, 103], [2, 3])
        loop.turn()
        loop.machine.recall([102, 103])
        until(lambda: set(loop.returned) == {102, 103})
        assert 101 not in loop.values and loop.longest_s < 5.0
        disk.files.go_on.set()
        until(lambda: loop.values.get(101) == NBYTES)
        loop.run(len, [104], [4])
        until(lambda: loop.values.get(104) == NBYTES)
    finally:
        disk.files.go_on.set()
        loop.keeper.close()
