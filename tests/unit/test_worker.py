"""The worker's process, against a broker that is this test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest

from tests.unit.slot_tasks import add, kill_self, never_end
from zfabric import messages as m
from zfabric import transport, wire
from zfabric.codec import layout
from zfabric.codec.arguments import dump_call
from zfabric.codec.functions import dump_function
from zfabric.codec.references import Reference
from zfabric.codec.serialise import dumps, loads, loads_inline, pack
from zfabric.config import DEFAULTS
from zfabric.core.session import Session
from zfabric.errors import ChannelClosed
from zfabric.runtime.binding import link_options
from zfabric.runtime.fetch import Fetcher
from zfabric.transport.contract import Poller

EPOCH = 7


class Joined:
    """One worker as the broker knows it."""

    def __init__(self, token: int, peer: bytes, hello: m.Hello, number: int) -> None:
        self.session = Session(token, EPOCH, now=monotonic())
        self.peer = peer
        self.hello = hello
        self.number = number
        self.seen: list[Any] = []
        self.functions: set[int] = set()

    def outcomes(self) -> dict[int, tuple[int, bytes]]:
        """Status and payload of each row that it reported."""
        out: dict[int, tuple[int, bytes]] = {}
        for message in self.seen:
            if isinstance(message, m.Done):
                out.update(zip(message.ids, zip(message.statuses, message.payloads), strict=True))
        return out


class Broker:
    """Welcomes workers, and says what the test wants said."""

    def __init__(self, address: str) -> None:
        self.listener = transport.listen(address, **link_options(address, DEFAULTS))
        self.address = self.listener.address
        self.poller = Poller()
        self.poller.add(self.listener)
        self.joined: dict[int, Joined] = {}
        self.refuse: tuple[str, str] | None = None
        self.refused: set[int] = set()
        self.gone: set[bytes] = set()
        self.ids = 0

    @property
    def last(self) -> Joined:
        return list(self.joined.values())[-1]

    def run(self, worker: Joined, fn: Any, *args: Any, deps: Any = ()) -> int:
        self.ids += 1
        dumped = dump_function(fn)
        functions = [] if dumped.id in worker.functions else [tuple(dumped)]
        worker.functions.add(dumped.id)
        payload = bytes(pack(dump_call(args, {})[0]))
        sparse = [(0, deps)] if deps else []
        worker.session.post(m.Run(functions, [self.ids], [1], [dumped.id], [payload], sparse))
        return self.ids

    def until(self, condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
        deadline = monotonic() + timeout_s
        while not (seen := condition()):
            assert monotonic() < deadline, [j.seen for j in self.joined.values()]
            self.turn(0.05)
        return seen

    def turn(self, timeout_s: float) -> None:
        for worker in self.joined.values():
            session = worker.session
            session.tick(monotonic())
            while worker.peer not in self.gone and (frames := session.next_frames()) is not None:
                try:
                    if not self.listener.send(worker.peer, frames):
                        break
                except ChannelClosed:
                    self.gone.add(worker.peer)
                    break
                session.sent()
        self.poller.wait(timeout_s)
        while (item := self.listener.recv()) is not None:
            peer, frames = item
            if frames:
                self.take(peer, *wire.decode(frames))
            else:
                self.gone.add(peer)

    def take(self, peer: bytes, header: Any, message: Any) -> None:
        if self.refuse and isinstance(message, m.Hello):
            self.refused.add(header.token)
            self.listener.send(peer, wire.encode(m.Refuse(*self.refuse), header.token, EPOCH))
            return
        worker = self.joined.get(header.token)
        if worker is None:
            if isinstance(message, m.Hello):
                worker = Joined(header.token, peer, message, len(self.joined) + 1)
                self.joined[header.token] = worker
                name = message.name or f"w{worker.number}"
                worker.session.post(m.Welcome(worker.number, name, "0", 4096, 1.0, 30.0))
            return
        if worker.session.receive(header, message, monotonic()):
            if isinstance(message, m.Relay):
                for other in self.joined.values():
                    if other.number == message.peer:
                        other.session.post(m.Relay(worker.number, message.frames))
            worker.seen.append(message)

    def close(self) -> None:
        self.listener.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    made = Broker(f"ipc://{tmp_path}/b")
    yield made
    made.close()


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts worker processes, and ends them and whatever they started."""
    started: list[subprocess.Popen[str]] = []

    def begin(address: str, fds: tuple[int, ...] = (), **options: Any) -> subprocess.Popen[str]:
        options = {"slots": 1, **options}
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "zfabric.runtime.worker",
                json.dumps({"address": address, **options}),
            ],
            pass_fds=fds,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def slots_of(broker: Broker, process: subprocess.Popen[str], n_slots: int) -> list[Any]:
    """The worker's slot processes, once they are there."""
    me = psutil.Process(process.pid)
    broker.until(lambda: len(me.children()) == n_slots)
    return list(me.children())


