"""`python -m benchmarks security`: each figure plain and encrypted in turn, and their ratio.

*plain* is what a fabric without keys does on tcp://, a checksum behind each message included, which
encryption makes needless; *bare* is the same without it. Values are what a fabric moves, from
store to store or to a client; messages are the same chunks between two sockets and nothing more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.measure import Results, deadline, environment
from benchmarks.report import header, table
from zfabric import Client, wait
from zfabric.keys import KeyPair
from zfabric.launch.local import LocalFabric
from zfabric.transport import Poller, listen, sodium
from zfabric.transport.curve import ServerKeys

MiB = 1 << 20
CHUNK = 2 * MiB

WAYS = ("bare", "plain", "encrypted")

TARGETS = (
    ("value, 1 connection", "speed", 0.2, True),
    ("values, 2 connections", "speed", 0.35, True),
    ("value to a client", "speed", 0.2, True),
    ("values to a client, 2 connections", "speed", 0.35, True),
    ("messages, 1 connection", "speed", 0.2, True),
    ("messages, 2 connections", "speed", 0.35, True),
    ("submit→result", "p50", 1.2, False),
)
"""(workload, metric, encrypted / plain, whether that is a floor)."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks security", description=__doc__)
    parser.add_argument("--mib", type=int, default=512, help="per transfer [512]")
    parser.add_argument("--calls", type=int, default=1000, help="one at a time, per round [1000]")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    results = Results()
    for _ in range(options.rounds):
        for way in WAYS:
            for n in (1, 2):
                with deadline(300):
                    speed = transfer(options.mib * MiB, n, way)
                workload = f"messages, {n} connection{'s' * (n > 1)}"
                results.add(
                    way, workload, "speed", speed / 1e9, "GB/s", options.mib, higher_is_better=True
                )
    with deadline(900), fabrics() as clients:
        calls(results, clients, options.calls, options.rounds)
        for _ in range(options.rounds):
            for way, client in clients.items():
                values(results, way, client, options.mib * MiB // 2)
    print(header(environment(("pyzmq",))))
    found = sodium.speed()
    if found:
        # Each byte is sealed once and opened once, which takes as long.
        most = found * len(os.sched_getaffinity(0)) / 2
        print(
            f"libsodium seals {found / 1e6:.0f} MB/s on one core: all cores here together could"
            f" encrypt {most / 1e6:.0f} MB/s on their way, if they did nothing else\n"
        )
    print(table(results, WAYS))
    failed = False
    print("\ntargets (encrypted / each other, in this run)")
    for workload, metric, limit, is_floor in TARGETS:
        *others, encrypted = (results.get(way, workload, metric) for way in WAYS)
        assert encrypted is not None
        for way, other in zip(WAYS, others, strict=False):
            if other is None:
                continue
            ratio = encrypted.median / other.median
            good = ratio >= limit if is_floor else ratio <= limit
            failed |= not good
            sign = ">=" if is_floor else "<="
            print(
                f"  {'ok  ' if good else 'MISS'} {workload}, to {way}: {ratio:.2f}"
                f" (wanted {sign} {limit})"
            )
    return int(failed)


def transfer(nbytes: int, connections: int, way: str) -> float:
    """Bytes per second from another process into this one, over loopback."""
    encrypted = way == "encrypted"
    server, client = KeyPair.new(), KeyPair.new()
    guard = ServerKeys(
        server.public,
        server.secret,
        lambda key: "sender" if key == client.public else "",
        lambda user: True,
    )
    more = {"security": guard} if encrypted else {"seal": way == "plain"}
    listener = listen("tcp://127.0.0.1:0", hwm=8, **more)
    told = {
        "address": listener.address,
        "nbytes": nbytes,
        "chunk": CHUNK,
        "connections": connections,
        "seal": way == "plain",
        "keys": [k.hex() for k in (server.public, client.public, client.secret)] * encrypted,
    }
    sender = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.security.sender"], stdin=subprocess.PIPE
    )
    assert sender.stdin is not None
    poller = Poller()
    poller.add(listener)
    try:
        sender.stdin.write(json.dumps(told).encode() + b"\n")
        sender.stdin.flush()
        got, start = 0, 0.0
        wanted = nbytes // CHUNK // connections * connections * CHUNK
        landing = bytearray(CHUNK)
        while got < wanted:
            poller.wait(1.0)
            while (item := listener.recv()) is not None:
                if not item[1]:
                    continue
                landing[:] = item[1][1]
                start = start or perf_counter()
                got += CHUNK
        return (wanted - CHUNK) / (perf_counter() - start)
    finally:
        sender.communicate(b"\n")
        listener.close()
        guard.close()


@contextmanager
def fabrics() -> Iterator[dict[str, Client]]:
    """Clients of two fabrics that stand side by side, one of them with keys; by tcp alone."""
    shared = os.environ.get("ZFABRIC_SHARED_MEMORY")
    os.environ["ZFABRIC_SHARED_MEMORY"] = "off"
    try:
        with (
            LocalFabric(n_workers=2, slots=1, scheme="tcp", keys=False) as plain,
            LocalFabric(n_workers=2, slots=1, scheme="tcp") as keyed,
            Client(plain) as open_client,
            Client(keyed) as keyed_client,
        ):
            clients = dict(zip(WAYS[1:], (open_client, keyed_client), strict=True))
            for client in clients.values():
                client.wait_for_workers(2, timeout=30)
            yield clients
    finally:
        if shared is None:
            del os.environ["ZFABRIC_SHARED_MEMORY"]
        else:
            os.environ["ZFABRIC_SHARED_MEMORY"] = shared


def calls(results: Results, clients: dict[str, Client], n: int, rounds: int) -> None:
    """Lone calls on both fabrics in turn, in microseconds."""
    for client in clients.values():
        lone_calls(client, n // 10 + 20)
    for _ in range(rounds):
        for way, client in clients.items():
            times = lone_calls(client, n)
            results.add(way, "submit→result", "p50", median(times) * 1e6, "µs", n)


def values(results: Results, way: str, client: Client, nbytes: int) -> None:
    """Values that two workers hold, random so that compressing them does not pay: one to the other,
    one each way at once, then to this process."""
    names = [worker["name"] for worker in client.info()["workers"]]
    for n, between, here in (
        (1, "value, 1 connection", "value to a client"),
        (2, "values, 2 connections", "values to a client, 2 connections"),
    ):
        for workload in (between, here):
            made = [client.submit(noise, nbytes // n, workers=name) for name in names[:n]]
            wait(made)
            start = perf_counter()
            if workload == here:
                client.gather(made)
            else:
                others = reversed(names) if n > 1 else names[1:]
                wait([client.submit(len, v, workers=o) for v, o in zip(made, others, strict=True)])
            speed = nbytes / (perf_counter() - start) / 1e9
            results.add(way, workload, "speed", speed, "GB/s", nbytes, higher_is_better=True)


def noise(nbytes: int) -> Any:
    """On a worker: random bytes. Shape (nbytes,), u1."""
    import numpy as np

    return np.random.default_rng().integers(0, 256, nbytes, "u1")


def lone_calls(client: Client, n: int) -> list[float]:
    """Seconds of each of n calls, the next one made when the last one's result is there."""
    times = []
    for number in range(n):
        start = perf_counter()
        client.submit(abs, number).result(30)
        times.append(perf_counter() - start)
    return times
