"""Row 21: bits that flip on their way between client, broker and workers, without keys.

Never a wrong value, nothing lost, nothing hung; what was found wrong is counted.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import zfabric
from tests.conftest import wait_until
from tests.fault.shaken import QUICK, Shaken
from zfabric import Client
from zfabric.runtime.dialling import dial_data
from zfabric.testing.chaos import CALM, ChaosProxy, Weather
from zfabric.transport import Channel

pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.usefixtures("leaves_nothing"),
    pytest.mark.filterwarnings("ignore:no workers are connected"),
]

PATIENCE_S = 90.0
ROUNDS = 20 if "FAULT_SECONDS" in os.environ else 3

SIZES = (10, 3000, 60_000, 400_000)


def content(number: int, nbytes: int) -> bytes:
    return hashlib.shake_128(str(number).encode()).digest(nbytes)


def digest(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()


@pytest.fixture
def fabric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shaken]:
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    # Values go over the connections that are shaken, not past them.
    monkeypatch.setenv("ZFABRIC_SHARED_MEMORY", "off")
    fabric = Shaken(tmp_path, {})
    yield fabric
    fabric.close()


def test_row_21_flipped_bits_change_no_value(fabric: Shaken) -> None:
    # Without doors of their own, workers exchange values by way of the broker, too.
    for name in ("a", "b"):
        fabric.add_worker(name, "--data-address", "")
    proxies = (fabric.front, *fabric.proxies.values())
    with Client(fabric.front.address) as client:
        client.wait_for_workers(2, timeout=PATIENCE_S)
        found = 0
        for number in range(ROUNDS):
            for proxy in proxies:
                proxy.weather = Weather(flip_every=150_000)
            due = {}
            for n in range(60):
                nbytes = SIZES[n % len(SIZES)]
                made = client.submit(content, 100 * number + n, nbytes, workers="ab"[n % 2])
                due[n] = (made, client.submit(digest, made, workers="ba"[n % 2]))
            pushed = [client.submit(digest, content(n, 20_000)) for n in range(20)]

            def enough() -> bool:
                return sum(proxy.counts["flips"] for proxy in proxies) > found  # noqa: B023

            wait_until(enough, PATIENCE_S, "bits flipped")
            found = sum(proxy.counts["flips"] for proxy in proxies)
            for proxy in proxies:
                proxy.weather = CALM
            for n, (made, told) in due.items():
                want = content(100 * number + n, SIZES[n % len(SIZES)])
                assert made.result(PATIENCE_S) == want
                assert told.result(PATIENCE_S) == digest(want)
            for n, told in enumerate(pushed):
                assert told.result(PATIENCE_S) == digest(content(n, 20_000))
        assert found >= ROUNDS
        assert client.submit(len, "abc").result(PATIENCE_S) == 3
    noticed = [name for name in ("broker", "a", "b") if "came damaged" in fabric.log(name)]
    assert noticed or fabric.front.counts["connections"] > 1


def test_row_21_flipped_bits_on_the_way_of_large_values(
    fabric: Shaken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a worker's own door and who fetches there: a client, by the code with which workers
    fetch from one another."""
    doors: dict[str, ChaosProxy] = {}

    def through_a_proxy(address: str, *rest: Any) -> Channel:
        if address not in doors:
            doors[address] = ChaosProxy(address)
        channel = dial_data(doors[address].address, *rest)
        channel.address = address  # by which it is known to whoever fetches
        return channel

    monkeypatch.setattr("zfabric.runtime.fetch.dial_data", through_a_proxy)
    fabric.add_worker("a", "--data-address", "tcp://127.0.0.1:0")
    nbytes = 8_000_000
    try:
        with Client(fabric.address) as client:
            client.wait_for_workers(1, timeout=PATIENCE_S)
            assert client.submit(content, 0, nbytes).result(PATIENCE_S) == content(0, nbytes)
            (door,) = doors.values()
            for number in range(1, ROUNDS + 1):
                flipped = door.counts["flips"]
                future = client.submit(content, number, nbytes)
                zfabric.wait([future], timeout=PATIENCE_S)
                door.weather = Weather(flip_every=500_000)
                gathered = threading.Thread(target=future.result, args=(PATIENCE_S,))
                gathered.start()
                wait_until(lambda: door.counts["flips"] > flipped, PATIENCE_S)  # noqa: B023
                door.weather = CALM
                gathered.join()
                assert future.result(PATIENCE_S) == content(number, nbytes)
    finally:
        for proxy in doors.values():
            proxy.close()
