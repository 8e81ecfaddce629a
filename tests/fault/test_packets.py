"""A broker and two workers, each a host of its own, and packets that do not arrive as they should.

Rows 9, 14 to 18 and 20 of the matrix. Each execution leaves a line `number attempt worker` in an
audit file: nothing may be missing, and nothing may be there twice.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pytest import param

import zfabric
from benchmarks.sampler.cells import ready, start
from tests.fault.packet_net import CLEAR, CUT, PacketNetwork, Way, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.fault,
    pytest.mark.root,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

FULL = "FAULT_SECONDS" in os.environ
only_full = pytest.mark.skipif(not FULL, reason="`make faults` runs it")
ZF = [sys.executable, "-m", "zfabric"]
SOON = {"ZFABRIC_BEAT_S": "0.2", "ZFABRIC_SUSPECT_S": "0.8", "ZFABRIC_DEAD_S": "2"}


class Hosts:
    """The broker is here, workers `a` and `b` with a slot each are elsewhere."""

    def __init__(self, stack: ExitStack, audit: Path, **environ: str) -> None:
        self.audit = audit
        environ["ZFABRIC_SHARED_MEMORY"] = "off"  # what is on one host after all
        self.net = PacketNetwork("a", "b", seed=1)
        stack.callback(self.net.close)
        listen = f"tcp://{self.net.address['here']}:0"
        address = ready(start(stack, [*ZF, "broker", "--listen", listen, "--insecure"], environ))
        self.workers: dict[str, subprocess.Popen[str]] = {}
        for name in "ab":
            door = f"tcp://{self.net.address[name]}:0"
            argv = [*ZF, "worker", address, "-n", "1", "--name", name, "--data-address", door]
            argv += ["--insecure"]
            self.workers[name] = start(stack, self.net.command(name, argv), environ)
        self.client = stack.enter_context(zfabric.Client(address))
        self.client.wait_for_workers(2, timeout=60)

    def lines(self) -> list[tuple[str, ...]]:
        if not self.audit.exists():
            return []
        return [tuple(line.split()) for line in self.audit.read_text().splitlines()]

    def begun(self, number: int) -> list[tuple[str, ...]]:
        return [line for line in self.lines() if line[0] == str(number)]

    def check(self, numbers: range) -> None:
        """Each began, and none twice as one attempt."""
        assert {int(line[0]) for line in self.lines()} == set(numbers)
        assert max(Counter(line[:2] for line in self.lines()).values()) == 1

    def check_last(self, worker: str) -> None:
        """Task 0 ended as its last attempt did."""
        self.check(range(1 + max(int(line[0]) for line in self.lines())))
        last = max(self.begun(0), key=lambda line: int(line[1]))
        assert len(self.begun(0)) > 1 and worker == last[2]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., Hosts]]:
    with ExitStack() as stack:
        yield lambda **environ: Hosts(stack, tmp_path / "audit", **environ)


def work(audit: str, number: int, gate: str = "") -> str:
    from zfabric.runtime.slot_context import current

    here = current()
    assert here is not None
    fd = os.open(audit, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{number} {here.attempt} {here.worker}\n".encode())
    os.close(fd)
    while gate and not os.path.exists(gate):
        time.sleep(0.01)
    return here.worker


def noise(nbytes: int, seed: int) -> bytes:
    import random

    return random.Random(seed).randbytes(nbytes)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_row_9_two_workers_that_do_not_reach_each_other(hosts: Callable[..., Hosts]) -> None:
    h = hosts()
    data = [h.client.submit(noise, 300_000, n, workers="a") for n in range(3)]
    zfabric.wait(data)
    first = h.client.submit(digest, data[0], workers="b")
    assert first.result(30) == digest(noise(300_000, 0))  # the two have met
    h.net.between("a", "b", CUT)
    seen = [h.client.submit(digest, each, workers="b") for each in data[1:]]
    assert h.client.gather(seen) == [digest(noise(300_000, n)) for n in (1, 2)]
    h.net.between("a", "b", CLEAR)
    more = h.client.submit(noise, 300_000, 9, workers="a")
    assert h.client.submit(digest, more, workers="b").result(60) == digest(noise(300_000, 9))


def test_row_14_a_partition_shorter_than_the_dead_time(
    hosts: Callable[..., Hosts], tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    h = hosts()
    gate = tmp_path / "gate"
    running = h.client.submit(work, str(h.audit), 0, str(gate), workers="a")
    wait_until(lambda: h.begun(0))
    h.net.between("a", "here", CUT)
    beside = [h.client.submit(work, str(h.audit), n, workers="b") for n in range(1, 30)]
    assert h.client.gather(beside) == ["b"] * 29
    lost = h.net.counts["lost"]
    wait_until(lambda: h.net.counts["lost"] > lost, 20.0)  # it has tried to speak
    gate.touch()
    h.net.between("a", "here", CLEAR)
    assert running.result(60) == "a"
    assert sorted(int(line[0]) for line in h.lines()) == list(range(30))


@pytest.mark.parametrize("deaf", ["broker", param("worker", marks=only_full), "both"])
def test_rows_14_and_15_a_partition_longer_than_the_dead_time(
    hosts: Callable[..., Hosts], deaf: str, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    """One way or both: the task begins anew elsewhere, the late end counts for nothing, and the
    worker that was given up is one again."""
    h = hosts(**SOON)
    gate = tmp_path / "gate"
    running = h.client.submit(work, str(h.audit), 0, str(gate))
    [(_, _, first)] = wait_until(lambda: h.begun(0))
    if deaf != "worker":
        h.net.set(first, "here", CUT)
    if deaf != "broker":
        h.net.set("here", first, CUT)
    wait_until(lambda: len(h.begun(0)) > 1, 60.0)
    gate.touch()
    ended = running.result(60)
    h.net.between(first, "here", CLEAR)
    wait_until(lambda: len(h.client.info()["workers"]) == 2, 60.0)
    assert h.client.submit(work, str(h.audit), 1, workers=first).result(60) == first
    h.check_last(ended)


class Flapping(threading.Thread):
    """Cuts a host off and joins it again, for as long as it is asked to."""

    def __init__(self, net: PacketNetwork, host: str, period_s: float) -> None:
        super().__init__(daemon=True)
        self.net, self.host, self.period_s = net, host, period_s
        self.n_cuts = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(self.period_s):
            self.n_cuts += 1
            self.net.between(self.host, "here", CUT)
            self.over.wait(self.period_s)
            self.net.between(self.host, "here", CLEAR)


@pytest.mark.timeout(300)  # 60 cuts of 1 s, a second between them
def test_row_16_a_link_that_comes_and_goes(hosts: Callable[..., Hosts]) -> None:
    h = hosts()
    flapping = Flapping(h.net, "a", 1.0 if FULL else 0.1)
    flapping.start()
    count, rounds = 0, 0
    try:
        while flapping.n_cuts < (60 if FULL else 5):
            rounds += 1
            futures = [
                h.client.submit(work, str(h.audit), count + n, workers="ab"[n % 2])
                for n in range(20)
            ]
            assert h.client.gather(futures) == ["a", "b"] * 10
            count += 20
    finally:
        flapping.over.set()
        flapping.join()
    h.check(range(count))


BAD_WIRES = {
    "loss of 5 %": Way(loss=0.05),
    "loss of 30 %": Way(loss=0.3),
    "100 ms, in any order": Way(delay_s=0.05, jitter_s=0.1),
    "doubles and damage": Way(double=0.2, damage=0.05, jitter_s=0.01),
}


QUICK = ("loss of 5 %", "doubles and damage")


@pytest.mark.parametrize(
    "wire", [param(w, marks=() if w in QUICK else only_full) for w in BAD_WIRES]
)
def test_row_17_packets_lost_late_doubled_and_damaged(
    hosts: Callable[..., Hosts], wire: str
) -> None:
    h = hosts()
    for one, other in [("a", "here"), ("b", "here"), ("a", "b")]:
        h.net.between(one, other, BAD_WIRES[wire])
    data = h.client.submit(noise, 100_000, 5, workers="a")
    seen = h.client.submit(digest, data, workers="b")
    futures = [h.client.submit(work, str(h.audit), n) for n in range(50)]
    assert set(h.client.gather(futures)) <= {"a", "b"}
    assert seen.result(60) == digest(noise(100_000, 5))
    assert digest(data.result(60)) == digest(noise(100_000, 5))
    h.check(range(50))


@only_full
def test_row_18_beats_beside_a_large_value_on_a_slow_link(hosts: Callable[..., Hosts]) -> None:
    """1 Mbit/s, and more than the dead time for one value: nobody is taken for dead."""
    h = hosts(ZFABRIC_COMPRESSION="off")
    slow = Way(rate=125_000)
    h.net.between("a", "here", slow)
    incarnation = h.client.submit(os.getppid, workers="a").result(30)
    data = h.client.submit(noise, 5_000_000, 6, workers="a")
    assert digest(data.result(120)) == digest(noise(5_000_000, 6))
    assert h.client.submit(os.getppid, workers="a").result(60) == incarnation


def test_row_20_a_worker_that_vanishes_without_a_farewell(
    hosts: Callable[..., Hosts], tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    h = hosts(**SOON)
    gate = tmp_path / "gate"
    running = h.client.submit(work, str(h.audit), 0, str(gate))
    [(_, _, first)] = wait_until(lambda: h.begun(0))
    other = "ab".replace(first, "")
    h.net.between(first, "here", CUT)
    h.net.between(first, other, CUT)
    h.workers[first].kill()  # nobody hears of it
    wait_until(lambda: len(h.begun(0)) > 1, 60.0)
    gate.touch()
    h.check_last(running.result(60))
