"""What is done with large values, and how long it takes."""

from __future__ import annotations

import os
import socket
import statistics
import threading
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from benchmarks.data.peers import DataPeer, first, join, make, pick, split, touch
from benchmarks.measure import Results, quantile

READERS = 4
"""Workers that get a broadcast from the one which has the value."""


class Sizes(NamedTuple):
    array: int = 256 * 2**20
    broadcast: int = 100 * 2**20
    shuffle: int = 512 * 2**20
    parts: int = 64
    calls: int = 300
    moves: int = 2
    """Times that the array goes there and back, at least, while lone calls are timed beside it."""
    repeats: int = 3


QUICK = Sizes(
    array=16 * 2**20,
    broadcast=16 * 2**20,
    shuffle=16 * 2**20,
    parts=8,
    calls=30,
    moves=1,
    repeats=1,
)


def run(peer: DataPeer, results: Results, sizes: Sizes) -> None:
    """All of it with one peer, which has been started."""
    peer.wait([peer.submit(make, 10, 1), peer.submit(make, 10, 2)])
    for _ in range(sizes.repeats):
        # Right before and after what is compared with it: the machine's speed changes.
        plain_socket(results, sizes.array)
        _move_one(peer, results, sizes.array)
    _latency(peer, results, sizes)
    _shuffle(peer, results, sizes)


def _move_one(peer: DataPeer, results: Results, n: int) -> None:
    """One array: from a worker here, from here to a worker, and used there."""

    def rate(workload: str, nbytes: int, seconds: float) -> None:
        results.add(
            peer.name, workload, "rate", nbytes / seconds / 1e9, "GB/s", n, higher_is_better=True
        )

    handle = peer.submit(make, n, 7)
    peer.wait([handle])
    before = peak(since_now=True)
    began = perf_counter()
    array = peer.gather(handle)
    rate("gather", n, perf_counter() - began)
    assert array.nbytes == n and array[-1] == 7
    results.add(peer.name, "gather", "peak of the caller / size", (peak() - before) / n, "x", n)
    del array, handle
    data = np.ones(n, "u1")
    before = peak(since_now=True)
    began = perf_counter()
    handle = peer.scatter(data)
    scattered_s = perf_counter() - began
    rate("scatter", n, scattered_s)
    extra = (peak() - before) / 2**20
    results.add(peer.name, "scatter", "peak of the caller", extra, "MiB", n)
    began = perf_counter()
    peer.wait(peer.submit_to_each(touch, handle))
    spent_s = perf_counter() - began
    rate("use on two workers", 2 * n, spent_s)
    results.add(
        peer.name, "scatter + use on two", "time", (scattered_s + spent_s) * 1e3, "ms", n
    )  # fmt: skip
    for workload, what in (("use again", handle), ("use 64 KiB again", None)):
        if what is None:
            what = peer.scatter(data[: 2**16])
            peer.wait(peer.submit_to_each(first, what))
        began = perf_counter()
        peer.wait(peer.submit_to_each(first, what))
        results.add(peer.name, workload, "time", (perf_counter() - began) * 1e3, "ms", n)


def broadcast(peer: DataPeer, results: Results, sizes: Sizes) -> None:
    """One array, made by one worker and used by all of them at the same time. The peer has been
    started with one worker more than READERS, and has moved nothing yet."""
    n = sizes.broadcast
    workload = f"broadcast to {READERS} workers"
    peer.wait(peer.submit_to_each(first, peer.submit(make, 10, 1)))
    handle = peer.submit(make, n, 7)
    peer.wait([handle])
    began = perf_counter()
    peer.wait(peer.submit_to_each(touch, handle))
    results.add(peer.name, workload, "time", (perf_counter() - began) * 1e3, "ms", n)
    sent = peer.most_sent()
    if sent is not None:
        results.add(peer.name, workload, "sent by one worker at most / size", sent / n, "x", n)


