"""A recorded broker goes through the same decisions again, also after it was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgpack import packb

from zfabric import Client
from zfabric.core import invariants
from zfabric.errors import ConfigError
from zfabric.launch.local import LocalFabric
from zfabric.runtime.recording import MAGIC, Recorder
from zfabric.runtime.replay import Replay
from zfabric.wire import PROTOCOL


def double(x: int) -> int:
    return 2 * x


def fail(text: str) -> None:
    raise LookupError(text)


class Fabric:
    """A broker that records, and a worker, both by command line."""

    def __init__(self, folder: Path, wait_until: Callable[..., Any]) -> None:
        self._folder = folder
        self._wait_until = wait_until
        self.address = "tcp://127.0.0.1:0"
        self.start_broker("events.rec")
        self.worker = self._start("worker", self.address, "--slots", "1", "--name", "w")

    def start_broker(self, record: str, *words: str) -> None:
        file = self._folder / f"{record}.json"
        self.record = self._folder / record
        self.broker = self._start(
            "broker", "--listen", self.address, "--connection-file", str(file),
            "--record", str(self.record), *words,
        )  # fmt: skip
        self._wait_until(
            lambda: file.exists() or self.broker.poll() is not None, what="broker listens"
        )
        self.address = json.loads(file.read_text())["address"]

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "zfabric", *words]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill_broker(self) -> None:
        self.broker.send_signal(signal.SIGKILL)
        self.broker.wait()

    def close(self) -> None:
        for process in (self.worker, self.broker):
            process.terminate()
            process.wait()


@pytest.fixture
def fabric(tmp_path: Path, wait_until: Callable[..., Any]) -> Iterator[Fabric]:
    started = Fabric(tmp_path, wait_until)
    yield started
    started.close()


def zfabric(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zfabric", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_same_decisions_come_out(fabric: Fabric) -> None:
    with Client(fabric.address, slots=None) as client:
        futures = client.map(double, range(200))
        assert client.gather(futures) == [2 * x for x in range(200)]
        failed = client.submit(fail, "no")
        assert isinstance(failed.exception(), LookupError)
        kept = client.submit(double, 21, key="the kept one")
        assert kept.result() == 42
        before = client.info()["tasks"]
        fabric.kill_broker()
    assert stat.S_IMODE(os.stat(fabric.record).st_mode) == 0o600

    replay = Replay(fabric.record)
    n_turns = 0
    for step in replay.steps():
        if step.text.startswith("turn"):
            invariants.check(replay.machine.scheduler)
            n_turns += 1
    replay.close()
    assert n_turns > 3 and not replay.is_torn
    assert replay.machine.scheduler.info()["tasks"] == before

    shown = zfabric("replay", str(fabric.record), "--task", "the kept one", "--check")
    assert shown.returncode == 0, shown.stderr
    assert "running on w, attempt 1" in shown.stdout
    assert "the kept one: finished" in shown.stdout


def test_a_recording_beside_a_journal_begins_with_what_that_holds(
    fabric: Fabric, tmp_path: Path
) -> None:
    journal = ("--journal", str(tmp_path / "journal"))
    fabric.kill_broker()
    fabric.start_broker("first.rec", *journal)
    with Client(fabric.address) as client:
        kept = [client.submit(double, n, key=f"kept {n}") for n in range(20)]
        assert client.gather(kept) == [2 * n for n in range(20)]
        fabric.kill_broker()
        fabric.start_broker("second.rec", *journal)
        # Held, since a future that nobody holds is released: then `before` would race with that.
        after = client.submit(double, 21, key="after")
        assert after.result(30) == 42
        before = client.info()["tasks"]
        fabric.kill_broker()
    replay = Replay(fabric.record)
    for step in replay.steps():
        if step.text.startswith("turn"):
            invariants.check(replay.machine.scheduler)
    replay.close()
    assert replay.machine.scheduler.info()["tasks"] == before
    names = {task.name for task in replay.machine.scheduler.tasks.values()}
    assert names >= {"kept 0", "kept 19", "after"}


def test_a_recording_that_was_cut_off(fabric: Fabric, tmp_path: Path) -> None:
    with Client(fabric.address) as client:
        assert client.submit(double, 4).result() == 8
        fabric.kill_broker()
    whole = fabric.record.read_bytes()
    cut = tmp_path / "cut.rec"
    cut.write_bytes(whole[:-3])
    shown = zfabric("replay", str(cut), "--quiet")
    assert shown.returncode == 0, shown.stderr
    assert "cut off" in shown.stdout


def test_a_recording_that_is_damaged(fabric: Fabric, tmp_path: Path) -> None:
    with Client(fabric.address) as client:
        assert client.submit(double, 4).result() == 8
        fabric.kill_broker()
    damaged = tmp_path / "damaged.rec"
    for damage in (b"\x07", b"\xc1", packb([0, 1.0, b"peer", [7]]), packb([9, 1.0])):
        damaged.write_bytes(fabric.record.read_bytes() + damage + packb([2, 9.0]))
        shown = zfabric("replay", str(damaged), "--quiet")
        assert shown.returncode == 1 and shown.stderr.startswith("zfabric: ")
        [number] = re.findall(r"`zfabric replay --to (\d+) ", shown.stderr)
    before = zfabric("replay", str(damaged), "--quiet", "--to", number)
    assert before.returncode == 0 and f"after {number} events" in before.stdout


def test_a_recording_whose_head_is_damaged(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.rec"
    damaged.write_bytes(packb([MAGIC, PROTOCOL, {"settings": 5}, False]))
    with pytest.raises(ConfigError, match="its head cannot be read"):
        Replay(damaged)


def test_what_is_no_recording(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(os.urandom(100))
    with pytest.raises(ConfigError, match="no recording"):
        Replay(other)
    with pytest.raises(ConfigError, match="there already"):
        Recorder(other)
    refused = zfabric("broker", "--listen", "tcp://127.0.0.1:0", "--record", str(other))
    assert refused.returncode == 2
    assert "there already" in refused.stderr


def test_a_fabric_that_stands_still_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    """Workers that are stopped, while their sessions may be silent for an hour, run nothing.
    What a worker says of its rows is up to 1 s old, hence the 2.5 s."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name, value in {"STALL_S": 2.5, "BEAT_S": 0.1, "SUSPECT_S": 1e3, "DEAD_S": 1e4}.items():
        monkeypatch.setenv(f"ZFABRIC_{name}", str(value))
    with LocalFabric(n_workers=2, slots=1) as fabric, Client(fabric) as client:
        client.wait_for_workers(2)
        client.gather(client.map(double, range(4)))
        for pid in fabric.pids[1:]:
            os.kill(pid, signal.SIGSTOP)
        try:
            pending = client.submit(double, 5, key="stuck")
            wait_until(lambda: list(tmp_path.glob("zfabric-stall-*.json")), what="a report")
            assert client.info()["stalled_s"] > 0
            (report, *_) = tmp_path.glob("zfabric-stall-*.json")
            shown = zfabric("replay", str(report))
        finally:
            for pid in fabric.pids[1:]:
                os.kill(pid, signal.SIGCONT)
        assert "no progress" in shown.stdout
        assert "stuck" in shown.stdout
        assert pending.result() == 10
