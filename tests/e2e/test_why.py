"""Why a task has not ended, asked of real brokers and workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zfabric
from zfabric.client import why
from zfabric.launch.local import LocalFabric


def wait_for(path: str) -> str:
    """Runs until that file is there."""
    while not Path(path).exists():
        pass
    return path


def touch(path: str) -> None:
    Path(path).touch()


@pytest.fixture(params=[1, 2], ids=["embedded", "separate"])
def client(request: pytest.FixtureRequest) -> Iterator[zfabric.Client]:
    with zfabric.Client(n_workers=request.param, slots=1) as opened:
        yield opened


def test_a_running_task_and_what_waits_for_it(client: zfabric.Client, tmp_path: Path) -> None:
    begun, end = tmp_path / "begun", tmp_path / "end"
    client.submit(touch, str(begun)).result()
    first = client.submit(wait_for, str(end))
    after = client.submit(len, first)
    while "running" not in dict(first.why().reasons):
        pass
    story = first.why()
    assert story.key == first.key
    assert [code for code, _ in story.reasons] == ["assigned", "running"]
    assert "since" in str(story)
    # By the successor rule it may be at the worker already, which then knows that it waits.
    codes = dict(after.why().reasons)
    assert codes.keys() & {"inputs", "behind"}
    assert client.why(first.key)[0].reasons[0] == story.reasons[0]
    end.touch()
    assert after.result() == len(str(end))
    assert first.why().reasons == (("ended", "it has ended: finished"),)
    assert client.why([first, after]) == [first.why(), after.why()]


def test_no_worker_is_there() -> None:
    with LocalFabric(n_workers=0) as fabric, zfabric.Client(fabric) as client:
        future = client.submit(pow, 2, 3)
        assert [code for code, _ in future.why().reasons] == ["no workers"]


def test_a_broker_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(why, "ANSWER_S", 0.2)
    with LocalFabric(n_workers=0) as fabric, zfabric.Client(fabric) as client:
        future = client.submit(pow, 2, 3)
        os.kill(fabric.pids[0], signal.SIGSTOP)
        try:
            assert [code for code, _ in future.why().reasons] == ["no answer"]
        finally:
            os.kill(fabric.pids[0], signal.SIGCONT)
        monkeypatch.undo()
        assert [code for code, _ in future.why().reasons] == ["no workers"]


def test_the_command(tmp_path: Path) -> None:
    with LocalFabric(n_workers=2, slots=1) as fabric, zfabric.Client(fabric) as client:
        future = client.submit(wait_for, str(tmp_path / "end"), key="the long one")
        while "running" not in dict(future.why().reasons):
            pass
        command = [sys.executable, "-m", "zfabric", "why"]
        said = subprocess.run(
            [*command, "the long one", fabric.address], capture_output=True, text=True, check=True
        )
        assert said.stdout.startswith("the long one: running on")
        assert "runs in slot" in said.stdout
        missing = subprocess.run(
            [*command, "no such", fabric.address], capture_output=True, text=True, check=False
        )
        assert missing.returncode == 1
        assert "has no task called 'no such'" in missing.stderr
        (tmp_path / "end").touch()
        future.result()


def test_work_that_may_wait_for_a_worker_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    with (
        LocalFabric(n_workers=2, slots=1) as fabric,
        zfabric.Client(fabric, no_worker_warning_s=0.2) as client,
    ):
        client.wait_for_workers(2)
        future = client.submit(pow, 2, 5, resources={"GPU": 1}, must_fit=False)
        with pytest.raises(TimeoutError):
            future.result(timeout=1.5)
        assert "asks for resources {'GPU': 1.0}, and no worker fits" in caplog.text
        assert [code for code, _ in future.why().reasons] == ["no fit"]
        fabric.add_worker(resources={"GPU": 1})
        assert future.result() == 32
