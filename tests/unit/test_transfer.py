"""Values in parts: the machines, and both ends over real channels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from zfabric import transport, wire
from zfabric.codec import layout
from zfabric.config import DEFAULTS, Settings
from zfabric.core.transfer import FIRST_ANSWER_S, FIRST_NBYTES, PROGRESS_S, WINDOW, Download, Upload
from zfabric.messages import Fetch, NotHere
from zfabric.runtime.binding import link_options
from zfabric.runtime.fetch import Fetcher
from zfabric.runtime.store import Store
from zfabric.runtime.value import Value
from zfabric.runtime.value_server import ValueServer
from zfabric.transport.contract import Poller

CHUNK = 100_000
SETTINGS = Settings(chunk=CHUNK)


def sample(nbytes: int) -> bytes:
    return (os.urandom(min(nbytes, 997)) * (nbytes // 997 + 1))[:nbytes]


def download(n_sources: int = 1, nbytes: int = 0) -> Download:
    def allocate(sizes: Sequence[int]) -> memoryview:
        return memoryview(bytearray(layout.nbytes_of(sizes)))

    return Download(1, n_sources, allocate, nbytes=nbytes, settings=SETTINGS, now=0.0)


def answer(machine: Download, data: bytes, request: Fetch, sizes: Sequence[int] = ()) -> None:
    part = data[request.offset : request.offset + request.length]
    machine.part_came(machine.source, request.offset, sizes or [len(data)], part, 0.0)


@pytest.mark.parametrize("nbytes", [0, 1, FIRST_NBYTES, FIRST_NBYTES + 1, 1_234_567])
def test_a_download_asks_for_all_of_it_once(nbytes: int) -> None:
    data = sample(nbytes)
    machine = download(nbytes=nbytes)
    n_asked = 0
    todo = machine.requests()
    assert todo == [Fetch(1, 0, FIRST_NBYTES)]
    while not machine.is_done:
        assert 0 < len(todo) <= WINDOW and not machine.has_failed
        request = todo.pop()
        n_asked += 1
        answer(machine, data, request)
        todo += machine.requests()
    assert not todo and machine.area is not None and bytes(machine.area) == data
    assert n_asked == 1 + -(-max(0, nbytes - FIRST_NBYTES) // CHUNK)


def test_sources_are_tried_one_after_the_other_from_the_beginning() -> None:
    machine = download(3)
    machine.requests()
    machine.source_failed(0, 1.0)
    assert machine.source == 1 and machine.requests() == [Fetch(1, 0, FIRST_NBYTES)]
    machine.part_came(0, 0, [5], b"stale", 1.0)
    assert not machine.is_done, "an answer of a source that was given up"
    machine.source_failed(0, 1.0)
    assert machine.source == 1
    machine.tick(1.0 + FIRST_ANSWER_S)
    assert machine.source == 2 and machine.requests()
    answer(machine, b"fresh", Fetch(1, 0, FIRST_NBYTES))
    assert machine.is_done and bytes(machine.area or b"") == b"fresh"


def test_a_source_that_began_has_longer() -> None:
    machine = download()
    machine.requests()
    answer(machine, sample(500_000), Fetch(1, 0, FIRST_NBYTES))
    machine.tick(PROGRESS_S * 0.99)
    assert not machine.has_failed
    machine.tick(PROGRESS_S)
    assert machine.has_failed and machine.requests() == []


@pytest.mark.parametrize(
    ("sizes", "part"),
    [([10], b"short"), ([-5], b""), ([1 << 60], b"x"), ([5], b"too long"), ([7], b"seven--")],
)
def test_a_source_that_lies_is_given_up(sizes: list[int], part: bytes) -> None:
    machine = download(nbytes=10)
    machine.requests()
    machine.part_came(0, 0, sizes, part, 0.0)
    assert machine.has_failed


def test_an_upload_answers_what_is_asked() -> None:
    data = memoryview(sample(300_000))
    machine = Upload(1, [300_000], data, n_targets=2, settings=SETTINGS, now=0.0)
    first = machine.first()
    assert (first.offset, bytes(first.data)) == (0, bytes(data[:FIRST_NBYTES]))
    part = machine.asked(0, Fetch(1, 70_000, 1 << 30), 0.0)
    assert part is not None and len(part.data) == CHUNK
    assert machine.asked(1, Fetch(1, 0, 1), 0.0) is None
    assert machine.asked(0, Fetch(1, -1, 1), 0.0) is None
    machine.answered(0, "disk full", 0.0)
    assert machine.target == 1 and not machine.is_done
    machine.tick(FIRST_ANSWER_S)
    assert machine.has_failed and machine.error == "disk full"


# --- over real channels -----------------------------------------------------------------------


class Ends:
    """A store with a door, and a fetcher that knows it as worker 7."""

    def __init__(self, address: str, relayed: bool = False) -> None:
        self.store = Store()
        self.put: list[tuple[int, int]] = []
        self.listener = transport.listen(address, **link_options(address, DEFAULTS))
        self.server = ValueServer(
            self.store, self.listener, lambda *what: self.put.append(what), settings=SETTINGS
        )
        self.poller = Poller()
        self.poller.add(self.listener)
        self.doors: dict[Any, ValueServer] = {self.listener: self.server}
        self.servers = {7: self.server}
        self.relayed: list[tuple[int, list[Any]]] = []
        self.fetcher = Fetcher(
            self.poller,
            (lambda number, frames: self.relayed.append((number, frames))) if relayed else None,
            settings=SETTINGS,
        )
        self.ended: list[Any] = []

    def add_store(self, number: int, address: str) -> tuple[Store, str]:
        """Another worker's store, and where it is."""
        store, listener = Store(), transport.listen(address, **link_options(address, DEFAULTS))
        self.servers[number] = self.doors[listener] = ValueServer(
            store, listener, lambda *_: None, settings=SETTINGS
        )
        self.poller.add(listener)
        return store, listener.address

    def answer(self, number: int, reply: Any) -> None:
        self.fetcher.on_relay(number, reply, monotonic())

    def until(self, condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
        deadline = monotonic() + timeout_s
        while not condition():
            assert monotonic() < deadline
            now = monotonic()
            wake = self.fetcher.tick(now)
            for number, frames in self.relayed:
                _, message = wire.decode([bytes(f) for f in frames])
                server = self.servers[number]
                server.on_message(message, partial(self.answer, number), "a session", now)
            self.relayed.clear()
            ready = self.poller.wait(0.1 if wake is None else min(0.1, max(0.0, wake - now)))
            for thing in ready:
                if thing in self.doors:
                    self.doors[thing].on_ready(monotonic())
                else:
                    assert self.fetcher.owns(thing)
                    self.fetcher.on_ready(thing, monotonic())
            for server in self.doors.values():
                server.tick()

    def close(self) -> None:
        self.fetcher.close()
        for listener in self.doors:
            listener.close()
        self.store.clear()


@pytest.fixture(params=["ipc", "tcp", "relay"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ends]:
    address = "tcp://127.0.0.1:0" if request.param == "tcp" else f"ipc://{tmp_path}/d"
    made = Ends(address, relayed=request.param == "relay")
    made.address = "" if request.param == "relay" else made.listener.address  # type: ignore[attr-defined]
    yield made
    made.close()


SIZES = [[], [0], [3, 50_000], [70_000], [10, 1_000_001, 5]]


@pytest.mark.parametrize("sizes", SIZES)
def test_values_are_fetched_whole(ends: Any, sizes: list[int]) -> None:
    value = Value.allocate(sizes)
    value.destination[0 : value.nbytes] = sample(value.nbytes)
    ends.store.put(5, value)
    ends.fetcher.fetch(5, value.nbytes, [(7, ends.address)], ends.ended.append, monotonic())
    ends.until(lambda: ends.ended)
    (got,) = ends.ended
    assert got.sizes == tuple(sizes) and got.area == value.area
    assert ends.fetcher.is_idle


@pytest.mark.parametrize("sizes", SIZES)
def test_values_are_put_whole(ends: Any, sizes: list[int]) -> None:
    area = memoryview(sample(layout.nbytes_of(sizes)))
    for _ in range(2):  # a second time changes nothing, and is no error
        ends.fetcher.put(5, sizes, area, (7, ends.address), ends.ended.append, monotonic())
        ends.until(lambda: ends.ended)
        assert ends.ended.pop() == ""
    assert ends.store.get(5).area == area and ends.put == [(5, area.nbytes)]


def test_one_value_goes_into_several_stores_at_a_time(ends: Any, tmp_path: Path) -> None:
    other, address = ends.add_store(8, f"ipc://{tmp_path}/e")
    area = memoryview(sample(3_000_000))
    targets = [(7, ends.address), (8, ends.address and address)]
    for target in targets:
        ends.fetcher.put(5, [area.nbytes], area, target, ends.ended.append, monotonic())
    ends.until(lambda: len(ends.ended) == 2)
    assert ends.ended == ["", ""] and ends.fetcher.is_idle
    assert ends.store.get(5).area == area == other.get(5).area
    other.clear()


def test_many_values_at_a_time(ends: Any) -> None:
    for id_ in range(100):
        value = Value.allocate([100_000])
        value.destination[0:100_000] = bytes([id_]) * 100_000
        ends.store.put(id_, value)
        ends.fetcher.fetch(id_, 0, [(7, ends.address)], ends.ended.append, monotonic())
    ends.until(lambda: len(ends.ended) == 100)
    assert sorted(value.area[0] for value in ends.ended) == list(range(100))


def test_a_value_that_is_nowhere_fails_at_once(ends: Any) -> None:
    begun = monotonic()
    ends.fetcher.fetch(5, 10, [(7, ends.address)] * 2, ends.ended.append, begun)
    ends.until(lambda: ends.ended)
    assert ends.ended == [None] and monotonic() - begun < FIRST_ANSWER_S


def test_the_relay_is_taken_where_nobody_answers(tmp_path: Path) -> None:
    ends = Ends(f"ipc://{tmp_path}/d", relayed=True)
    try:
        ends.store.put(5, Value.from_bytes([3], b"abc"))
        nowhere = (7, f"ipc://{tmp_path}/nobody")
        ends.fetcher.fetch(5, 3, [nowhere], ends.ended.append, monotonic())
        ends.until(lambda: ends.ended)
        assert bytes(ends.ended[0].area) == b"abc"
    finally:
        ends.close()


def test_requests_that_make_no_sense_are_answered_or_ignored(tmp_path: Path) -> None:
    ends = Ends(f"ipc://{tmp_path}/d")
    try:
        ends.store.put(5, Value.from_bytes([3], b"abc"))
        said: list[Any] = []
        assert ends.server.on_message(Fetch(5, 99, 1), said.append, "a session", 0.0)
        assert ends.server.on_message(Fetch(6, 0, 1), said.append, "a session", 0.0)
        assert said == [NotHere(5), NotHere(6)]
        assert not ends.server.on_message(NotHere(5), said.append, "a session", 0.0)
    finally:
        ends.close()
