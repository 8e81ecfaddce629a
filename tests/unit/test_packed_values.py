"""Values that go compressed over real channels arrive as they were, and lies are refused."""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import Any

import numpy as np
import pytest

from zfabric import transport
from zfabric.codec.compress import CODEC, Header, compress
from zfabric.config import Settings
from zfabric.core.transfer import Download
from zfabric.messages import Chunk, Fetch, LinksTold, LinksWanted
from zfabric.runtime import fetch as fetch_room
from zfabric.runtime.fetch import Fetcher
from zfabric.runtime.link_book import LinkBook
from zfabric.runtime.store import Store
from zfabric.runtime.value import Value
from zfabric.runtime.value_server import ValueServer
from zfabric.transport.locality import is_same_host

SMOOTH = np.arange(1_000_000.0).tobytes()
NOISE = np.random.default_rng(1).bytes(3_000_000)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback counts as a network."""
    monkeypatch.setattr(fetch_room, "is_same_host", lambda address: False)


def listen() -> transport.Listener:
    return transport.listen("tcp://127.0.0.1:0", seal=True)


def moved(mode: str, data: bytes, way: str) -> tuple[bytes, LinkBook, LinkBook]:
    """What arrives of `data` after a fetch or a put, and the books of the two ends."""
    settings = Settings(compression=mode)
    store, listener = Store(), listen()
    poller = transport.Poller()
    poller.add(listener)
    theirs, ours = LinkBook(settings), LinkBook(settings)
    server = ValueServer(store, listener, lambda *_: None, settings=settings, links=theirs)
    fetcher = Fetcher(poller, settings=settings, links=ours)
    ended: list[Any] = []
    where = (1, listener.address)
    if way == "fetch":
        store.put(5, Value.from_bytes([len(data)], data))
        fetcher.fetch(5, len(data), [where], ended.append, monotonic())
    else:
        fetcher.put(5, [len(data)], memoryview(data), where, ended.append, monotonic())
    deadline = monotonic() + 30
    while not ended:
        assert monotonic() < deadline
        fetcher.tick(monotonic())
        server.tick()
        for thing in poller.wait(0.02):
            if thing is listener:
                server.on_ready(monotonic())
            else:
                fetcher.on_ready(thing, monotonic())
    value = ended[0] if way == "fetch" else store.get(5)
    fetcher.close()
    listener.close()
    assert value is not None
    return bytes(value.area), theirs, ours


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("way", ["fetch", "put"])
@pytest.mark.parametrize("mode", ["always", "auto", "off"])
@pytest.mark.parametrize("data", [SMOOTH, NOISE, b"", b"short"], ids=["smooth", "noise", "0", "5"])
def test_what_arrives_is_what_was_sent(data: bytes, mode: str, way: str) -> None:
    arrived, theirs, ours = moved(mode, data, way)
    assert arrived == data
    sender = theirs if way == "fetch" else ours
    out = [link for link in sender.report() if link["direction"] == "out"]
    if data == SMOOTH and mode == "always":
        assert out[0]["wire_nbytes"] < out[0]["raw_nbytes"] / 4
        assert out[0]["verdicts"]["always"] > 3
    elif data == NOISE or mode == "off":
        assert all(link["wire_nbytes"] == link["raw_nbytes"] for link in out)


def test_nothing_is_compressed_within_a_host() -> None:
    _, theirs, ours = moved("always", SMOOTH, "fetch")
    (out,) = [link for link in theirs.report() if link["direction"] == "out"]
    assert set(out["verdicts"]) == {"not asked for"}
    (inbound,) = [link for link in ours.report() if link["direction"] == "in"]
    assert inbound["rate"] > 0 and inbound["raw_nbytes"] == len(SMOOTH)


def test_a_store_tells_of_its_links() -> None:
    said: list[Any] = []
    server = ValueServer(Store(), None, lambda *_: None)
    assert server.on_message(LinksWanted(3), said.append, "somebody", 0.0)
    assert said == [LinksTold(3, b"\x90")]


def first_part(packing: bytes, data: bytes, nbytes: int) -> Download:
    download = Download(1, 1, lambda sizes: memoryview(bytearray(sum(sizes))), now=0.0)
    download.requests()
    download.part_came(0, 0, [nbytes], data, 0.0, packing)
    return download


def test_a_packed_part_lands_in_place() -> None:
    raw = SMOOTH[:50_000]
    packed = compress(raw, 8)
    assert packed is not None
    download = first_part(packed.header, packed.data, len(raw))
    assert download.is_done and download.area is not None and bytes(download.area) == raw


@pytest.mark.parametrize("says", [0, 1, 49_999, 50_001, 2**40])
def test_a_size_that_lies_ends_the_source(says: int) -> None:
    packed = compress(SMOOTH[:50_000], 8)
    assert packed is not None
    header = Header(CODEC, 2, says).pack()
    assert first_part(header, packed.data, 50_000).has_failed
    assert first_part(b"what?", packed.data, 50_000).has_failed
    assert first_part(packed.header, b"", 50_000).has_failed


def test_who_has_no_such_codec_gets_it_raw() -> None:
    book, reply = LinkBook(Settings(compression="always")), Chunk(1, 0, [10**6], bytes(10**6))
    ask = partial(Fetch, 1, 0, 10**6)
    assert book.packed("a", ask(("zstd",), 1000), reply) is reply
    assert book.packed("a", ask((), 1000), reply) is reply
    assert book.packed("a", ask(("zstd", CODEC), 1000), reply).packing


@pytest.mark.parametrize(
    ("address", "same"),
    [
        ("ipc:///tmp/x", True),
        ("inproc://x", True),
        ("tcp://127.0.0.1:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://localhost:1", True),
        ("tcp://192.0.2.1:80", False),
        ("tcp://somewhere.example:80", False),
        ("sock+tcp://127.0.0.1:1", True),
    ],
)
def test_addresses_of_this_host(address: str, same: bool) -> None:
    assert is_same_host(address) is same
