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
from zfabric.testing import children

ROOT = Path(__file__).resolve().parents[2]
MODES = ("auto", "off", "always")
MiB = 2**20


class Link(NamedTuple):
    """A link and how much crosses it at a time: on the slow ones about a second's worth, raw.

    mbit: 0 is this host.  shared: through shared memory, where nothing is moved.
    """

    name: str
    mbit: int
    nbytes: int
    shared: bool = False


LINKS = (
    Link("10 Mbit", 10, 2 * MiB),
    Link("100 Mbit", 100, 8 * MiB),
    Link("1 Gbit", 1_000, 96 * MiB),
    Link("10 Gbit", 10_000, 128 * MiB),
    Link("loopback", 0, 128 * MiB),
    Link("shared memory", 0, 128 * MiB, shared=True),
)


class Effort(NamedTuple):
    """How often a cell is measured.

    A round fetches once in each mode, in an order that turns, so that what else the machine does
    meets all modes alike. A cell that would miss its aim is measured as long again, up to `again`
    times: all of its rounds count, and a disturbance weighs less.
    """

    rounds: int
    """At least so many rounds."""
    cell_s: float
    """And so many seconds, values made and fetched."""
    most: int = 60
    again: int = 2
    scale: float = 1.0
    """Of the links' bytes."""


FULL = Effort(rounds=3, cell_s=5.0)
QUICK = Effort(rounds=1, cell_s=0.5, again=1, scale=0.25)


def measure(
    link: Link,
    kinds: list[str],
    effort: Effort,
    results: Results,
    is_met: Callable[[str], bool],
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Fetch each kind of data over the link. Returns the links as client and workers saw them.

    is_met: whether the figures of a cell, by its name, reach what they should.
    """
    nbytes = max(int(link.nbytes * effort.scale), MiB // 2)
    with fabric(link) as client:
        for mode in MODES:  # what is measured is the choice, not the first contact
            fetch(client, mode, "random", 256 * 1024, 99)
        for seed, kind in enumerate(kinds):
            cell = f"{link.name}, {kind}"
            number = 0
            for again in range(effort.again + 1):
                if again and is_met(cell):
                    break
                note(f"{cell}{', again' if again else ''}")
                began = time.perf_counter()
                first = number
                while number - first < effort.rounds or (
                    time.perf_counter() - began < effort.cell_s and number - first < effort.most
                ):
                    one_round(client, number, cell, kind, nbytes, seed, results)
                    number += 1
        return client.links()


def one_round(
    client: zfabric.Client,
    number: int,
    cell: str,
    kind: str,
    nbytes: int,
    seed: int,
    results: Results,
) -> None:
    """One fetch in each mode."""
    first = number % len(MODES)
    for mode in MODES[first:] + MODES[:first]:
        rate = nbytes / fetch(client, mode, kind, nbytes, seed) / 1e6
        results.add(mode, cell, "MB/s", rate, "MB/s", nbytes, higher_is_better=True)


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
            environ = {"ZFABRIC_COMPRESSION": mode}
            if not link.shared:
                environ["ZFABRIC_SHARED_MEMORY"] = "off"
            start(stack, wrap(argv), environ)
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
    stack.callback(children.end, [process])
    return process


def ready(broker: subprocess.Popen[str]) -> str:
    """The address that a broker prints when it listens."""
    assert broker.stdout is not None
    for line in broker.stdout:
        if found := re.search(r"tcp://[0-9.]+:\d+", line):
            return found[0]
    raise OSError(f"the broker ended with code {broker.wait()} before it listened")
