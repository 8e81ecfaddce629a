"""Time limits, retries and at-most-once, with real processes that really die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zfabric import Client, KilledTask, LocalFabric, MemoryExceeded, TaskTimeout, UnknownOutcome
from zfabric.errors import UsageError

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with LocalFabric(slots=2) as fabric, Client(fabric) as client:
        yield client


def began(path: str) -> int:
    with open(path, "a") as file:
        file.write("x")
    return os.path.getsize(path)


def spin(path: str) -> None:
    began(path)
    while True:
        pass


def fail_twice(path: str, kind: type[Exception]) -> int:
    if began(path) < 3:
        raise kind("again")
    return os.path.getsize(path)


def die(path: str) -> None:
    began(path)
    os.kill(os.getpid(), signal.SIGKILL)


class Flaky(ConnectionError):
    """Of this module, pickled by reference."""


def test_a_time_limit_kills_and_waiting_in_line_does_not_count(
    client: Client, tmp_path: Path
) -> None:
    path = str(tmp_path / "audit")
    start = time.monotonic()
    waiting = client.map(time.sleep, [0.3] * 6, timeout=0.6)  # 0.9 s in line, in all
    client.gather(waiting)
    late = client.submit(spin, path, timeout=1.0)
    with pytest.raises(TaskTimeout, match="limit of 1 s") as caught:
        late.result(30)
    assert isinstance(caught.value, TimeoutError)
    assert time.monotonic() - start < 10
    again = client.submit(time.sleep, 30, timeout=0.3, retries=1)
    with pytest.raises(TaskTimeout):
        again.result(30)


def test_retries_only_after_the_exceptions_asked_for(client: Client, tmp_path: Path) -> None:
    one, two, three = (str(tmp_path / name) for name in "abc")
    good = client.submit(fail_twice, one, Flaky, retries=5, retry_on=ConnectionError)
    bad = client.submit(fail_twice, two, ValueError, retries=5, retry_on=(OSError, KeyError))
    few = client.submit(fail_twice, three, Flaky, retries=1)
    assert good.result(30) == 3
    with pytest.raises(ValueError, match="again"):
        bad.result(30)
    assert os.path.getsize(two) == 1
    with pytest.raises(Flaky):
        few.result(30)


def test_at_most_once(client: Client, tmp_path: Path) -> None:
    once, again = str(tmp_path / "once"), str(tmp_path / "again")
    with pytest.raises(UnknownOutcome, match="SIGKILL"):
        client.submit(die, once, idempotent=False).result(30)
    assert os.path.getsize(once) == 1
    with pytest.raises(KilledTask) as caught:
        client.submit(die, again).result(30)
    assert os.path.getsize(again) == len(caught.value.attempts) == 3
    with pytest.raises(UsageError, match="no retries"):
        client.submit(die, once, idempotent=False, retries=1)


def hoard(nbytes: int) -> int:
    data = bytearray(nbytes)
    data[::4096] = b"x" * len(data[::4096])
    time.sleep(60)
    return len(data)


def test_a_task_that_takes_too_much_memory_dies_alone() -> None:
    with LocalFabric(slots=2, memory_limit=200 * 2**20) as fabric, Client(fabric) as client:
        beside = client.submit(time.sleep, 0.5)
        hoarder = client.submit(hoard, 400 * 2**20)
        with pytest.raises(MemoryExceeded, match=r"used \d+ MiB, .* limit of 200 MiB"):
            hoarder.result(30)
        assert beside.result(30) is None
        assert client.submit(began, os.devnull).result(30) == 0


def hoard_in_children(nbytes: int) -> None:
    """Two children with half of it each."""
    for _ in range(2):
        if os.fork() == 0:
            hoard(nbytes // 2)
            os._exit(0)
    time.sleep(60)


def keep_in_children(nbytes: int) -> int:
    """Many children that have the same memory as their parent."""
    common = b"x" * nbytes
    children = []
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            time.sleep(0.5)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    return len(common)


def test_memory_of_a_tasks_children_counts_and_once_what_they_share() -> None:
    with LocalFabric(slots=1, memory_limit=200 * 2**20) as fabric, Client(fabric) as client:
        assert client.submit(keep_in_children, 80 * 2**20).result(30) == 80 * 2**20
        with pytest.raises(MemoryExceeded, match=r"used \d+ MiB, .* limit of 200 MiB"):
            client.submit(hoard_in_children, 400 * 2**20).result(30)


def score() -> str:
    return Path("/proc/self/oom_score_adj").read_text()


def test_where_memory_runs_out_a_slot_dies_first(client: Client) -> None:
    assert int(client.submit(score).result(30)) >= 800
