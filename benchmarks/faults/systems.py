"""What a system must offer to be hurt, and the processes that it is made of."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from zfabric.testing.chaos import ChaosProxy


class NoSuchVerb(Exception):
    """The system has no way to say this; the text tells what there is instead."""


@dataclass(frozen=True, slots=True)
class Shape:
    """n_workers of `slots` processes each.  dead_s: silence after which a worker is given up.
    proxied: whose connections to the broker go through a ChaosProxy: "", "client" or "workers".
    """

    n_workers: int = 2
    slots: int = 2
    dead_s: float = 6.0
    proxied: str = ""


class System(ABC):
    """`start` before anything else, `stop` at the end; each in a process of its own.

    settings: what is not its default here, for the page.
    """

    name: str
    package: str
    settings: tuple[str, ...] = ()

    def __init__(self, directory: Path, shape: Shape) -> None:
        self.directory = directory
        self.shape = shape
        self.port = free_port()
        self.proxy: ChaosProxy | None = None
        self._processes: list[subprocess.Popen[bytes]] = []

    @classmethod
    def missing(cls) -> str:
        """The line that installs it, or "" when it is here."""
        return "" if importlib.util.find_spec(cls.package) else f"pip install {cls.package}"

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        """A future; futures among the arguments become their values."""

    def submit_limited(self, limit_s: float, fn: Callable[..., Any], *args: Any) -> Any:
        """The same with a limit to how long it may run."""
        raise NoSuchVerb("no time limit of a task")

    def submit_kept(self, fn: Callable[..., Any], *args: Any) -> Any:
        """A future whose value stays at the worker that made it, until somebody asks for it."""
        return self.submit(fn, *args)

    def cancel(self, future: Any) -> None:
        raise NoSuchVerb("no cancel")

    @abstractmethod
    def is_done(self, future: Any) -> bool:
        """Whether its end, good or bad, is known here. Never waits."""

    @abstractmethod
    def take(self, future: Any, timeout_s: float) -> Any:
        """The value of one that is done; raises its error, or TimeoutError."""

    @abstractmethod
    def workers(self) -> list[list[int]]:
        """Per worker the ids of all its processes, the one that the others descend from first."""

    def worker_of(self, pid: int) -> list[int]:
        """The processes of the worker that this one belongs to."""
        return next(worker for worker in self.workers() if pid in worker)

    @abstractmethod
    def kill_broker(self) -> None:
        """SIGKILL to what decides and routes."""

    @abstractmethod
    def restart_broker(self) -> None:
        """Start it again at the same address; nothing where there is no way to."""

    def keep_workers(self) -> None:  # noqa: B027 (most systems' workers stay)
        """Starts those again that have ended by themselves, as an init system does."""

    def stop(self) -> None:
        """Ends what was started, politely first."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + 5.0
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        if self.proxy is not None:
            self.proxy.close()

    def _through_proxy(self, who: str) -> str:
        """The broker's address for "client" or "workers": the proxy's, where this case has one."""
        if who != self.shape.proxied:
            return f"tcp://127.0.0.1:{self.port}"
        if self.proxy is None:
            self.proxy = ChaosProxy(f"tcp://127.0.0.1:{self.port}")
        return self.proxy.address

    def _run(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A Python program whose output goes to a log."""
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
            )
        self._processes.append(process)
        return process

    def _wait_for_port(self, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def family(pid: int) -> list[int]:
    """A process that lives, and all that descend from it; empty when it does not."""
    try:
        head = psutil.Process(pid)
        everyone = [head, *head.children(recursive=True)]
    except psutil.Error:
        return []
    return [process.pid for process in everyone if _lives(process)]


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """A signal to each, whoever of them is still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
