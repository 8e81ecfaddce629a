"""The processes of a soak: a broker with a journal, three workers, two users, and a proxy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from zfabric.testing import children
from zfabric.testing.chaos import ChaosProxy
from zfabric.testing.soak.user import PROGRAM


class User:
    """A client in a process of its own. lines: what it has said, see `user`."""

    def __init__(self, address: str, directory: str, name: str, seed: int) -> None:
        self.lines: list[dict[str, Any]] = []
        self.said = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, directory, name, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def wait_for(self, field: str, timeout_s: float) -> dict[str, Any] | None:
        """The line with that field; None when it does not come in time."""

        def find() -> dict[str, Any] | None:
            return next((line for line in self.lines if field in line), None)

        with self.said:
            self.said.wait_for(lambda: find() or not self._reader.is_alive(), timeout_s)
            return find()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.said:
                self.lines.append(json.loads(line))
                self.said.notify_all()


class Fabric:
    """Its third worker and its second user reach the broker through `proxy`."""

    def __init__(self, directory: Path, seed: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self.directory = directory
        self._all: list[subprocess.Popen[str]] = []
        self.proxy = ChaosProxy(self.address, seed=seed)
        self.broker = self.start_broker()
        self.workers = [self.start_worker(n) for n in range(3)]
        self.users = [
            User(address, str(directory), f"u{n}", 10 * seed + n)
            for n, address in enumerate((self.address, self.proxy.address))
        ]

    def start_broker(self) -> subprocess.Popen[str]:
        journal = str(self.directory / "journal")
        broker = self._start("broker", "--listen", self.address, "--strict", "--journal", journal)
        assert broker.stdout is not None
        if "zfabric broker at" not in broker.stdout.readline():
            raise RuntimeError("the broker did not start")
        return broker

    def start_worker(self, n: int) -> subprocess.Popen[str]:
        return self._start("worker", self.proxy.address if n == 2 else self.address, "--slots", "2")

    def slots(self) -> list[int]:
        """Ids of slots that have run tasks and live, the latest last."""
        workers = {worker.pid for worker in self.workers}
        audit = self.directory / "audit"
        lines = audit.read_text().splitlines() if audit.exists() else []
        pids = dict.fromkeys(int(line.split()[1]) for line in lines[-200:])
        return [pid for pid in pids if _ancestors(pid) & workers]

    def close(self) -> None:
        children.end([user.process for user in self.users])
        children.end(list(reversed(self._all)))
        self.proxy.close()

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        log = (self.directory / f"{arguments[0]}.log").open("a")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "zfabric", *arguments],
                stdout=subprocess.PIPE if arguments[0] == "broker" else log,
                stderr=log,
                text=True,
            )
        self._all.append(process)
        return process


def _ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1 and pid not in found:
        found.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return set()
    return found


def size_of(pid: int) -> tuple[int, int]:
    """(resident bytes, open descriptors) of a process of ours."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))