def peak(since_now: bool = False) -> int:
    """This process's highest resident memory, in bytes; since_now: counted from here on."""
    if since_now:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _latency(peer: DataPeer, results: Results, sizes: Sizes) -> None:
    """A lone call's round trip: by itself, beside a process that wants what others leave of one
    core and no more, and while large values move.

    The second is what the machine makes of any company: each wake-up of the call meets a core
    that has something to do.
    """
    for state in ("idle", "busy core", "while values move"):
        if state == "idle":
            times = _calls(peer, sizes.calls, lambda: False)
        elif state == "while values move":
            mover = _Mover(peer, sizes)
            mover.start()
            times = _calls(peer, sizes.calls, mover.has_to_go_on)
            mover.stop()
        else:
            busy = get_context("spawn").Process(target=_be_busy, daemon=True)
            busy.start()
            times = _calls(peer, sizes.calls, lambda: False)
            busy.kill()
            busy.join()
        for metric, value in (("p50", statistics.median(times)), ("p99", quantile(times, 0.99))):
            results.add(peer.name, f"call, {state}", metric, value * 1e3, "ms", sizes.calls)


def _calls(peer: DataPeer, n: int, has_to_go_on: Callable[[], bool]) -> list[float]:
    """Seconds of n calls or more, ascending."""
    times: list[float] = []
    while len(times) < n or has_to_go_on():
        began = perf_counter()
        peer.gather(peer.submit(abs, -1))
        times.append(perf_counter() - began)
    return sorted(times)


def _be_busy() -> None:
    """As little as a process can want of a core, all the time."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while True:
        pass


class _Mover(threading.Thread):
    """An array that goes there and back, again and again."""

    def __init__(self, peer: DataPeer, sizes: Sizes) -> None:
        super().__init__()
        self._peer = peer
        self._data = np.ones(sizes.array, "u1")
        self._left = sizes.moves
        self._may_end = threading.Event()

    def run(self) -> None:
        while not self._may_end.is_set():
            self._peer.gather(self._peer.scatter(self._data))
            self._left -= 1

    def has_to_go_on(self) -> bool:
        """Whether it has not been there and back often enough."""
        return self._left > 0 and self.is_alive()

    def stop(self) -> None:
        self._may_end.set()
        self.join()


def _shuffle(peer: DataPeer, results: Results, sizes: Sizes) -> None:
    n = sizes.parts
    nbytes = sizes.shuffle // (n * n)
    began = perf_counter()
    made = [peer.submit(split, nbytes, n, seed) for seed in range(n)]
    picked = [[peer.submit(pick, each, part) for each in made] for part in range(n)]
    ends = [peer.submit(join, *column) for column in picked]
    total = sum(peer.gather(end) for end in ends)
    seconds = perf_counter() - began
    assert total > 0
    results.add(
        peer.name, f"shuffle {n} x {n}", "rate", sizes.shuffle / seconds / 1e9, "GB/s", n * n,
        higher_is_better=True,
    )  # fmt: skip


def plain_socket(results: Results, nbytes: int) -> None:
    """The measure of all: one process sends, another receives into a fresh array."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = get_context("spawn").Process(target=_send, args=(server.getsockname(), nbytes))
        sender.start()
        sock, _ = server.accept()
        with sock:
            sock.recv(1)  # the sender has its array
            sock.sendall(b"x")
            began = perf_counter()
            view: Any = memoryview(np.empty(nbytes, "u1"))
            while view:
                view = view[sock.recv_into(view) :]
            seconds = perf_counter() - began
        sender.join()
    results.add(
        "socket", "gather", "rate", nbytes / seconds / 1e9, "GB/s", nbytes, higher_is_better=True
    )


def _send(address: tuple[str, int], nbytes: int) -> None:
    with socket.create_connection(address) as sock:
        data = np.ones(nbytes, "u1")
        sock.sendall(b"x")
        sock.recv(1)
        sock.sendall(data)