def ends_quietly(process: subprocess.Popen[str], slots: list[Any]) -> None:
    """It leaves with exit code 0, nothing on stderr, and no child."""
    _, errors = process.communicate(timeout=5)
    assert (process.returncode, errors) == (0, "")
    _, alive = psutil.wait_procs(slots, timeout=2)
    assert not alive


def test_a_worker_joins_runs_rows_and_says_goodbye(
    broker: Broker, start: Any, tmp_path: Path
) -> None:
    process = start(broker.address, slots=2, name="anna", resources={"GPU": 2.0})
    worker = broker.until(lambda: broker.joined and broker.last)
    hello = worker.hello
    assert (hello.role, hello.name, hello.slots, hello.threads) == ("worker", "anna", 2, False)
    assert hello.resources == {"GPU": 2.0} and hello.pid == process.pid
    assert hello.data_address.startswith(f"ipc://{tmp_path}/data-")
    ids = [broker.run(worker, add, i, 1) for i in range(100)]
    broker.until(lambda: len(worker.outcomes()) == 100)
    assert [loads_inline(worker.outcomes()[i][1]) for i in ids] == list(range(1, 101))
    slots = slots_of(broker, process, 2)
    process.send_signal(signal.SIGTERM)
    broker.until(lambda: any(isinstance(seen, m.Bye) for seen in worker.seen))
    ends_quietly(process, slots)
    assert not list(tmp_path.glob("data-*")), "its data socket is gone"


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_ctrl_c_ends_a_busy_worker(broker: Broker, start: Any, tmp_path: Path, kind: str) -> None:
    process = start(broker.address, kind=kind)
    worker = broker.until(lambda: broker.joined and broker.last)
    broker.run(worker, never_end, str(tmp_path / "begun"), kind == "process")
    broker.until((tmp_path / "begun").exists)
    process.send_signal(signal.SIGINT)
    broker.until(lambda: any(isinstance(seen, m.Bye) for seen in worker.seen))
    _, errors = process.communicate(timeout=5)
    assert (process.returncode, errors) == (0, "")


def test_a_worker_ends_with_its_parent_and_slots_with_their_worker(
    broker: Broker, start: Any
) -> None:
    read_fd, write_fd = os.pipe()
    process = start(broker.address, fds=(read_fd,), lifeline_fd=read_fd)
    broker.until(lambda: broker.joined)
    slots = slots_of(broker, process, 1)
    os.close(read_fd)
    os.close(write_fd)
    ends_quietly(process, slots)
    other = start(broker.address)
    broker.until(lambda: len(broker.joined) == 2)
    slots = slots_of(broker, other, 1)
    other.kill()
    _, alive = psutil.wait_procs(slots, timeout=5)
    assert not alive, "a slot outlived a supervisor that was killed"


def test_a_killed_slot_is_told_and_the_worker_goes_on(broker: Broker, start: Any) -> None:
    start(broker.address)
    worker = broker.until(lambda: broker.joined and broker.last)
    guilty = broker.run(worker, kill_self, 9)
    fine = broker.run(worker, add, 1, 2)
    broker.until(lambda: len(worker.outcomes()) == 2)
    status, payload = worker.outcomes()[guilty]
    assert status == m.DIED and "SIGKILL" in msgpack.unpackb(payload)[0]
    assert loads_inline(worker.outcomes()[fine][1]) == 3


def test_a_worker_that_is_refused_says_why(broker: Broker, start: Any) -> None:
    broker.refuse = ("version", "install the same zfabric on both sides")
    process = start(broker.address)
    broker.until(lambda: process.poll() is not None)
    assert process.returncode == 1
    assert "install the same zfabric on both sides" in process.stderr.read()


def test_a_worker_that_was_given_up_before_it_was_welcomed(broker: Broker, start: Any) -> None:
    broker.refuse = ("unknown", "it was given up")
    start(broker.address)
    broker.until(lambda: len(broker.refused) > 1)
    broker.refuse = None
    broker.until(lambda: broker.joined)


def test_a_worker_that_is_not_known_any_more_joins_as_a_new_one(broker: Broker, start: Any) -> None:
    start(broker.address)
    old = broker.until(lambda: broker.joined and broker.last)
    made = broker.run(old, np.zeros, 100_000)
    broker.until(lambda: made in old.outcomes())
    broker.listener.send(
        old.peer, wire.encode(m.Refuse("unknown", "the broker restarted"), old.session.token, EPOCH)
    )
    broker.until(lambda: len(broker.joined) == 2)
    new = broker.last
    row = broker.run(new, add, 1, 2)
    broker.until(lambda: row in new.outcomes())
    assert loads_inline(new.outcomes()[row][1]) == 3


def test_a_worker_whose_old_hello_began_another_session_joins_again(
    broker: Broker, start: Any
) -> None:
    start(broker.address)
    broker.until(lambda: broker.joined)
    first = broker.last
    first.session.post(m.Welcome(first.number, "w", "0", 4096, 1.0, 30.0))  # to a repeated Hello
    done = broker.run(first, abs, -1)
    broker.until(lambda: done in first.outcomes())
    assert broker.last is first
    first.session.post(m.Welcome(first.number + 100, "w", "0", 4096, 1.0, 30.0))
    broker.until(lambda: len(broker.joined) == 2)
    assert broker.last.hello.previous == first.session.token


