"""A fabric of one's own: it comes up, goes down, and leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import zfabric
from zfabric.errors import ConfigError, TaskError, ZFabricError
from zfabric.launch import local
from zfabric.launch.local import LocalFabric

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.mark.parametrize("kind", ["process", "thread"])
@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_it_runs_tasks_and_leaves_no_process_and_no_socket_file(kind: str, scheme: str) -> None:
    with LocalFabric(n_workers=2, slots=1, kind=kind, scheme=scheme) as fabric:
        pids = fabric.pids
        directory = Path(fabric._directory)
        assert directory.stat().st_mode & 0o777 == 0o700
        with zfabric.Client(fabric) as client:
            assert client.address.startswith(scheme)
            client.wait_for_workers(2, timeout=20)
            if scheme == "tcp":  # other users of this host reach the port, so there are keys
                with pytest.raises(zfabric.ConnectFailed, match="keys"):
                    zfabric.Client(client.address, timeout=1)
            assert client.gather(client.map(abs, range(-50, 0))) == list(range(50, 0, -1))
    assert not directory.exists()
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_a_worker_in_the_brokers_process_and_one_outside_share_the_work() -> None:
    with LocalFabric(slots=1) as fabric:
        fabric.add_worker()
        assert fabric.n_workers == 2 and len(fabric.pids) == 2
        with zfabric.Client(fabric.address) as client:
            client.wait_for_workers(2, timeout=20)
            # A value made on the one is read on the other, over their data sockets.
            first = client.submit(bytes, 1_000_000, workers="local-1")
            assert client.submit(len, first, workers="local-2").result(timeout=20) == 1_000_000
            second = client.submit(bytes, 2_000_000, workers="local-2")
            assert client.submit(len, second, workers="local-1").result(timeout=20) == 2_000_000
            assert len(second.result(timeout=20)) == 2_000_000


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"n_workers": -1}, "make no fabric"),
        ({"slots": 0}, "make no fabric"),
        ({"kind": "fiber"}, "process"),
        ({"scheme": "pigeon"}, "ipc"),
    ],
)
def test_numbers_that_make_no_sense_start_nothing(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        LocalFabric(**arguments)


def test_closing_takes_less_than_two_seconds_with_a_task_that_never_ends() -> None:
    client = zfabric.Client(slots=1)
    forever = client.submit(time.sleep, 3600)
    assert client.submit is not None and not forever.done()
    client.wait_for_workers(1, timeout=20)
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 2.0
    with pytest.raises(ZFabricError):
        forever.result(timeout=5)


def test_a_killed_broker_ends_what_waits_for_it(wait_until: Callable[..., Any]) -> None:
    with zfabric.Client(slots=1) as client:
        client.submit(abs, -1).result(timeout=20)
        waiting = client.submit(time.sleep, 3600)
        os.kill(client._fabric.pids[0], signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(TaskError, match="local broker .* SIGKILL"):
            waiting.result(timeout=20)
        assert time.monotonic() - started < 3.0
        with pytest.raises(ZFabricError):
            client.submit(abs, -1)


SCRIPT = """
import os, sys, time, zfabric
client = zfabric.Client(n_workers=int(sys.argv[1]), slots=2)
client.wait_for_workers(int(sys.argv[1]), timeout=20)
client.submit(abs, -1).result()
waiting = client.submit(time.sleep, 3600)
print(*client._fabric.pids, client._fabric._directory, flush=True)
waiting.result()
"""


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_its_owner(
    how: signal.Signals, n_workers: int, wait_until: Callable[..., Any]
) -> None:
    """By kill -9 as well: the lifeline tells broker and worker, and the kernel tells the slots."""
    owner = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(n_workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None and owner.stderr is not None
    try:
        *pids, directory = owner.stdout.readline().split()
        family = [psutil.Process(int(pid)) for pid in pids]
        family += [slot for process in family for slot in process.children(recursive=True)]
        # A single worker lives in the broker's process; each has two slots.
        assert len(family) == (3 if n_workers == 1 else 7)
        started = time.monotonic()
        owner.send_signal(how)
        owner.wait(timeout=10)
        wait_until(lambda: not any(p.is_running() for p in family), what="family gone")
        assert time.monotonic() - started < 4.0
        if how == signal.SIGINT:
            # One traceback, of the script's own KeyboardInterrupt; none of the fabric's processes.
            assert owner.stderr.read().count("Traceback") == 1
        assert not Path(directory).exists()
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
        owner.stderr.close()


def test_only_the_interpreters_own_directories_are_left_out_of_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beside = [f"{sys.prefix}/src/app", f"{sys.prefix}-project", f"{sys.base_prefix}/src/app"]
    monkeypatch.setattr(sys, "path", [*beside, *sys.path])
    told = local._environment()["PYTHONPATH"].split(os.pathsep)
    assert told[: len(set(beside))] == list(dict.fromkeys(beside))
    assert not set(told) & set(sysconfig.get_paths().values())
    assert not [entry for entry in told if entry.endswith((".zip", "lib-dynload"))]


@pytest.mark.parametrize("options", [{"slots": "2"}, {"n_workers": 1.5}, {"slots": True}])
def test_numbers_that_are_none_are_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}=.*whole number"):
        local.LocalFabric(**options)
