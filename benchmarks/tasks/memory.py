"""Bytes that the broker needs for each finished task whose future somebody still holds."""

from __future__ import annotations

from benchmarks.measure import Results
from benchmarks.tasks import functions

WARM_UP = 20_000
"""Tasks held before the first reading: tables have grown, code and arenas are warm."""


def run(results: Results, n: int, slots: int) -> None:
    """One round: the broker's growth over n held tasks, divided by n."""
    import psutil

    from zfabric.client import Client
    from zfabric.launch.local import LocalFabric

    try:
        with LocalFabric(slots=slots) as fabric, Client(fabric.address) as client:
            broker = psutil.Process(fabric.pids[0])
            held = client.map(functions.nop, range(WARM_UP))
            client.gather(held)
            before = broker.memory_info().rss
            more = client.map(functions.nop, range(n))
            client.gather(more)
            after = broker.memory_info().rss
            held += more
    except Exception as error:
        results.fail("zfabric", "broker memory", error)
        return
    results.add("zfabric", "broker memory", "per held task", (after - before) / n, "B", n)