def test_what_a_worker_cannot_read_ends_its_session(broker: Broker, start: Any) -> None:
    """A message that is dropped would be sent again for ever, and the rows behind it with it."""
    start(broker.address)
    old = broker.until(lambda: broker.joined and broker.last)
    head, body = wire.encode(m.Free([1]), old.session.token, EPOCH, seq=1)
    broker.listener.send(old.peer, [head, bytes(body)[:-1] + b"\xc1"])
    broker.until(lambda: len(broker.joined) == 2)
    assert any(isinstance(message, m.Bye) for message in old.seen)
    new = broker.last
    row = broker.run(new, add, 1, 2)
    broker.until(lambda: row in new.outcomes())


def test_a_worker_waits_for_a_broker_that_is_not_there_yet(tmp_path: Path, start: Any) -> None:
    process = start(f"ipc://{tmp_path}/b")
    line = process.stderr.readline()
    assert "nothing answers at" in line and "zfabric broker" in line
    broker = Broker(f"ipc://{tmp_path}/b")
    try:
        broker.until(lambda: broker.joined)
    finally:
        broker.close()


@pytest.mark.parametrize(
    ("options", "text"),
    [({"address": "nonsense"}, "not an address"), ({"kind": "fibre"}, '"process" or "thread"')],
)
def test_options_that_make_no_sense_are_one_line(
    tmp_path: Path, start: Any, options: Any, text: str
) -> None:
    process = start(**{"address": f"ipc://{tmp_path}/b", **options})
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert text in errors and errors.count("\n") == 1


class Future(Reference):
    """A future as arguments have it."""

    __slots__ = ("task_id",)

    def __init__(self, task_id: int) -> None:
        self.task_id = task_id


@pytest.mark.parametrize("direct", [True, False])
def test_values_move_from_worker_to_worker(broker: Broker, start: Any, direct: bool) -> None:
    data = None if direct else ""
    start(broker.address, data_address=data)
    one = broker.until(lambda: broker.joined and broker.last)
    start(broker.address, data_address=data)
    broker.until(lambda: len(broker.joined) == 2)
    two = broker.last
    assert bool(one.hello.data_address) is direct
    made = broker.run(one, np.arange, 1_000_000)
    broker.until(lambda: made in one.outcomes())
    status, payload = one.outcomes()[made]
    assert status == m.STORED
    nbytes = int.from_bytes(payload, "little")
    remote = (made, m.REMOTE, [nbytes, [[one.number, one.hello.data_address]]])
    row = broker.run(two, np.sum, Future(made), deps=[remote])
    broker.until(lambda: row in two.outcomes())
    assert loads_inline(two.outcomes()[row][1]) == sum(range(1_000_000))
    assert any(isinstance(seen, m.Holds) and list(seen.ids) == [made] for seen in two.seen)
    assert any(isinstance(seen, m.Relay) for seen in one.seen) is not direct
    one.session.post(m.Free([made]))
    gone = broker.run(one, len, [])
    broker.until(lambda: gone in one.outcomes())
    missing = broker.run(one, np.sum, Future(made), deps=[(made, m.REMOTE, [nbytes, []])])
    broker.until(lambda: any(isinstance(seen, m.Returned) for seen in one.seen))
    kinds = [type(seen) for seen in one.seen]
    assert kinds.index(m.Missing) < kinds.index(m.Returned)
    assert list(one.seen[kinds.index(m.Returned)].ids) == [missing]


def test_others_can_put_values_into_a_workers_store(broker: Broker, start: Any) -> None:
    start(broker.address)
    worker = broker.until(lambda: broker.joined and broker.last)
    frames = dumps(np.arange(500_000))
    area = memoryview(b"".join(layout.join(frames)))
    poller = Poller()
    fetcher = Fetcher(poller)
    ended: list[Any] = []
    target = (worker.number, worker.hello.data_address)

    def pumped() -> Any:
        fetcher.tick(monotonic())
        for thing in poller.wait(0.02):
            fetcher.on_ready(thing, monotonic())
        return ended

    try:
        fetcher.put(4711, [len(f) for f in frames], area, target, ended.append, monotonic())
        broker.until(pumped)
        assert ended.pop() == ""
        row = broker.run(worker, np.sum, Future(4711), deps=[(4711, m.LOCAL, area.nbytes)])
        broker.until(lambda: row in worker.outcomes())
        assert loads_inline(worker.outcomes()[row][1]) == sum(range(500_000))
        fetcher.fetch(4711, area.nbytes, [target], ended.append, monotonic())
        broker.until(pumped)
        assert (loads(layout.split(ended[0].area, ended[0].sizes)) == np.arange(500_000)).all()
    finally:
        fetcher.close()
