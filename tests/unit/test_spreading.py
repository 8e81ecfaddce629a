"""A large value on its way to many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from zfabric import transport
from zfabric.config import Settings
from zfabric.core import transfer
from zfabric.core.spreading import (
    MOST_BEGUN,
    MOST_READERS,
    MOST_VALUES,
    PATIENCE_S,
    SILENT_S,
    Attempts,
    Place,
    Readers,
)
from zfabric.runtime.binding import link_options
from zfabric.runtime.data_thread import DataThread
from zfabric.runtime.link_book import LinkBook
from zfabric.runtime.store import Store
from zfabric.runtime.value import Value

A, B, C, D, E = [(number, f"ipc://{number}") for number in range(1, 6)]


def part(readers: Readers, place: Place, now: float, is_last: bool = False) -> Any:
    return readers.ask(7, place, False, is_last, now)


def first(readers: Readers, *places: Place, now: float = 0.0) -> None:
    assert all(readers.ask(7, place, True, False, now) == () for place in places)


def test_two_are_served_and_the_others_are_sent_on_to_them_at_once() -> None:
    readers = Readers()
    first(readers, A, B, C, D)
    assert part(readers, C, 0.0) is None, "nobody has more than the beginning yet"
    assert Readers().ask(8, C, False, False, 0.0) == (), "nobody else reads that"
    assert part(readers, A, 0.1) == () and readers.has_new
    assert part(readers, A, 0.1) == () and not readers.has_new
    assert part(readers, C, 0.2) == [A] and part(readers, C, 0.2) == [A], "more of the same"
    assert part(readers, B, 0.3) == () and readers.has_new
    assert sorted(part(readers, D, 0.4)) == [A, B]
    # Who comes back was sent to somebody who is gone: served, for that is no reader's fault.
    first(readers, C, now=1.0)
    assert part(readers, C, 1.0) is None
    assert part(readers, A, 1.1, is_last=True) == () == part(readers, C, 1.2)
    first(readers, E, now=1.3)
    assert set(part(readers, E, 1.3)) <= {A, B, C}


def test_who_begins_anew_has_nothing_to_give() -> None:
    readers = Readers()
    first(readers, A, B, C)
    assert part(readers, A, 0.1, is_last=True) == part(readers, B, 0.1) == ()
    first(readers, A, now=0.2)
    first(readers, D, now=0.2)
    assert part(readers, D, 0.3) == [B]


def test_who_is_silent_does_not_count_and_nobody_waits_for_ever() -> None:
    readers = Readers()
    assert part(readers, A, 0.0) == part(readers, B, 0.0) == ()
    assert sorted(part(readers, C, 0.0)) == [A, B]
    first(readers, C, now=0.1)
    assert part(readers, C, 0.1) is None, "it came back, and is not sent on again"
    assert part(readers, A, SILENT_S) == ()
    assert part(readers, C, SILENT_S + 0.1) == (), "B is gone"
    now = SILENT_S + 0.1
    first(readers, D, now=now)
    assert sorted(part(readers, D, now)) == [A, C], "and nobody is sent there"
    first(readers, D, now=now)
    assert part(readers, D, now) is None
    while now < SILENT_S + 0.1 + PATIENCE_S:
        assert part(readers, A, now) == part(readers, C, now) == ()
        assert part(readers, D, now) is None
        now += 1.0
    assert part(readers, D, SILENT_S + 0.2 + PATIENCE_S) == ()


def test_a_place_in_the_queue_is_taken_with_the_first_request() -> None:
    readers = Readers()
    first(readers, A, B, C, D)
    assert part(readers, A, 0.1, is_last=True) == part(readers, B, 0.1, is_last=True) == ()
    assert part(readers, C, 0.2) and part(readers, D, 0.2), "late, and not served here for that"
    assert readers.ask(8, A, True, True, 0.0) == (), "all of it in one part"
    assert all(readers.ask(8, place, True, False, 0.1) == () for place in (B, C))
    for place in (B, C):
        assert readers.ask(8, place, False, False, 0.2) == (), "A does not count"


def test_who_has_begun_with_one_attempt_gets_nothing_of_another() -> None:
    attempts = Attempts()
    assert not attempts.may_read(7, "a", 1, False), "it has not begun here"
    assert attempts.may_read(7, "a", 1, True) and attempts.may_read(7, "a", 1, False)
    assert attempts.may_read(7, "b", 1, True) and not attempts.may_read(8, "b", 1, False)
    assert not attempts.may_read(7, "a", 2, False), "the value comes from another source now"
    assert attempts.may_read(7, "a", 2, True) and attempts.may_read(7, "a", 2, False)
    attempts.settled(7, 2)
    assert not attempts.is_void(7, "a", 3, False), "the same value, in other memory"
    assert attempts.is_void(7, "b", 2, False)
    assert not attempts.is_void(7, "b", 2, False), "told once; it begins anew or goes elsewhere"
    assert attempts.may_read(7, "c", 2, True)
    assert not attempts.is_void(7, "c", 3, True), "it begins anew"
    for number in range(2 * MOST_BEGUN):
        assert attempts.may_read(number, "a", 1, True)
    assert len(attempts._begun) == MOST_BEGUN


def test_other_values_are_other_matters_and_few_are_remembered() -> None:
    readers = Readers()
    for id_ in range(2 * MOST_VALUES):
        assert readers.ask(id_, A, False, False, 0.0) == ()
    assert len(readers._spreads) == MOST_VALUES


class Node:
    """A worker's data thread and store."""

    def __init__(self, number: int, directory: Path) -> None:
        settings = Settings(shared_memory="off", compression="off")
        self.store = Store()
        self.links = LinkBook(settings)
        self.address = f"ipc://{directory}/{number}"
        self.number = number
        self.fetched = threading.Event()
        self.data = DataThread(
            lambda function, *args: function(*args),
            lambda number, frames: None,
            settings=settings,
            links=self.links,
            store=self.store,
            listener=transport.listen(self.address, **link_options(self.address, settings)),
        )
        self.data.serves_at(number, self.address)

    def fetch(self, id_: int, nbytes: int, *sources: Node) -> None:
        def on_end(value: Value | None) -> None:
            if value is not None:
                self.store.put(id_, value)
            self.fetched.set()

        self.data.fetch(id_, nbytes, [(s.number, s.address) for s in sources], on_end)

    def give_beginning(self, id_: int, value: Value, nbytes: int) -> None:
        """As if the rest were still on its way here; all of it comes, and more may be given
        then. Runs in the data thread."""
        server = self.data._server
        assert server is not None
        server.expect(id_)
        server._find_coming = lambda asked: (value, nbytes) if asked == id_ else None
        server.look(monotonic())

    def sent(self) -> int:
        """Bytes of values that have left it."""
        report = self.links.report()
        return sum(link["raw_nbytes"] for link in report if link["direction"] == "out")

    def close(self) -> None:
        self.data.close()
        self.store.close()


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Node]]:
    # Nobody shall be given up for being slow, on however busy a machine.
    monkeypatch.setattr(transfer, "FIRST_ANSWER_S", 60.0)
    monkeypatch.setattr(transfer, "PROGRESS_S", 60.0)
    made = [Node(number, tmp_path) for number in range(1, 10)]
    yield made
    for node in made:
        node.close()


