"""The broker's memory while a peer does not read, and while strangers come and go."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

import zfabric
from benchmarks.sampler.cells import ready, start

pytestmark = pytest.mark.fault

MB = 1_000_000
ROW = 4000
"""Bytes of a result that rides along in rows."""

ZF = [sys.executable, "-m", "zfabric"]

USER = textwrap.dedent("""
    import hashlib, os, signal, sys
    import zfabric

    def value(n):
        return n.to_bytes(8, "little") * 499

    address, n = sys.argv[1], int(sys.argv[2])
    with zfabric.Client(address) as client:
        first = client.submit(value, 0)
        first.result()
        futures = client.map(value, range(n), workers="late")
        futures[0].result()
        print("told", flush=True)  # and all others are on their way
        got = client.gather(futures)
    wrong = [i for i, each in enumerate(got) if each != value(i)]
    print("right" if len(got) == n and not wrong else f"wrong: {wrong[:5]}", flush=True)
""")


def resident(process: Any) -> int:
    return int(psutil.Process(process.pid).memory_info().rss)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def broker(stack: ExitStack, **environ: str) -> tuple[subprocess.Popen[str], str]:
    process = start(stack, [*ZF, "broker", "--listen", "tcp://127.0.0.1:0", "--insecure"], environ)
    return process, ready(process)


def median_call(client: zfabric.Client, n: int = 100) -> float:
    times = []
    for number in range(n):
        began = time.perf_counter()
        client.submit(abs, -number, workers="early").result()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@pytest.mark.parametrize("n", [pytest.param(8_000), pytest.param(250_000, marks=pytest.mark.slow)])
def test_row_5_a_stopped_client_with_results_due(
    n: int, stack: ExitStack, tmp_path: Path, wait_until: Any
) -> None:
    """Row 5 of the matrix: what is due to it is kept once, others do not notice, it goes on."""
    process, address = broker(stack)
    for name in ("early", "late"):
        start(stack, [*ZF, "worker", address, "-n", "1", "--name", name], {})
    client = stack.enter_context(zfabric.Client(address))
    client.wait_for_workers(2, timeout=60)
    script = tmp_path / "user.py"
    script.write_text(USER)
    idle = median_call(client)
    before = resident(process)
    user = start(stack, [sys.executable, str(script), address, str(n)], {})
    assert user.stdout is not None and user.stdout.readline() == "told\n"
    wait_until(lambda: client.info()["tasks"]["submitted"] > n, 60.0)
    os.kill(user.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: client.info()["tasks"]["total_done"] > n, 60.0)
        while_stopped = median_call(client)
        grown = resident(process) - before
        info = client.info()
    finally:
        os.kill(user.pid, signal.SIGCONT)
    assert user.stdout.readline() == "right\n"
    assert info["clients"] == 2
    assert info["unacked_bytes"] < 2 * 16 * 1024 * 1024
    # Records and small values, once; what is on its way, in the outbox and the socket.
    assert grown < n * (ROW + 1500) + 80 * MB
    assert while_stopped < 10 * idle


def test_a_session_has_its_share_and_release_makes_room(stack: ExitStack, wait_until: Any) -> None:
    process, address = broker(stack, ZFABRIC_SESSION_BYTES="2000000")
    start(stack, [*ZF, "worker", address, "-n", "1"], {})
    client = stack.enter_context(zfabric.Client(address))
    other = stack.enter_context(zfabric.Client(address))
    client.wait_for_workers(1, timeout=60)
    before = resident(process)
    futures = client.map(bytes, [10] * 20_000)
    with pytest.raises(zfabric.QuotaExceeded, match="ZFABRIC_SESSION_BYTES"):
        client.gather(futures)
    assert other.submit(abs, -1).result() == 1
    zfabric.wait(futures)
    del futures
    wait_until(lambda: not client.info()["tasks"]["finished"])
    client.gather(client.map(bytes, [10] * 1000))
    assert client.info()["refused"] > 10_000
    assert resident(process) - before < 40 * MB


def test_row_42_short_connections_and_strangers_leave_nothing(
    stack: ExitStack, wait_until: Any
) -> None:
    process, address = broker(stack)
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    where = (host, int(port))

    def round_of(n: int) -> None:
        for number in range(n):
            with socket.create_connection(where) as stranger:
                stranger.sendall(os.urandom(64) if number % 2 else b"GET / HTTP/1.1\r\n\r\n")
        for _ in range(n // 50):
            with zfabric.Client(address) as client:
                client.info()

    round_of(300)
    watched = psutil.Process(process.pid)
    client = stack.enter_context(zfabric.Client(address))
    wait_until(lambda: client.info()["clients"] == 1)
    memory, descriptors = resident(process), watched.num_fds()
    round_of(1000)
    wait_until(lambda: client.info()["clients"] == 1)
    wait_until(lambda: watched.num_fds() <= descriptors + 8, 20.0)
    assert resident(process) - memory < 8 * MB


def test_row_24_a_message_that_never_ends(stack: ExitStack, wait_until: Any) -> None:
    process, address = broker(stack)
    client = stack.enter_context(zfabric.Client(address))
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    before = resident(process)
    with socket.create_connection((host, int(port)), timeout=20) as stranger:
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16) + b"\0" + bytes(31)
        ready_ = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
        stranger.sendall(greeting + b"\x04" + bytes([len(ready_)]) + ready_)
        stranger.recv(1)
        frame = b"\x03" + (MB).to_bytes(8, "big") + bytes(MB)  # "more" follows, each time
        with pytest.raises(OSError):
            for _ in range(100_000):
                stranger.sendall(frame)
                time.sleep(0.002)  # half a gigabyte per second
    wait_until(lambda: resident(process) - before < 50 * MB)
    info = client.info()
    assert info["errors"]["bad:endless"] == 1 and info["clients"] == 1
