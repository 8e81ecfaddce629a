"""A broker that is killed and started again with its journal: nothing told is lost."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.journalled import Journalled
from zfabric import Client, Lock


@pytest.fixture
def fabric(tmp_path: Path) -> Iterator[Journalled]:
    fabric = Journalled(tmp_path)
    yield fabric
    fabric.close()


def wait_for_trouble(fabric: Journalled) -> None:
    """Return when the broker has said that it cannot write; it tells newcomers, too."""
    assert fabric.broker.stderr is not None
    while "no work is taken" not in (line := fabric.broker.stderr.readline()):
        assert line
    with Client(fabric.address) as newcomer:
        assert "cannot be written" in newcomer.info()["journal"]


def audited(path: str, name: str, wait_for: str = "") -> str:
    with open(path, "a") as file:
        file.write(f"{name}\n")
    while wait_for and not os.path.exists(wait_for):
        time.sleep(0.01)
    return name


def test_all_go_on_after_kill_9(
    fabric: Journalled, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    audit, gate = str(tmp_path / "audit"), str(tmp_path / "gate")
    with Client(fabric.address) as client:
        done = client.submit(audited, audit, "done")
        large = client.submit(bytes, 1_000_000)
        assert done.result(timeout=20) == "done"
        assert len(large.result(timeout=20)) == 1_000_000
        running = client.submit(audited, audit, "running", gate)
        wait_until(lambda: "running" in Path(audit).read_text(), 20.0)
        waiting = client.submit(audited, audit, "waiting", gate)
        behind = client.submit(lambda a, b: a + b, running, done)
        fabric.kill_broker()
        away = client.submit(audited, audit, "while it was away")
        fabric.broker = fabric.start_broker()
        # Five seconds where the machine has time for it: `python -m benchmarks journal` measures.
        assert away.result(timeout=60) == "while it was away"
        Path(gate).touch()
        assert running.result(timeout=20) == "running"
        assert waiting.result(timeout=20) == "waiting"
        assert behind.result(timeout=20) == "runningdone"
        assert client.submit(len, large).result(timeout=20) == 1_000_000
        assert client.info()["journal"] == "on"
    ran = Path(audit).read_text().split("\n")[:-1]
    assert sorted(ran) == sorted(set(ran)), "a task ran twice"


def printing(gate: str, progress: str) -> int:
    n = 0
    while not os.path.exists(gate):
        print("line", n, flush=True)
        n += 1
        audited(progress, str(n))
        time.sleep(0.02)
    return n


def test_what_tasks_write_while_the_broker_is_away_is_not_lost(
    fabric: Journalled, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    gate, progress = tmp_path / "gate", tmp_path / "progress"
    with Client(fabric.address) as client:
        future = client.submit(printing, str(gate), str(progress))
        for _ in range(3):
            wait_until(lambda: client.submit(abs, -1).result(timeout=20))
            n_seen = len(future.logs().splitlines())
            wait_until(lambda n=n_seen: len(future.logs().splitlines()) > n + 10, 20.0)
            fabric.kill_broker()
            size = progress.stat().st_size
            wait_until(lambda s=size: progress.stat().st_size > s + 20)  # it writes on
            fabric.broker = fabric.start_broker()
        gate.touch()
        n = future.result(timeout=20)
        wait_until(lambda: future.logs().splitlines() == [f"line {i}" for i in range(n)])


def test_a_lock_that_is_held_stays_held(fabric: Journalled) -> None:
    with Client(fabric.address) as client, Client(fabric.address) as other:
        lock, same = Lock("file", client), Lock("file", other)
        lock.acquire()
        fabric.kill_broker()
        fabric.broker = fabric.start_broker()
        assert not same.acquire(blocking=False)
        assert lock.locked()
        lock.release()
        with same:
            assert lock.locked()


def test_work_waits_while_the_journal_cannot_be_written(
    fabric: Journalled,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    wait_until: Callable[..., Any],
) -> None:
    with Client(fabric.address) as client:
        client.wait_for_workers(1, timeout=20)
        assert client.submit(len, "abc").result(timeout=20) == 3
        unlimited = resource.prlimit(fabric.broker.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(fabric.broker.pid, resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        audit = str(tmp_path / "audit")
        waiting = [client.submit(audited, audit, f"{n}", key=f"{n}") for n in range(20)]
        wait_for_trouble(fabric)
        # Who was there is told as well, and gets the answers that promise nothing.
        assert "cannot be written" in client.info()["journal"]
        assert "takes no work now" in str(client.why(waiting)[0])
        assert client.runs() == []
        wait_until(lambda: "takes no work now" in caplog.text)
        assert not any(future.done() for future in waiting)
        fabric.kill_broker()  # what it has said it knows is in the journal all the same
        fabric.broker = fabric.start_broker()
        assert client.gather(waiting) == [f"{n}" for n in range(20)]
        resource.prlimit(fabric.broker.pid, resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        more = client.submit(audited, audit, "more")
        wait_for_trouble(fabric)
        resource.prlimit(fabric.broker.pid, resource.RLIMIT_FSIZE, unlimited)
        assert more.result(timeout=20) == "more"
        assert client.info()["journal"] == "on"
    ran = Path(audit).read_text().split()
    assert sorted(ran) == sorted(set(ran)), "a task ran twice"


def test_a_journal_in_use_or_of_others_is_refused(fabric: Journalled, tmp_path: Path) -> None:
    other = fabric.start(
        "-m", "zfabric", "broker", "-l", f"ipc://{tmp_path}/o", "--journal", f"{tmp_path}/journal"
    )
    _, errors = other.communicate(timeout=20)
    assert other.returncode == 2
    assert "in use by another broker" in errors
    (tmp_path / "letter").write_text("Dear Sir or Madam, " * 100)
    other = fabric.start(
        "-m", "zfabric", "broker", "-l", f"ipc://{tmp_path}/o", "--journal", f"{tmp_path}/letter"
    )
    _, errors = other.communicate(timeout=20)
    assert other.returncode == 2
    assert "is not a journal of zfabric" in errors
    assert (tmp_path / "letter").read_text().startswith("Dear Sir")
