"""The commands as people type them: three terminals, Ctrl-C, the README's own examples."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `zfabric ...` and ends it with the test if it still runs. Output goes to a file
    each, so that no pipe can fill up."""
    started: list[subprocess.Popen[str]] = []

    def start_one(*words: str) -> subprocess.Popen[str]:
        with open(tmp_path / f"output-{len(started)}", "w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "zfabric", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        started.append(process)
        return process

    yield start_one
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def broker(start: Start, tmp_path: Path, wait_until: Callable[..., Any]) -> Iterator[str]:
    """The address of a broker started by command line."""
    file = tmp_path / "broker.json"
    process = start("broker", "--listen", "tcp://127.0.0.1:0", "--connection-file", str(file))
    wait_until(lambda: file.exists() or process.poll() is not None, what="broker listens")
    yield json.loads(file.read_text())["address"]


def zfabric(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zfabric", *words], capture_output=True, text=True, timeout=60
    )


def outputs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("output-*")))


def test_three_terminals(
    start: Start, broker: str, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    worker = start(
        "worker", broker, "-n", "2", "--name", "w1", "-r", "GPU=1", "--memory-limit", "1G"
    )
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.py").write_text("def f(x):\n    return x or 1\n")

    done = zfabric("demo", "--address", broker, "--path", str(source))
    assert done.returncode == 0, done.stderr
    assert "1 worker" in done.stdout

    def seen() -> tuple[object, ...]:
        (worker,) = json.loads(zfabric("status", broker, "--json").stdout)["workers"]
        return worker["name"], worker["slots"], worker["memory_limit"]

    # What a worker says of its memory comes with its first beat.
    wait_until(lambda: seen() == ("w1", 2, 2**30), what="the worker as it was started")
    assert "w1" in zfabric("status", broker).stdout

    began = monotonic()
    worker.send_signal(signal.SIGINT)
    assert worker.wait(10) in (0, 130)
    assert monotonic() - began < 2.5
    text = wait_until(
        lambda: "no worker is connected" in (out := zfabric("status", broker).stdout) and out
    )
    assert f"zfabric worker {broker}" in text
    assert "Traceback" not in outputs(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_each_within_two_seconds(
    start: Start, broker: str, tmp_path: Path, wait_until: Callable[..., Any], number: int
) -> None:
    import psutil

    worker = start("worker", broker, "-n", "2")
    wait_until(lambda: json.loads(zfabric("status", broker, "--json").stdout)["workers"])
    slots = psutil.Process(worker.pid).children(recursive=True)
    assert len(slots) >= 2
    began = monotonic()
    worker.send_signal(number)
    worker.wait(10)
    assert monotonic() - began < 2.5
    wait_until(lambda: not any(slot.is_running() for slot in slots), what="slots gone")
    assert "Traceback" not in outputs(tmp_path)


def test_a_broker_that_is_not_there_is_one_clear_text(free_port: int) -> None:
    began = monotonic()
    done = zfabric("status", f"tcp://127.0.0.1:{free_port}")
    assert done.returncode == 1
    assert f"nothing answers at tcp://127.0.0.1:{free_port}" in done.stderr
    assert "zfabric broker" in done.stderr
    assert "Traceback" not in done.stderr
    assert monotonic() - began < 15


def test_a_listener_beyond_this_host_is_refused() -> None:
    done = zfabric("broker", "--listen", "tcp://0.0.0.0:0")
    assert done.returncode != 0
    assert "--insecure" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_used_port(
    start: Start, broker: str, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    strict = zfabric("broker", "--listen", broker, "--strict")
    assert strict.returncode != 0
    assert "in use" in strict.stderr
    start("broker", "--listen", broker)
    wait_until(lambda: "in use; listening on" in outputs(tmp_path))


def test_the_examples_of_the_readme_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    script = tmp_path / "example.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        # A script's own folder is on its import path, ours is not, unless we are installed.
        env={**os.environ, "PYTHONPATH": str(README.parent)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["261", "261"]
