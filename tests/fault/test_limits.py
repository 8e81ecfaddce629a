"""Time limits, retries and at-most-once, with real processes that really die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zfabric import Client, KilledTask, LocalFabric, TaskTimeout, UnknownOutcome
from zfabric.errors import UsageError


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
    assert os.path.getsize(path) == 1
    with pytest.raises(TaskTimeout):
        client.submit(spin, path, timeout=0.8, retries=1).result(30)
    assert os.path.getsize(path) == 3


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
