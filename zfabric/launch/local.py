"""A fabric of this process's own: a broker and workers as child processes.

They talk over ipc sockets in a directory that only this user can enter, and hold the read end of
a pipe whose write end is ours: however this process ends, they see it and end as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from zfabric.errors import ConfigError, ConnectFailed

START_S = 20.0
"""Seconds that a broker may take to listen; it takes 0.1 on an idle machine."""

STOP_S = 2.0
"""Seconds that a process may take to end before it is killed."""

BROKER_MODULE = "zfabric.runtime.broker"
WORKER_MODULE = "zfabric.runtime.worker"
EMBEDDED_MODULE = "zfabric.runtime.embedded"
"""A broker and its first worker in one process."""


class LocalFabric:
    """A broker and workers on this host, for as long as this object is open.

    n_workers: worker processes.  slots: tasks at a time, per worker; default: the cores of this
    host that this process may use, shared out between the workers.  kind: "process" or "thread".
    scheme: "ipc" (default) or "tcp" on loopback, which other users of this host can reach: with
    keys of its own then, made for it and gone with it, unless keys=False.
    resources: what each worker has, e.g. GPU=1.
    memory_limit: bytes that a slot's process may take; a task above it is killed. 0: any.
    echo: whether what tasks print appears on this process's stdout and stderr; ZFABRIC_ECHO=off
    says no as well.
    Raises ConfigError for numbers that make no sense, ConnectFailed when the broker does not
    come up; nothing is left running then.
    """

    def __init__(
        self,
        n_workers: int = 1,
        slots: int | None = None,
        kind: str = "process",
        *,
        scheme: str = "ipc",
        keys: bool = True,
        resources: dict[str, float] | None = None,
        memory_limit: int = 0,
        echo: bool = True,
    ) -> None:
        self._echo = echo
        _check_number("n_workers", n_workers)
        _check_number("memory_limit", memory_limit)
        self._memory_limit = memory_limit
        self._share = max(1, n_workers)
        """Of what one worker on this host takes of its memory for values, each takes a part."""
        if slots is None:
            slots = max(1, usable_cores() // max(1, n_workers))
        _check_number("slots", slots)
        if n_workers < 0 or slots < 1:
            raise ConfigError(f"{n_workers} workers with {slots} slots each make no fabric")
        if kind not in ("process", "thread"):
            raise ConfigError(f'kind must be "process" or "thread", not {kind!r}')
        if scheme not in ("ipc", "tcp"):
            raise ConfigError(f'a local fabric talks over "ipc" or "tcp", not {scheme!r}')
        self.slots = slots
        self.kind = kind
        self._keys = ""
        self._resources = resources or {}
        self._directory = tempfile.mkdtemp(prefix="zfabric-", dir=_runtime_directory())
        self._lifeline_read, self._lifeline_write = os.pipe2(os.O_CLOEXEC)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._finalizer = weakref.finalize(
            self,
            _stop_all,
            self._processes,
            self._lifeline_read,
            self._lifeline_write,
            self._directory,
            os.getpid(),
        )
        try:
            listen = f"ipc://{self._directory}/broker" if scheme == "ipc" else "tcp://127.0.0.1:0"
            if scheme == "tcp" and keys:
                self._make_keys()
            self.n_workers = 0
            """Workers started so far."""
            self.address = self._start_broker(listen, n_workers)
            """What a Client takes: the broker's address, or with keys the path of a join file."""
            while self.n_workers < n_workers:
                self.add_worker()
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids: the broker's, which is the first worker's too if that is the only one it
        was made with; then the other workers'."""
        return [process.pid for process in self._processes]

    def add_worker(
        self, slots: int | None = None, resources: dict[str, float] | None = None
    ) -> None:
        """Start one more worker; it joins when it is up."""
        self._start_worker(self.address, slots or self.slots, resources or self._resources)

    def broker_ended(self) -> str:
        """How the broker ended by itself, in a sentence; "" while it runs."""
        code = self._processes[0].poll() if self._processes else None
        if code is None:
            return ""
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the local broker (pid {self._processes[0].pid}) ended: {how}; make a new Client"

    def close(self) -> None:
        """End all processes, within 2 s, and leave nothing behind. Closing twice is fine."""
        self._finalizer()

    def __enter__(self) -> LocalFabric:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "open" if self._finalizer.alive else "closed"
        return f"<LocalFabric {self.address} workers={self.n_workers} slots={self.slots} {state}>"

    def _start_broker(self, listen: str, n_workers: int) -> str:
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        try:
            options: dict[str, Any] = {
                "address": listen,
                "ready_fd": ready_write,
                "orphaned_directory": self._directory,
            }
            if self._keys:
                options["keys"] = self._keys
            if n_workers == 1 and listen.startswith("ipc:"):
                options |= self._worker_options(self.slots, self._resources)
                self._start(EMBEDDED_MODULE, options, [ready_write])
            else:
                self._start(BROKER_MODULE, options, [ready_write])
                # An ipc address is known before the broker listens there: workers start beside.
                while listen.startswith("ipc:") and self.n_workers < n_workers:
                    self._start_worker(listen, self.slots, self._resources)
            os.close(ready_write)
            ready_write = -1
            address = self._wait_ready(ready_read, listen)
            return os.path.join(self._keys, "client.join") if self._keys else address
        finally:
            os.close(ready_read)
            if ready_write >= 0:
                os.close(ready_write)

    def _make_keys(self) -> None:
        """In our directory, and by their paths to our processes: no secret is on a command line."""
        from zfabric.keys import KeyRing

        self._keys = os.path.join(self._directory, "keys")
        ring = KeyRing.create(Path(self._keys))
        for role in ("worker", "client"):
            ring.add(role, role)

    def _wait_ready(self, ready_fd: int, listen: str) -> str:
        if not select.select([ready_fd], [], [], START_S)[0]:
            raise ConnectFailed(listen, START_S, f"the local broker did not start in {START_S:g} s")
        address = os.read(ready_fd, 4096).decode().strip()
        if not address:
            code = self._processes[0].wait()
            raise ConnectFailed(
                listen,
                0,
                f"the local broker ended at once (exit code {code}); see its message above",
            )
        return address

    def _start_worker(self, address: str, slots: int, resources: dict[str, float]) -> None:
        if self._keys:
            address = os.path.join(self._keys, "worker.join")
        options = {"address": address, **self._worker_options(slots, resources)}
        options["share"] = self._share
        self._start(WORKER_MODULE, options, [])

    def _worker_options(self, slots: int, resources: dict[str, float]) -> dict[str, Any]:
        self.n_workers += 1
        return {
            "slots": slots,
            "kind": self.kind,
            "name": f"local-{self.n_workers}",
            "resources": resources,
            "memory_limit": self._memory_limit,
        }

    def _start(self, module: str, options: dict[str, Any], fds: list[int]) -> None:
        options["lifeline_fd"] = self._lifeline_read
        self._processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(options)],
                stdin=subprocess.DEVNULL,
                pass_fds=[self._lifeline_read, *fds],
                # Ctrl-C in a terminal goes to its whole process group; ours end by their lifeline.
                start_new_session=True,
                env=_environment() | ({} if self._echo else {"ZFABRIC_ECHO": "off"}),
            )
        )


