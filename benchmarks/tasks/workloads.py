"""The timed workloads. Each gives figures per task, so that a slow peer may do fewer of them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from benchmarks.measure import Results, deadline, quantile
from benchmarks.tasks import functions
from benchmarks.tasks.peers import Peer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much each workload does when the peer is fast enough for its budget."""

    map: int = 50_000
    calls: int = 2_000
    links: int = 2_000
    leaves: int = 4_096
    small: int = 100_000
    budget_s: float = 20.0
    """A peer does as many tasks of one workload as it is expected to manage in this time."""


PATIENCE = 5
"""A workload is given up after this many budgets: its peer hangs, or the warm-up misled."""

QUICK = Sizes(map=5_000, calls=200, links=200, leaves=512, small=5_000, budget_s=3.0)


def run(peer: Peer, results: Results, sizes: Sizes) -> None:
    """One round of all workloads on a started peer; a workload that fails is noted, not fatal."""
    with deadline(120):
        rate, latency_s = warm_up(peer)
    for workload in (_map, _latency, _chain, _tree, _small):
        try:
            gc.collect()  # what the workload before left behind is not this one's to pay
            with deadline(sizes.budget_s * PATIENCE + 30):
                workload(peer, results, sizes, rate, latency_s)
        except Exception as error:
            results.fail(peer.name, workload.__name__.strip("_"), error)


def warm_up(peer: Peer) -> tuple[float, float]:
    """Runs every function; returns (tasks/s of a map, seconds of one call), roughly."""
    peer.call(functions.nop, 0)
    peer.chain(4)
    peer.tree(4)
    peer.map(functions.small, 16)
    n = 100
    while True:
        seconds = _seconds_of_map(peer, n)
        if seconds > 0.1 or n >= 6_400:
            break
        n *= 4
    latency_s = min(_timed(lambda: peer.call(functions.nop, 0))[0] for _ in range(10))
    return n / seconds, latency_s


def _seconds_of_map(peer: Peer, n: int) -> float:
    return _timed(lambda: peer.map(functions.nop, n))[0]


def _map(peer: Peer, results: Results, sizes: Sizes, rate: float, latency_s: float) -> None:
    n = fitting(sizes.map, rate * sizes.budget_s)
    seconds, values = _timed(lambda: peer.map(functions.nop, n))
    _check(len(values) == n and values[-1] is None, "map")
    results.add(peer.name, "no-op map", "rate", n / seconds, "tasks/s", n, higher_is_better=True)


def _latency(peer: Peer, results: Results, sizes: Sizes, rate: float, latency_s: float) -> None:
    n = fitting(sizes.calls, sizes.budget_s / latency_s)
    call, nop, samples = peer.call, functions.nop, []
    for x in range(n):
        began = perf_counter()
        call(nop, x)
        samples.append(perf_counter() - began)
    samples.sort()
    for name, q in (("p50", 0.5), ("p99", 0.99)):
        results.add(peer.name, "submit→result", name, quantile(samples, q) * 1e6, "µs", n)


def _chain(peer: Peer, results: Results, sizes: Sizes, rate: float, latency_s: float) -> None:
    n = fitting(sizes.links, sizes.budget_s / latency_s)
    seconds, end = _timed(lambda: peer.chain(n))
    _check(end == n, "chain")
    results.add(peer.name, "chain", "per link", seconds / n * 1e6, "µs", n)


def _tree(peer: Peer, results: Results, sizes: Sizes, rate: float, latency_s: float) -> None:
    leaves = sizes.leaves
    while leaves > 64 and 2 * leaves > rate * sizes.budget_s:
        leaves //= 2
    n = 2 * leaves - 1
    seconds, total = _timed(lambda: peer.tree(leaves))
    _check(total == leaves * (leaves + 1) // 2, "tree")
    results.add(peer.name, "tree", "per task", seconds / n * 1e6, "µs", n)


def _small(peer: Peer, results: Results, sizes: Sizes, rate: float, latency_s: float) -> None:
    n = fitting(sizes.small, rate * sizes.budget_s)
    seconds, values = _timed(lambda: peer.map(functions.small, n))
    _check(len(values) == n and values[-1] == functions.small(n - 1), "small results")
    results.add(
        peer.name, "small results", "rate", n / seconds, "tasks/s", n, higher_is_better=True
    )


def fitting(wanted: int, affordable: float) -> int:
    """`wanted`, or what is affordable, but never so few that the figure is noise."""
    return max(min(wanted, int(affordable)), min(wanted, 50))


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    began = perf_counter()
    value = call()
    return perf_counter() - began, value


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"wrong answer of {what}")
