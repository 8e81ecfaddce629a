"""Values handed over as memory between processes of one host."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest

from zfabric.codec import layout
from zfabric.config import Settings
from zfabric.runtime.data_thread import DataThread
from zfabric.runtime.fetch import Fetcher
from zfabric.runtime.link_book import LinkBook
from zfabric.runtime.memory_door import SCHEME, MemoryLink
from zfabric.runtime.slabs import Slabs
from zfabric.runtime.slot_values import InFile, write_all
from zfabric.runtime.store import Store
from zfabric.runtime.value import Value
from zfabric.transport import listen
from zfabric.transport.contract import Poller

DATA = bytes(range(256)) * 4096


class Worker:
    """A store with its doors, served by a data thread."""

    def __init__(self, address: str) -> None:
        self.store = Store()
        self.put: list[tuple[int, int]] = []
        settings = Settings()
        listener = listen(address, max_frame=settings.max_frame)
        self.data = DataThread(
            lambda function, *args: function(*args),
            lambda number, frames: None,
            settings=settings,
            links=LinkBook(settings),
            store=self.store,
            listener=listener,
            on_put=lambda id_, nbytes: self.put.append((id_, nbytes)),
        )
        self.address = f"{listener.address} {self.data.door}"

    def keep(self, id_: int, frames: list[bytes]) -> None:
        file = InFile(frames, [len(frame) for frame in frames])
        self.store.put(id_, Value.from_file(file.sizes, os.dup(file.fd)))


@pytest.fixture
def worker(tmp_path: Any) -> Iterator[Worker]:
    worker = Worker(f"ipc://{tmp_path}/data")
    yield worker
    worker.data.close()


def pump(fetcher: Fetcher, poller: Poller, ended: list[Any]) -> Any:
    deadline = monotonic() + 10.0
    while not ended:
        assert monotonic() < deadline
        fetcher.tick(monotonic())
        for thing in poller.wait(0.05):
            assert fetcher.owns(thing)
            fetcher.on_ready(thing, monotonic())
    return ended.pop()


@pytest.mark.parametrize("door", [True, False])
def test_values_come_and_go_by_memory_or_else_by_socket(worker: Worker, door: bool) -> None:
    worker.keep(1, [b"head", DATA])
    worker.store.put(2, Value.from_bytes([3], b"abc"))
    poller, ended = Poller(), list[Any]()
    address = worker.address if door else worker.address.replace(SCHEME, f"{SCHEME}nobody-")
    fetcher = Fetcher(poller)
    try:
        for id_, frames in ((1, [b"head", DATA]), (2, [b"abc"])):
            fetcher.fetch(id_, 0, [(7, address)], ended.append, monotonic())
            value = pump(fetcher, poller, ended)
            assert [bytes(f) for f in layout.split(value.area, value.sizes)] == frames
            if id_ == 1 and door:
                held = worker.store.get(1)
                assert held is not None
                assert os.fstat(value.fd).st_ino == os.fstat(held.fd).st_ino, "the same memory"
        laid = layout.Laid([b"x", DATA])
        fetcher.put(3, laid.sizes, laid, (7, address), ended.append, monotonic())
        assert pump(fetcher, poller, ended) == ""
        assert worker.put == [(3, laid.nbytes)] and (laid.file is not None) is door
        fetcher.fetch(4, 0, [(7, address)], ended.append, monotonic())
        assert pump(fetcher, poller, ended) is None, "nobody has it"
    finally:
        fetcher.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_gets_nothing(worker: Worker) -> None:
    worker.keep(1, [b"head", DATA])
    dial = (
        "import os, socket, sys\n"
        "os.setgid(65534); os.setuid(int(sys.argv[2]))\n"
        "door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "door.settimeout(10)\n"
        "door.connect(chr(0) + sys.argv[1])\n"
        "try:\n"
        "    door.recv(1)\n"
        "    print('shut')\n"
        "except TimeoutError:\n"
        "    print('open')\n"
    ).replace("settimeout(10)", "settimeout(1 if sys.argv[2] == '0' else 30)")
    name = worker.address.partition(SCHEME)[2]
    found = [
        subprocess.run([sys.executable, "-c", dial, name, uid], capture_output=True, text=True)
        for uid in ("0", "65534")
    ]
    assert [one.stdout for one in found] == ["open\n", "shut\n"], found


def test_a_value_comes_out_of_the_slab_that_it_shares(worker: Worker) -> None:
    fds: list[int] = []
    slabs = Slabs(lambda fd: fds.append(os.dup(fd)))
    poller, ended = Poller(), list[Any]()
    fetcher = Fetcher(poller)
    try:
        for id_ in (1, 2):
            _, offset = slabs.write([bytes([id_]) * 70_000], 70_000, write_all)
            worker.store.put(id_, Value.from_slab([70_000], os.dup(fds[0]), offset))
        fetcher.fetch(2, 0, [(7, worker.address)], ended.append, monotonic())
        value = pump(fetcher, poller, ended)
        assert value.area == b"\2" * 70_000
        held = worker.store.get(2)
        assert held is not None and held.slab is not None and value.slab[0] == held.slab[0]
    finally:
        fetcher.close()
        slabs.close()
        os.close(fds[0])


def test_what_a_reader_writes_stays_with_it(worker: Worker) -> None:
    worker.keep(1, [DATA])
    held = worker.store.get(1)
    assert held is not None
    mine = Value.from_file(held.sizes, os.dup(held.fd)).unshared()
    mine.area[:4] = b"mine"
    assert bytes(held.area[:4]) == DATA[:4] and mine.fd < 0
    worker.store.free([1])
    assert bytes(mine.area[4:]) == DATA[4:], "it outlives the store's"


def answer(link: MemoryLink) -> Any:
    assert select.select([link.fd], [], [], 10)[0]
    return link.replies()


def test_memory_that_may_change_is_refused(worker: Worker) -> None:
    link = MemoryLink(worker.data.door)
    fd = os.memfd_create("unsealed")
    os.write(fd, DATA)
    link.put(5, [len(DATA)], fd)
    (reply,) = answer(link)
    assert reply.is_put and "may change" in reply.error and 5 not in worker.store
    file = InFile([DATA], [len(DATA)])
    link.put(5, [len(DATA) + 1], file.fd)
    assert "too short" in answer(link)[0].error
    with pytest.raises(PermissionError):
        os.write(file.fd, b"x")
    os.close(fd)
    link.close()


@pytest.mark.parametrize("packet", [b"\xff", b"", b"\x94\x01\x02\x03\x04", os.urandom(100)])
def test_a_caller_that_makes_no_sense_harms_nobody(worker: Worker, packet: bytes) -> None:
    worker.keep(1, [DATA])
    odd = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    odd.settimeout(10)
    odd.connect("\0" + worker.data.door.removeprefix(SCHEME))
    odd.send(packet)
    odd.close()
    link = MemoryLink(worker.data.door)
    link.get(1)
    assert answer(link)[0].value is not None
    link.close()


def test_the_name_is_free_once_the_worker_has_ended(worker: Worker) -> None:
    link = MemoryLink(worker.data.door)
    door = worker.data.door
    worker.data.close()
    assert select.select([link.fd], [], [], 10)[0]
    with pytest.raises(OSError):
        link.replies()
    link.close()
    with pytest.raises(OSError):
        MemoryLink(door)
