"""Clients that are killed, at each stage of what they do: nothing of theirs stays, and those who
work beside them do not notice. Row 36 of the matrix; and a broker without descriptors, row 25."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

import zfabric
from benchmarks.sampler.cells import ready, start
from tests.fault.mixed_work import is_empty

pytestmark = pytest.mark.fault

ZF = [sys.executable, "-m", "zfabric"]

CLIENT = textwrap.dedent("""
    import os, sys, time
    import zfabric

    def wait_for(path):
        while not os.path.exists(path):
            time.sleep(0.01)

    client = zfabric.Client(sys.argv[1])
    stage, gate = sys.argv[2], sys.argv[3]
    if stage == "submitting":
        print("now", flush=True)
        kept = []
        while True:
            kept += client.map(abs, range(1000))
    elif stage == "scattering":
        print("now", flush=True)
        kept = []
        while True:
            kept = [*kept[-3:], client.scatter(bytes(3_000_000))]
    elif stage == "fetching":
        value = client.submit(bytes, 20_000_000)
        zfabric.wait([value])
        print("now", flush=True)
        while True:
            client.submit(bytes, 5_000_000).result()
    elif stage == "running":
        running = client.map(wait_for, [gate] * 4)
        behind = client.submit(len, running)
        while not client.info()["tasks"]["running"]:
            time.sleep(0.01)
        print("now", flush=True)
        behind.result()
    elif stage == "locking":
        lock = zfabric.Lock("shared", client)
        lock.acquire()
        print("now", flush=True)
        client.submit(wait_for, gate).result()
    else:
        kept = client.map(bytes, [100_000] * 20)
        zfabric.wait(kept)
        print("now", flush=True)
        time.sleep(3600)
""")


@pytest.fixture(scope="module")
def fabric() -> Iterator[str]:
    """A broker's address; what clients leave behind is kept for a second."""
    with ExitStack() as stack:
        listen = ["--listen", "tcp://127.0.0.1:0", "--insecure"]
        address = ready(start(stack, [*ZF, "broker", *listen], {"ZFABRIC_LEASE_S": "1"}))
        start(stack, [*ZF, "worker", address, "-n", "2"], {})
        with zfabric.Client(address) as client:
            client.wait_for_workers(1, timeout=60)
        yield address


@pytest.mark.parametrize(
    "stage", ["submitting", "scattering", "fetching", "running", "locking", "idle"]
)
def test_row_36_a_client_that_is_killed(
    stage: str, fabric: str, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    gate, script = tmp_path / "gate", tmp_path / "client.py"
    script.write_text(CLIENT)
    with zfabric.Client(fabric) as beside:
        victim = subprocess.Popen(
            [sys.executable, str(script), fabric, stage, str(gate)],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert victim.stdout is not None
            assert victim.stdout.readline() == "now\n"
            mine = beside.map(pow, range(50), [2] * 50)
        finally:
            victim.kill()
            victim.wait()
            victim.stdout.close()
        try:
            wait_until(lambda: beside.info()["clients"] == 1, 60.0)
        finally:
            gate.touch()
        assert beside.gather(mine) == [n * n for n in range(50)]
        if stage == "locking":
            with zfabric.Lock("shared", beside):
                pass
        del mine
        wait_until(lambda: is_empty(beside.info()), 60.0, "tables and stores empty")


def test_row_25_a_broker_without_descriptors(wait_until: Callable[..., Any]) -> None:
    """A hundred strangers want more than it has: who is there is served, who comes later finds
    room while they are still there, and the broker has nothing to do because of them."""
    with ExitStack() as stack:
        listen = ["--listen", "tcp://127.0.0.1:0", "--insecure"]
        broker = start(stack, [*ZF, "broker", *listen], {})
        address = ready(broker)
        start(stack, [*ZF, "worker", address, "-n", "1"], {})
        client = stack.enter_context(zfabric.Client(address))
        client.wait_for_workers(1, timeout=60)
        watched = psutil.Process(broker.pid)
        allowed, possible = resource.prlimit(broker.pid, resource.RLIMIT_NOFILE)
        assert allowed == possible
        most = watched.num_fds() + 20
        resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (most, most))
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        strangers = []
        for _ in range(100):
            stranger = stack.enter_context(socket.socket())
            stranger.setblocking(False)
            stranger.connect_ex((host, int(port)))
            strangers.append(stranger)
        assert client.gather(client.map(pow, range(200), [2] * 200)) == [n * n for n in range(200)]
        wait_until(lambda: client.info()["errors"].get("bad:descriptors", 0) > 30, 60.0)
        with zfabric.Client(address, timeout=60) as another:
            assert another.submit(pow, 2, 5).result(60) == 32
        before, began = sum(watched.cpu_times()[:2]), time.monotonic()
        wait_until(lambda: time.monotonic() > began + 2.0)
        spent = sum(watched.cpu_times()[:2]) - before
        assert spent < 0.4 * (time.monotonic() - began), "it spins"
        assert watched.num_fds() < most
