"""A broker and workers in processes of their own, each reached through a proxy with bad weather.

Tasks append a line per execution to an audit file, so that a test can count them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil

from zfabric import Client
from zfabric.client.waiting import slot_context
from zfabric.testing import children
from zfabric.testing.chaos import ChaosProxy

QUICK = {"ZFABRIC_BEAT_S": "0.2", "ZFABRIC_SUSPECT_S": "0.8", "ZFABRIC_DEAD_S": "2.5"}
"""Settings with which silence is noticed in seconds: 12 beats have to be missing, so that a machine
that is merely busy is not taken for a dead one."""


class Execution(NamedTuple):
    """One line of the audit file."""

    name: str
    attempt: int
    pid: int


def piece(audit: str, name: str, gate: str = "", nbytes: int = 0) -> tuple[str, int, bytes]:
    """A task: notes that it runs, waits for a file, and tells (name, its slot's pid, bytes)."""
    context = slot_context()
    line = f"{name} {context.attempt if context is not None else 0} {os.getpid()}\n"
    descriptor = os.open(audit, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, line.encode())
    os.close(descriptor)
    while gate and not os.path.exists(gate):
        time.sleep(0.01)
    return name, os.getpid(), bytes(nbytes)


class Shaken:
    """broker: its process, at `address`.  workers, proxies: by name.  audit: the path of the file.
    front: the proxy that clients may use.
    """

    def __init__(self, directory: Path, settings: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self.directory = directory
        self.audit = str(directory / "audit")
        self._settings = settings
        self._all: list[subprocess.Popen[str]] = []
        self.workers: dict[str, subprocess.Popen[str]] = {}
        self.proxies: dict[str, ChaosProxy] = {}
        self.front = ChaosProxy(self.address)
        try:
            self.broker = self._start("broker", "--listen", self.address, "--strict")
            assert self.broker.stdout is not None
            assert "zfabric broker at" in self.broker.stdout.readline()
        except BaseException:
            self.close()
            raise

    def add_worker(self, name: str, *options: str) -> subprocess.Popen[str]:
        """One with two slots, behind a proxy of its own."""
        self.proxies[name] = ChaosProxy(self.address)
        words = (self.proxies[name].address, "--slots", "2", "--name", name, *options)
        self.workers[name] = self._start("worker", *words)
        return self.workers[name]

    def start_program(self, text: str, *words: str) -> subprocess.Popen[str]:
        """A user's program, whose stdout the test reads."""
        return self._launch("user", ["-c", text, *words], subprocess.PIPE)

    def broker_nbytes(self) -> int:
        """Resident memory of the broker."""
        return int(psutil.Process(self.broker.pid).memory_info().rss)

    def executions(self) -> list[Execution]:
        """All there were so far, in order."""
        path = Path(self.audit)
        lines = path.read_text().splitlines() if path.exists() else []
        return [Execution(n, int(a), int(p)) for n, a, p in map(str.split, lines)]

    def ran(self, name: str) -> list[Execution]:
        """Those of one task."""
        return [execution for execution in self.executions() if execution.name == name]

    def ran_twice(self) -> list[Execution]:
        """Attempts that began more than once."""
        counts = Counter((e.name, e.attempt) for e in self.executions())
        return [e for e in self.executions() if counts[e.name, e.attempt] > 1]

    def number(self, client: Client, name: str) -> int:
        """Of a worker's session; 0 when the broker has none by that name."""
        for worker in client.info()["workers"]:
            if worker["name"] == name:
                return int(worker["number"])
        return 0

    def log(self, name: str) -> str:
        """What the broker or a worker has said on stderr."""
        return (self.directory / f"{name}.log").read_text()

    def close(self) -> None:
        """End everything."""
        children.end(list(reversed(self._all)), patience_s=5)
        for proxy in (self.front, *self.proxies.values()):
            proxy.close()

    def _start(self, role: str, *words: str) -> subprocess.Popen[str]:
        name = words[words.index("--name") + 1] if "--name" in words else role
        stdout = subprocess.PIPE if role == "broker" else None
        return self._launch(name, ["-m", "zfabric", role, *words], stdout)

    def _launch(self, name: str, words: list[str], stdout: int | None) -> subprocess.Popen[str]:
        with (self.directory / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *words],
                stdout=stdout or log,
                stderr=log,
                text=True,
                env={**os.environ, **self._settings},
            )
        self._all.append(process)
        return process


def kill_with_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a worker's supervisor; its slots end with it."""
    slots = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(slots, timeout=20)
