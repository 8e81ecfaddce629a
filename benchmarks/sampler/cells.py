"""One fabric per link, with three workers that compress as measured, never, and always."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import zfabric
from benchmarks.measure import Results
from benchmarks.sampler.data import make
from benchmarks.sampler.network import Namespace

ROOT = Path(__file__).resolve().parents[2]
MODES = ("auto", "off", "always")
MiB = 2**20

REPEATS = 8
ENOUGH_S = 0.3
"""A cell whose fetches take a few milliseconds is fetched up to 8 times per round."""


class Link(NamedTuple):
    """A link and how much crosses it: about a second's worth, raw."""

    name: str
    mbit: int
    nbytes: int


LINKS = (
    Link("10 Mbit", 10, 2 * MiB),
    Link("100 Mbit", 100, 12 * MiB),
    Link("1 Gbit", 1_000, 96 * MiB),
    Link("10 Gbit", 10_000, 192 * MiB),
    Link("loopback", 0, 192 * MiB),
)


def measure(
    link: Link,
    kinds: list[str],
    rounds: int,
    scale: float,
    results: Results,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Fetch each kind of data over the link, once per mode and round. Returns the links as the
    client and the workers have seen them."""
    nbytes = max(int(link.nbytes * scale), MiB // 2)
    with fabric(link) as client:
        for mode in MODES:  # what is measured is the choice, not the first contact
            fetch(client, mode, "random", 256 * 1024, 99)
        for kind in kinds:
            for number in range(rounds):
                spent = dict.fromkeys(MODES, 0.0)
                for again in range(REPEATS):
                    for mode in MODES:
                        if again and spent[mode] > ENOUGH_S:
                            continue
                        note(f"{link.name}: {kind}, {mode}")
                        seed = number * REPEATS + again
                        seconds = fetch(client, mode, kind, nbytes, seed)
                        spent[mode] += seconds
                        results.add(
                            mode,
                            f"{link.name}, {kind}",
                            "MB/s",
                            nbytes / seconds / 1e6,
                            "MB/s",
                            nbytes,
                            higher_is_better=True,
                        )
        return client.links()


def fetch(client: zfabric.Client, mode: str, kind: str, nbytes: int, seed: int) -> float:
    """Seconds that a value which stands ready takes to get here."""
    future = client.submit(make, kind, nbytes, seed, workers=mode)
    zfabric.wait([future])
    began = time.perf_counter()
    value = future.result()
    seconds = time.perf_counter() - began
    assert len(value), kind
    return seconds


@contextmanager
def fabric(link: Link) -> Iterator[zfabric.Client]:
    """A client of a broker here, with the three workers at the other end of the link."""
    with ExitStack() as stack:
        wrap: Callable[[list[str]], list[str]] = list
        host = "127.0.0.1"
        if link.mbit:
            namespace = Namespace()
            stack.callback(namespace.close)
            namespace.throttle(link.mbit)
            wrap, host = namespace.command, namespace.here
        zf = [sys.executable, "-m", "zfabric"]
        listen = ["broker", "--listen", f"tcp://{host}:0", "--insecure"]
        broker = start(stack, [*zf, *listen], {})
        address = ready(broker)
        for mode in MODES:
            argv = [*zf, "worker", address, "-n", "1", "--name", mode]
            start(stack, wrap(argv), {"ZFABRIC_COMPRESSION": mode})
        client = stack.enter_context(zfabric.Client(address))
        client.wait_for_workers(len(MODES), timeout=60)
        yield client


def start(stack: ExitStack, argv: list[str], environ: dict[str, str]) -> subprocess.Popen[str]:
    """A process that ends with the stack."""
    process = subprocess.Popen(
        argv,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def stop() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    stack.callback(stop)
    return process


def ready(broker: subprocess.Popen[str]) -> str:
    """The address that a broker prints when it listens."""
    assert broker.stdout is not None
    for line in broker.stdout:
        if found := re.search(r"tcp://[0-9.]+:\d+", line):
            return found[0]
    raise OSError(f"the broker ended with code {broker.wait()} before it listened")