@pytest.mark.parametrize("size", [24, pytest.param(100, marks=pytest.mark.slow)])
def test_a_broadcast_leaves_its_source_a_few_times_only(
    nodes: list[Node], wait_until: Callable[..., Any], size: int
) -> None:
    """size: MiB."""
    nbytes = size * 2**20
    value = Value.allocate([nbytes])
    for start in range(0, nbytes, 2**20):
        value.destination[start : start + 2**20] = bytes([start >> 20]) * 2**20
    source, *others = nodes
    wait_until(lambda: getattr(source.data, "_server", None) is not None)
    server = source.data._server
    assert server is not None
    source.data.run(server.expect, 5)
    for node in others:
        node.fetch(5, nbytes, source)
    wait_until(lambda: len(server._held) == len(others), 60.0)  # so they are at the same time
    source.store.put(5, value)
    source.data.run(source.data._arrived, 5)
    for node in others:
        assert node.fetched.wait(60)
        got = node.store.get(5)
        assert got is not None and got.area == value.area
    assert source.sent() <= (MOST_READERS + 0.1) * nbytes
    assert sum(node.sent() for node in nodes) <= (len(others) + 0.1) * nbytes


MIB = 2**20
NBYTES, HALF = 16 * MIB, 8 * MIB


def filled(byte: bytes) -> Value:
    value = Value.allocate([NBYTES])
    value.destination[0:NBYTES] = byte * NBYTES
    return value


