"""Brokers and workers that are told to end more than once, or whose terminal is gone. Row 40."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import zfabric
from benchmarks.sampler.cells import ready, start

pytestmark = pytest.mark.fault

ZF = [sys.executable, "-m", "zfabric"]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def busy(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    while True:
        try:
            time.sleep(3600)
        except BaseException:
            continue


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)],
    ids=["Ctrl-C twice", "all at once"],
)
def test_more_than_one_signal_ends_a_busy_fabric(
    numbers: tuple[signal.Signals, ...],
    stack: ExitStack,
    tmp_path: Path,
    wait_until: Callable[..., Any],
) -> None:
    broker = start(stack, [*ZF, "broker", "--listen", "tcp://127.0.0.1:0", "--insecure"], {})
    address = ready(broker)
    worker = start(stack, [*ZF, "worker", address, "-n", "1"], {})
    client = stack.enter_context(zfabric.Client(address))
    path = tmp_path / "pid"
    running = client.submit(busy, str(path))
    wait_until(lambda: path.exists() and path.read_text(), 60.0)
    for process in (worker, broker):
        for number in numbers:
            process.send_signal(number)
    # A second signal may come when the interpreter has already given up its handlers.
    ends = (0, 130, *(-number for number in numbers))
    assert worker.wait(30) in ends
    assert not running.done() or running.cancelled()  # it goes with its fabric
    assert broker.wait(30) in ends
    wait_until(lambda: not is_alive(int(path.read_text())))


def test_a_terminal_that_hangs_up(stack: ExitStack, wait_until: Callable[..., Any]) -> None:
    """stdout and stderr are a pipe that nobody reads any more; then SIGHUP comes."""
    broker = start(stack, [*ZF, "broker", "--listen", "tcp://127.0.0.1:0", "--insecure"], {})
    address = ready(broker)
    assert broker.stdout is not None
    broker.stdout.close()
    worker = subprocess.Popen(
        [*ZF, "worker", address, "-n", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert worker.stdout is not None
        worker.stdout.close()
        with zfabric.Client(address) as client:
            client.wait_for_workers(1, timeout=60)
            for n in range(20):
                with zfabric.Client(address) as other:  # the broker has something to say
                    assert other.submit(print, n).result(30) is None
            assert client.submit(os._exit, 3).exception(60) is not None  # and the worker has
            assert client.submit(pow, 2, 5).result(30) == 32
        worker.send_signal(signal.SIGHUP)
        broker.send_signal(signal.SIGHUP)
        worker.wait(30)
        broker.wait(30)
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.parametrize("closed", ["1", "2", "1 2", "0 1 2"])
def test_a_broker_without_standard_streams(closed: str, stack: ExitStack, tmp_path: Path) -> None:
    """As some service managers start them; its sockets must not take the place of stdout."""
    address = f"ipc://{tmp_path}/broker"
    shut = " ".join(f"{fd}>&-" for fd in closed.split())
    command = f'exec "$@" {shut}'
    argv = ["sh", "-c", command, "sh"]
    start(stack, [*argv, *ZF, "broker", "--listen", address], {})
    start(stack, [*argv, *ZF, "worker", address, "-n", "1"], {})
    with zfabric.Client(address, timeout=60) as client:
        client.wait_for_workers(1, timeout=60)
        assert client.submit(print, "to nobody").result(60) is None
        assert client.submit(pow, 2, 5).result(60) == 32
