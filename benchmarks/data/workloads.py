"""What is done with large values, and how long it takes."""

from __future__ import annotations

import socket
import statistics
import threading
from multiprocessing import get_context
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from benchmarks.data.peers import DataPeer, join, make, pick, split, touch
from benchmarks.measure import Results, quantile


class Sizes(NamedTuple):
    array: int = 256 * 2**20
    shuffle: int = 512 * 2**20
    parts: int = 64
    calls: int = 300


QUICK = Sizes(array=16 * 2**20, shuffle=16 * 2**20, parts=8, calls=30)


def run(peer: DataPeer, results: Results, sizes: Sizes) -> None:
    n = sizes.array

    def rate(workload: str, nbytes: int, seconds: float) -> None:
        results.add(
            peer.name, workload, "rate", nbytes / seconds / 1e9, "GB/s", n, higher_is_better=True
        )

    peer.wait([peer.submit(make, 10, 1), peer.submit(make, 10, 2)])
    handle = peer.submit(make, n, 7)
    peer.wait([handle])
    began = perf_counter()
    array = peer.gather(handle)
    rate("gather", n, perf_counter() - began)
    assert array.nbytes == n and array[-1] == 7
    del array, handle
    data = np.ones(n, "u1")
    began = perf_counter()
    handle = peer.scatter(data)
    rate("scatter", n, perf_counter() - began)
    began = perf_counter()
    users = [peer.submit(touch, handle) for _ in range(2)]
    peer.wait(users)
    rate("broadcast to two workers", 2 * n, perf_counter() - began)
    began = perf_counter()
    assert peer.gather(peer.submit(touch, handle)) == len(data[::4096])
    results.add(peer.name, "use again", "time", (perf_counter() - began) * 1e3, "ms", n)
    del handle, users, data
    _latency(peer, results, sizes)
    _shuffle(peer, results, sizes)


def _latency(peer: DataPeer, results: Results, sizes: Sizes) -> None:
    """A lone call's round trip, while nothing and while large values move."""
    for state in ("idle", "while values move"):
        stop = threading.Event()
        mover = threading.Thread(target=_move, args=(peer, sizes.array, stop))
        if state != "idle":
            mover.start()
        times = []
        for _ in range(sizes.calls):
            began = perf_counter()
            peer.gather(peer.submit(abs, -1))
            times.append(perf_counter() - began)
        stop.set()
        if state != "idle":
            mover.join()
        times.sort()
        for metric, value in (("p50", statistics.median(times)), ("p99", quantile(times, 0.99))):
            results.add(peer.name, f"call, {state}", metric, value * 1e3, "ms", sizes.calls)


def _move(peer: DataPeer, nbytes: int, stop: threading.Event) -> None:
    data = np.ones(nbytes, "u1")
    while not stop.is_set():
        peer.gather(peer.scatter(data))


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
        sock.recv(1)
        sock.sendall(data)