@pytest.fixture
def half_way(
    nodes: list[Node], wait_until: Callable[..., Any]
) -> tuple[Node, Node, Node, Node, Value]:
    """(source, the one that reads there, a reader of that one, another source, the value): both
    readers have a part of what the source has given so far, which is half."""
    source, between, reader, other = nodes[:4]
    value = filled(b"1")
    wait_until(lambda: all(hasattr(node.data, "_server") for node in nodes))
    source.data.run(source.give_beginning, 5, value, HALF)
    other.store.put(5, filled(b"2"))
    between.fetch(5, NBYTES, source, other)
    wait_until(lambda: source.sent() > MIB, 60.0)
    reader.fetch(5, NBYTES, between, other)
    wait_until(lambda: between.sent() > 3 * MIB, 60.0)
    assert not between.fetched.is_set()
    return source, between, reader, other, value


def test_what_has_come_is_passed_on_while_the_rest_is_on_its_way(
    half_way: tuple[Node, Node, Node, Node, Value],
) -> None:
    source, between, reader, other, value = half_way
    source.data.run(source.give_beginning, 5, value, NBYTES)
    for node in (between, reader):
        assert node.fetched.wait(60)
        got = node.store.get(5)
        assert got is not None and got.area == value.area
    assert other.sent() == 0 and source.sent() <= 1.1 * NBYTES


def test_a_reader_falls_back_when_the_one_that_passes_on_is_gone(
    half_way: tuple[Node, Node, Node, Node, Value],
) -> None:
    _, between, reader, other, _ = half_way
    between.close()
    assert reader.fetched.wait(60)
    got = reader.store.get(5)
    assert got is not None and got.area == filled(b"2").area and other.sent() >= NBYTES


def test_parts_of_two_attempts_are_never_mixed(
    half_way: tuple[Node, Node, Node, Node, Value],
) -> None:
    source, between, reader, _, _ = half_way
    source.close()  # The one between begins anew; what the reader has of it is of no use.
    for node in (between, reader):
        assert node.fetched.wait(60)
        got = node.store.get(5)
        assert got is not None and got.area == filled(b"2").area


def test_a_reader_whose_new_source_has_nothing_comes_back(
    nodes: list[Node], wait_until: Callable[..., Any]
) -> None:
    nbytes = 20 * 2**20
    source, gone, reader = nodes[:3]
    source.store.put(5, Value.allocate([nbytes]))
    wait_until(lambda: hasattr(source.data, "_server"))
    assert source.data._server is not None
    ask, then = source.data._server._readers.ask, monotonic() - SILENT_S + 0.3
    assert ask(5, (gone.number, gone.address), False, True, then) == ()
    assert ask(5, B, True, False, then) == ask(5, C, True, False, then) == ()
    reader.fetch(5, nbytes, source)
    assert reader.fetched.wait(60)
    assert 5 in reader.store and nbytes <= source.sent() <= 1.1 * nbytes
