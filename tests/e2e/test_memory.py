"""A worker with little memory, and jobs that make much more than that."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from zfabric import Client, as_completed
from zfabric.launch.local import LocalFabric
from zfabric.runtime.host_memory import usual_limit

MB = 2**20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A client of a worker that may hold 16 MiB of values."""
    monkeypatch.setenv("ZFABRIC_MEMORY_LIMIT", str(16 * MB))
    monkeypatch.setenv("ZFABRIC_SPILL_DIRECTORY", str(tmp_path))
    with LocalFabric(1, slots=2) as fabric, Client(fabric.address) as client:
        yield client


def make(number: int) -> Any:
    return np.full(MB // 8, float(number))


def total(*parts: Any) -> float:
    return sum(float(part.sum()) for part in parts)


def test_intermediates_ten_times_the_limit(small: Client, wait_until: Any) -> None:
    parts = small.map(make, range(160))
    assert small.submit(len, [0]).result(60) == 1
    wait_until(lambda: small.info()["workers"][0]["spilled"] > 100 * MB, 60)
    # Rows that were at the slots already go on; what they make may wait for a slow disk a while.
    wait_until(lambda: small.info()["workers"][0]["bytes"] <= 16 * MB, 60)
    assert small.info()["workers"][0]["memory_limit"] == 16 * MB
    sums = [small.submit(total, *parts[n : n + 8]) for n in range(0, 160, 8)]
    assert sum(small.gather(sums)) == sum(range(160)) * (MB // 8)
    assert small.gather(parts[3])[0] == 3.0
    data = small.scatter([make(n) for n in range(40)])
    assert [float(each[0]) for each in small.gather(data)] == list(range(40))


def test_a_map_over_what_never_ends_runs_in_flat_memory(small: Client) -> None:
    seen = set()
    for future in as_completed(small.map(make, itertools.count(), max_inflight=8)):
        seen.add(int(future.result()[0]))
        if len(seen) == 100:
            break
    assert seen <= set(range(108))
    worker = small.info()["workers"][0]
    assert worker["values"] <= 20 and worker["spilled"] <= 16 * MB


def test_workers_of_one_fabric_divide_the_hosts_memory(
    monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    monkeypatch.delenv("ZFABRIC_MEMORY_LIMIT", raising=False)
    with LocalFabric(2, slots=1) as fabric, Client(fabric.address) as client:
        share = usual_limit() // 2
        wait_until(lambda: [w["memory_limit"] for w in client.info()["workers"]] == [share] * 2)
