"""Many peers of one broker: workers that it finds again after a restart, clients that only beat.
Rows 13 and 26 of the matrix, with crowds (`zfabric.testing.crowd`): real connections, no work."""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import pytest

import zfabric
from benchmarks.sampler.cells import ready, start
from zfabric.testing import children

pytestmark = pytest.mark.fault

FULL = "FAULT_SECONDS" in os.environ
ZF = [sys.executable, "-m", "zfabric"]
POSSIBLE = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 1_000)
N_CLIENTS = int(os.environ.get("FAULT_CLIENTS", POSSIBLE))
PATIENCE_S = 300 if FULL else 60
BEATS_PER_S = 2500
"""Of all clients together: with as many as a test has, they and the broker share two cores."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def crowd(
    stack: ExitStack, *arguments: str, more: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "zfabric.testing.crowd", *arguments],
        env={**os.environ, **more},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stack.callback(children.end, [process])
    return process


def told(process: subprocess.Popen[str]) -> dict[str, int]:
    """What became of a crowd, which ends now."""
    out, _ = process.communicate(timeout=PATIENCE_S)
    return dict(json.loads(out.splitlines()[-1]))


def welcomed(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "welcomed\n"


@pytest.mark.timeout(2 * PATIENCE_S)
@pytest.mark.parametrize("n", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_row_13_a_restart_under_many_running_workers(
    n: int, stack: ExitStack, tmp_path: Path, free_port: int, wait_until: Callable[..., Any]
) -> None:
    """Each of them runs a task when the broker is killed: no task begins twice or is lost."""
    if n > 50 and not FULL:
        pytest.skip("`make faults` runs it")
    address = f"tcp://127.0.0.1:{free_port}"
    journal = ["--journal", str(tmp_path / "journal"), "--insecure"]
    # Not 3 s: on a busy machine some worker may need longer, and its row would begin again.
    patient = {"ZFABRIC_SETTLE_S": str(PATIENCE_S)}
    broker = start(stack, [*ZF, "broker", "-l", address, *journal], patient)
    assert ready(broker) == address
    workers = crowd(stack, address, str(n), "--task", "1")
    welcomed(workers)
    client = stack.enter_context(zfabric.Client(address))
    futures = client.map(abs, range(3 * n))
    wait_until(lambda: sum(future.done() for future in futures) >= n // 2, PATIENCE_S)
    broker.send_signal(signal.SIGKILL)
    broker.wait()
    began = time.monotonic()
    broker = start(stack, [*ZF, "broker", "-l", address, *journal], patient)
    assert ready(broker) == address
    wait_until(lambda: len(client.info()["workers"]) == n, PATIENCE_S)
    print(f"{n} workers were back {time.monotonic() - began:.2f} s after the start")
    assert client.gather(futures) == [None] * (3 * n)
    assert told(workers) == {"welcomed": n, "begun": 3 * n, "begun_twice": 0}


@pytest.mark.timeout(2 * PATIENCE_S)
@pytest.mark.parametrize("n", [200, pytest.param(N_CLIENTS, marks=pytest.mark.slow)])
def test_row_26_many_clients(n: int, stack: ExitStack, wait_until: Callable[..., Any]) -> None:
    """They cost a bounded amount of memory, which does not grow, and others are answered."""
    if n > 200 and not FULL:
        pytest.skip("`make faults` runs it")
    slow = {"ZFABRIC_BEAT_S": str(min(4.0, max(1.0, n / BEATS_PER_S)))}
    broker = start(stack, [*ZF, "broker", "-l", "tcp://127.0.0.1:0", "--insecure"], slow)
    address = ready(broker)
    client = stack.enter_context(zfabric.Client(address))
    watched = psutil.Process(broker.pid)
    empty = watched.memory_info().rss
    crowds = [crowd(stack, address, str(n // 4), "--clients", more=slow) for _ in range(4)]
    for each in crowds:
        welcomed(each)
    assert client.info()["clients"] == n + 1
    full = watched.memory_info().rss
    lock = zfabric.Lock("nobody's", client)
    times = []
    for _ in range(300):
        began = time.perf_counter()
        assert not lock.locked()
        times.append(time.perf_counter() - began)
    steady = watched.memory_info().rss
    p99 = statistics.quantiles(times, n=100)[-1]
    print(
        f"{n} clients: {(full - empty) / n / 1024:.1f} KiB each, a question is answered within"
        f" {p99 * 1000:.1f} ms (p99), {statistics.median(times) * 1000:.2f} ms (median)"
    )
    assert full - empty < 64 * 1024 * n + 16 * 2**20
    assert steady - full < 4 * 1024 * n + 16 * 2**20
    for each in crowds:
        assert told(each)["welcomed"] == n // 4
    wait_until(lambda: watched.num_fds() < 64, PATIENCE_S)
