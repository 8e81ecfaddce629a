"""`python -m benchmarks.relay`: lone calls while values go through the broker.

Two workers that nobody can dial pass values on by way of the broker; a third one answers lone calls
while the two do nothing, while they compute, and meanwhile. Bulk should not delay control: the p99
should be at most three times that of an idle fabric. Where there are fewer processors than busy
processes, the calls wait for these as well, which the second phase shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

import zfabric
from benchmarks.sampler.cells import ready, start

MB = 1_000_000


def make(nbytes: int, seed: int) -> Any:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def total(array: Any) -> int:
    """What tells whether it came as it was."""
    return int(array.sum(dtype=np.uint64)) * 1_000_003 + int(array[-1])


def spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def call(number: int) -> int:
    return number


def measure(
    client: zfabric.Client, nbytes: int, part: int, idle_s: float, workers: tuple[str, str, str]
) -> dict[str, float]:
    """Lone calls on the third of these workers: for idle_s seconds, as long while the first two
    compute, and while nbytes in values of `part` bytes go from the first to the second."""
    source, target, third = workers
    client.gather([client.submit(call, 1, workers=third) for _ in range(200)])
    until = time.monotonic() + idle_s
    idle = _lone_calls(client, third, lambda: time.monotonic() < until)
    spinning = [client.submit(spin, idle_s, workers=each) for each in (source, target)]
    computing = _lone_calls(client, third, lambda: not all(one.done() for one in spinning))
    n = max(1, nbytes // part)
    made = [client.submit(make, part, seed, workers=source) for seed in range(n)]
    here = client.gather([client.submit(total, one, workers=source) for one in made])
    got: list[int] = []
    seconds: list[float] = []

    def move() -> None:
        began = time.perf_counter()
        for one in made:
            got.append(client.submit(total, one, workers=target).result())
        seconds.append(time.perf_counter() - began)

    mover = threading.Thread(target=move)
    mover.start()
    busy = _lone_calls(client, third, mover.is_alive)
    mover.join()
    if got != here:
        raise AssertionError("a value changed on its way")
    return {
        "idle p50 us": statistics.median(idle) * 1e6,
        "idle p99 us": _p99(idle) * 1e6,
        "computing p50 us": statistics.median(computing) * 1e6,
        "computing p99 us": _p99(computing) * 1e6,
        "relaying p50 us": statistics.median(busy) * 1e6,
        "relaying p99 us": _p99(busy) * 1e6,
        "p99, to idle": _p99(busy) / _p99(idle),
        "p99, to computing": _p99(busy) / _p99(computing),
        "MB/s": n * part / seconds[0] / MB,
    }


def _lone_calls(client: zfabric.Client, worker: str, go_on: Callable[[], bool]) -> list[float]:
    spent = []
    while go_on() or not spent:
        began = time.perf_counter()
        client.submit(call, len(spent), workers=worker, key=f"lone-{time.monotonic_ns()}").result()
        spent.append(time.perf_counter() - began)
    return spent


def _p99(samples: list[float]) -> float:
    return sorted(samples)[int(len(samples) * 0.99)]


def fabric(stack: ExitStack) -> zfabric.Client:
    """A client of a broker with three workers on this host, none of which can be dialled."""
    zf = [sys.executable, "-m", "zfabric"]
    broker = start(stack, [*zf, "broker", "--listen", "tcp://127.0.0.1:0", "--insecure"], {})
    address = ready(broker)
    for name in ("a", "b", "c"):
        argv = [*zf, "worker", address, "-n", "1", "--name", name, "--data-address", ""]
        start(stack, argv, {"ZFABRIC_SHARED_MEMORY": "off"})
    client = stack.enter_context(zfabric.Client(address))
    client.wait_for_workers(3, timeout=60)
    return client


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relay", description=__doc__)
    parser.add_argument("--mb", type=int, default=1000, help="to move in all (default: 1000)")
    parser.add_argument("--part", type=int, default=50, help="MB of each value (default: 50)")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds of calls before")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with ExitStack() as stack:
        client = fabric(stack)
        figures = measure(client, given.mb * MB, given.part * MB, given.idle, ("a", "b", "c"))
    if given.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<18}{value:>12.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
