"""What is timed, on a running cluster of two workers with two threads each."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Results

MB = 1e6


@dataclass(frozen=True)
class Sizes:
    """How much of each, in one round."""

    trips: int = 200
    """Round trips of messages of one size, of a whole run."""
    tasks: int = 2000
    calls: int = 200
    arrays: tuple[int, ...] = (8_000_000, 64_000_000)
    """Bytes of an array that goes from one worker to the other: a call takes some 40 ms of its own
    where the interpreter's lock is held, more than the bytes of a small one."""
    transfers: int = 8
    rows: int = 2_000_000
    """Of the dataframe that is shuffled, 16 bytes each."""


QUICK = Sizes(trips=20, tasks=100, calls=10, arrays=(8_000_000,), transfers=4, rows=50_000)


def nothing(_number: int) -> None:
    """A task without work: what is timed is the way to it and back."""


def take(array: Any) -> int:
    """A task that wants the array where it runs."""
    return int(array.nbytes)


def make(nbytes: int, _number: int) -> Any:
    import numpy

    return numpy.random.default_rng(0).random(nbytes // 8)


def hold_the_gil(seconds: float) -> int:
    """Python all the time: other threads of the process get the GIL every 5 ms at best."""
    end = time.perf_counter() + seconds
    turns = 0
    while time.perf_counter() < end:
        for _ in range(1000):
            turns += 1
    return turns


def warm_up(client: Any) -> None:
    """Connections stand, and workers have imported pandas and pyarrow, which takes seconds."""
    client.gather(client.map(nothing, range(50), pure=False))
    _calls(client, QUICK.arrays[0], 4, 1)
    _shuffle(client, 1000)


def empty_tasks(peer: str, client: Any, results: Results, sizes: Sizes) -> None:
    """Many at once."""
    begun = time.perf_counter()
    client.gather(client.map(nothing, range(sizes.tasks), pure=False))
    rate = sizes.tasks / (time.perf_counter() - begun)
    results.add(peer, "no-op map", "rate", rate, "tasks/s", sizes.tasks, higher_is_better=True)


def lone_calls(peer: str, client: Any, results: Results, sizes: Sizes) -> None:
    """One after the other."""
    begun = time.perf_counter()
    for number in range(sizes.calls):
        client.submit(nothing, number, pure=False).result()
    each = (time.perf_counter() - begun) / sizes.calls
    results.add(peer, "submit→result", "mean", each * 1e3, "ms", sizes.calls)


def transfers(peer: str, client: Any, results: Results, sizes: Sizes) -> None:
    """Arrays between workers that do nothing else, and between workers of whose two threads one
    holds the GIL; and what a call takes then whose array is where it runs."""
    for held in (False, True):
        with _gil_held(client, 60.0) if held else nullcontext():
            for nbytes in sizes.arrays:
                each = _calls(client, nbytes, sizes.transfers, 1)
                name = f"to the other worker, {nbytes / MB:g} MB" + (", GIL held" if held else "")
                rate = nbytes / MB / each
                results.add(peer, name, "rate", rate, "MB/s", nbytes, higher_is_better=True)
            if held:
                each = _calls(client, 8, sizes.transfers, 0)
                name = "nothing to move, GIL held"
                results.add(peer, name, "mean", each * 1e3, "ms", sizes.transfers)


def shuffles(peer: str, client: Any, results: Results, sizes: Sizes) -> None:
    """Of a dataframe, between workers."""
    results.add(peer, "p2p shuffle", "time", _shuffle(client, sizes.rows), "s", sizes.rows)


ALL = (empty_tasks, lone_calls, transfers, shuffles)


def workers_of(client: Any) -> list[str]:
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


def _calls(client: Any, nbytes: int, n: int, away: int) -> float:
    """Mean seconds of a call that takes an array, one at a time, by the two workers in turn.

    away: 1: the array lies at the other worker and is brought, 0: it is where the call runs.
    """
    workers = workers_of(client)
    homes = [workers[number % 2] for number in range(n)]
    arrays = [
        client.submit(make, nbytes, number, workers=[home], pure=False)
        for number, home in enumerate(homes)
    ]
    # Made, and nowhere else: a task that may run at the other worker would bring them there.
    client.gather(
        [
            client.submit(id, array, workers=[home], pure=False)
            for array, home in zip(arrays, homes, strict=True)
        ]
    )
    begun = time.perf_counter()
    for number, array in enumerate(arrays):
        there = workers[(number + away) % 2]
        got = client.submit(take, array, workers=[there], pure=False).result()
        assert got == nbytes // 8 * 8
    return (time.perf_counter() - begun) / n


@contextmanager
def _gil_held(client: Any, seconds: float) -> Any:
    """One of each worker's two threads runs Python all the time."""
    stop = distributed_event("zfabric-bench-stop", client)
    holders = [
        client.submit(hold_until, stop, seconds, workers=[worker], pure=False)
        for worker in workers_of(client)
    ]
    try:
        yield
    finally:
        stop.set()
        client.gather(holders)
        stop.clear()


def distributed_event(name: str, client: Any) -> Any:
    import distributed

    return distributed.Event(name, client)


def hold_until(stop: Any, seconds: float) -> int:
    """hold_the_gil in slices, until the event is set or the time is over."""
    end = time.perf_counter() + seconds
    turns = 0
    while time.perf_counter() < end and not stop.is_set():
        turns += hold_the_gil(0.5)
    return turns


def _shuffle(client: Any, rows: int) -> float:
    """Seconds from sending the dataframe to the last partition."""
    import dask.dataframe as dd
    import distributed
    import numpy
    import pandas

    frame = pandas.DataFrame({"k": numpy.arange(rows) % 9973, "v": numpy.arange(float(rows))})
    table = dd.from_pandas(frame, npartitions=16)
    begun = time.perf_counter()
    # persist keeps the optimiser from dropping a shuffle that nobody looks at
    done = client.persist(table.shuffle("k", shuffle_method="p2p"))
    client.gather(client.map(len, distributed.futures_of(done), pure=False))
    return time.perf_counter() - begun
