"""Running tasks that are cancelled: whatever they do, they end, and nobody else notices."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zfabric import Client, LocalFabric
from zfabric.errors import TaskCancelled

pytestmark = pytest.mark.fault


def spin(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    while True:
        pass


def deaf(path: str) -> None:
    """In C, with the GIL held, and signals that can be ignored ignored."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(path).write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(1000)


def with_children(path: str) -> None:
    child = os.fork()
    if not child:
        grandchild = os.fork()
        if grandchild:
            Path(path).write_text(f"{grandchild}")
        while True:
            time.sleep(1000)
    while True:
        time.sleep(1000)


def note(path: str, number: int) -> int:
    with open(path, "a") as file:
        file.write(f"{number}\n")
    return number


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with LocalFabric(slots=2, resources={"GPU": 1}) as fabric, Client(fabric) as client:
        yield client


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("fn", [spin, deaf, with_children])
def test_what_runs_is_killed_and_its_neighbours_run_once(
    client: Client, fn: Callable[[str], None], tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    pid_file, audit = tmp_path / "pid", tmp_path / "audit"
    endless = client.submit(fn, str(pid_file))
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    pid = int(pid_file.read_text())
    neighbours = client.map(note, [str(audit)] * 50, range(50))
    began = time.monotonic()
    endless.cancel()
    wait_until(lambda: not is_alive(pid))
    assert time.monotonic() - began < 0.5
    with pytest.raises(TaskCancelled):
        endless.result(5)
    assert client.gather(neighbours) == list(range(50))
    assert sorted(map(int, audit.read_text().split())) == list(range(50))


def test_what_it_occupies_is_free_only_when_it_is_dead(
    client: Client, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    pid_file = tmp_path / "pid"
    first = client.submit(spin, str(pid_file), resources={"GPU": 1})
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    second = client.submit(is_alive, int(pid_file.read_text()), resources={"GPU": 1})
    first.cancel()
    assert second.result(10) is False
