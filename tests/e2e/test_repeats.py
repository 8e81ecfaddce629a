"""The same large argument of many calls leaves its client once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import zfabric

N = 3_000_000


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[zfabric.Client]:
    monkeypatch.setenv("ZFABRIC_SHARED_MEMORY", "off")
    monkeypatch.setenv("ZFABRIC_COMPRESSION", "off")
    fabric = zfabric.LocalFabric(n_workers=2, slots=1, scheme="tcp", keys=False)
    with fabric, zfabric.Client(fabric.address) as client:
        yield client


def sent(client: zfabric.Client) -> int:
    """Bytes that workers got from who called them: what one worker fetches from another comes by
    an address."""
    return sum(
        link["wire_nbytes"]
        for link in client.links()
        if link["direction"] == "in" and link["peer"].startswith("caller")
    )


def changed(data: Any, number: int) -> int:
    """The sum, by a task that writes to what it got."""
    total = int(data.sum())
    data[:] = number
    return total


def test_an_array_goes_once_until_it_changes(client: zfabric.Client) -> None:
    array = np.ones(N, "u1")
    calls = [client.submit(changed, array, number) for number in range(6)]
    assert client.gather(calls) == [N] * 6  # each task has its own, whatever others write
    assert 0.9 * N <= sent(client) < 1.1 * N
    array[0] = 3
    assert client.submit(changed, array, 0).result() == N + 2
    assert 1.8 * N <= sent(client) < 2.1 * N


def test_bytes_go_once(client: zfabric.Client) -> None:
    data = b"z" * N
    calls = [client.submit(bytes.count, data, b"z", number) for number in range(6)]
    assert client.gather(calls) == [N - number for number in range(6)]
    assert client.submit(len, data).result() == N
    assert 0.9 * N <= sent(client) < 1.1 * N


def where(data: bytes) -> int:
    return os.getppid()


def test_what_was_lost_with_its_worker_goes_again(client: zfabric.Client, wait_until: Any) -> None:
    data = b"z" * N
    lost = client.submit(where, data).result()
    os.kill(lost, signal.SIGKILL)
    wait_until(lambda: lost not in [each["pid"] for each in client.info()["workers"]])
    assert client.submit(where, data).result() != lost


def test_one_object_in_the_rows_of_a_map_goes_once(client: zfabric.Client) -> None:
    array = np.ones(N, "u1")
    assert client.gather(client.map(np.sum, [array] * 6)) == [N] * 6
    assert 0.9 * N <= sent(client) < 1.1 * N