def usable_cores() -> int:
    """Cores that this process may run on, which a container or `taskset` makes fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _environment() -> dict[str, str]:
    """Ours, and on the import path whatever this process added to the interpreter's own, such as
    the directory of the script: tasks then import what the script imports."""
    own = [entry or os.getcwd() for entry in sys.path]
    theirs = _interpreters_own()
    added = [e for e in own if e not in theirs]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(added))}


def _interpreters_own() -> set[str]:
    """What any process of this interpreter has on its path by itself. No prefixes: a program may
    well lie below that of the interpreter, in /usr/src/app or beside a virtual environment."""
    paths = sysconfig.get_paths()
    own = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    version = f"python{sys.version_info.major}{sys.version_info.minor}"
    for prefix in {sys.base_prefix, sys.base_exec_prefix}:
        own.add(os.path.join(prefix, sys.platlibdir, f"{version}.zip"))
        own.add(os.path.join(prefix, "lib", f"{version}.zip"))
    own |= {os.path.join(paths[name], "lib-dynload") for name in ("stdlib", "platstdlib")}
    own |= set(site.getsitepackages())
    return own


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r}: it is a whole number, such as {name}=2")


def _runtime_directory() -> str | None:
    """Where sockets belong: $XDG_RUNTIME_DIR when it is short enough for an ipc path."""
    directory = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = len(directory) < 60 and os.path.isdir(directory) and os.access(directory, os.W_OK)
    if usable:
        return directory
    return None if len(tempfile.gettempdir()) < 60 else "/tmp"


def _stop_all(
    processes: list[subprocess.Popen[bytes]],
    lifeline_read: int,
    lifeline_write: int,
    directory: str,
    owner: int,
) -> None:
    """Workers first, so that they can still say good-bye; then the broker."""
    if os.getpid() != owner:
        return  # a fork of the owner: the fabric is not its to end
    deadline = time.monotonic() + STOP_S
    for process in reversed(processes):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    os.close(lifeline_write)
    os.close(lifeline_read)
    for process in reversed(processes):
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    processes.clear()
    shutil.rmtree(directory, ignore_errors=True)
