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
from zfabric.core.spreading import MOST_READERS, MOST_VALUES, PATIENCE_S, SILENT_S, Place, Readers
from zfabric.runtime.data_thread import DataThread
from zfabric.runtime.link_book import LinkBook
from zfabric.runtime.store import Store, Value

A, B, C, D = [(number, f"ipc://{number}") for number in range(1, 5)]


def part(readers: Readers, place: Place, now: float, is_last: bool = False) -> Any:
    return readers.ask(7, place, False, is_last, now)


def test_two_are_served_and_the_others_are_sent_on_to_them() -> None:
    readers = Readers()
    assert all(readers.ask(7, place, True, False, 0.0) == () for place in (A, B, C, D))
    assert [part(readers, place, 0.0) for place in (A, B, C, D)] == [(), (), None, None]
    assert part(readers, C, 0.1) is None
    assert Readers().ask(8, C, False, False, 0.0) == (), "nobody else reads that"
    assert part(readers, A, 0.2, is_last=True) == ()
    assert part(readers, C, 0.3) == [A] and part(readers, C, 0.3) == [A], "more of the same"
    assert part(readers, B, 0.4, is_last=True) == ()
    assert sorted(part(readers, D, 0.5)) == [A, B]
    # Who comes back was sent to somebody who is gone: served, for that is no reader's fault.
    assert readers.ask(7, C, True, False, 1.0) == () and part(readers, C, 1.0) == ()


def test_who_is_silent_does_not_count_and_nobody_waits_for_ever() -> None:
    readers = Readers()
    assert part(readers, A, 0.0) == part(readers, B, 0.0) == ()
    assert part(readers, C, 0.0) is None
    assert part(readers, A, SILENT_S) == ()
    assert part(readers, C, SILENT_S + 0.1) == (), "B is gone"
    assert part(readers, D, SILENT_S + 0.1) is None
    now = SILENT_S + 0.1
    while now < SILENT_S + 0.1 + PATIENCE_S:
        assert part(readers, A, now) == part(readers, C, now) == ()
        assert part(readers, D, now) is None
        now += 1.0
    assert part(readers, D, SILENT_S + 0.2 + PATIENCE_S) == ()


def test_a_place_in_the_queue_is_taken_with_the_first_request() -> None:
    readers = Readers()
    assert all(readers.ask(7, place, True, False, 0.0) == () for place in (A, B, C, D))
    assert part(readers, A, 0.1, is_last=True) == part(readers, B, 0.1, is_last=True) == ()
    assert part(readers, C, 0.2) and part(readers, D, 0.2), "late, and not served here for that"
    assert readers.ask(8, A, True, True, 0.0) == (), "all of it in one part"
    assert all(readers.ask(8, place, True, False, 0.1) == () for place in (B, C))
    for place in (B, C):
        assert readers.ask(8, place, False, False, 0.2) == (), "A does not count"


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
            listener=transport.listen(self.address, max_frame=settings.max_frame),
        )
        self.data.serves_at(number, self.address)

    def fetch(self, id_: int, nbytes: int, source: Node) -> None:
        def on_end(value: Value | None) -> None:
            if value is not None:
                self.store.put(id_, value)
            self.fetched.set()

        self.data.fetch(id_, nbytes, [(source.number, source.address)], on_end)

    def sent(self) -> int:
        """Bytes of values that have left it."""
        report = self.links.report()
        return sum(link["raw_nbytes"] for link in report if link["direction"] == "out")

    def close(self) -> None:
        self.data.close()
        self.store.close()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
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
    wait_until(lambda: len(server._held) == len(others))  # so that they are at the same time
    source.store.put(5, value)
    source.data.run(source.data._arrived, 5)
    for node in others:
        assert node.fetched.wait(60)
        got = node.store.get(5)
        assert got is not None and got.area == value.area
    assert source.sent() <= (MOST_READERS + 0.1) * nbytes
    assert sum(node.sent() for node in nodes) <= (len(others) + 0.1) * nbytes


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
    assert ask(5, B, False, False, then) == ask(5, C, False, False, then) == ()
    reader.fetch(5, nbytes, source)
    assert reader.fetched.wait(60)
    assert 5 in reader.store and nbytes <= source.sent() <= 1.1 * nbytes
