"""What the tasks do. In a module of their own, so that every system's workers can import them."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from typing import Any


def note(audit: str, name: str, what: str) -> None:
    """One line, written at once whoever else writes: what began or ended, and in which process."""
    file = os.open(audit, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, f"{name} {what} {os.getpid()}\n".encode())
    finally:
        os.close(file)


def answer(name: str) -> dict[str, Any]:
    """What `piece` gives for a name: nothing else can be mistaken for it."""
    return {"name": name, "digest": hashlib.sha256(name.encode()).hexdigest()}


def content(name: str, nbytes: int) -> bytes:
    """What `block` gives."""
    pattern = hashlib.sha256(name.encode()).digest()
    return (pattern * (nbytes // len(pattern) + 1))[:nbytes]


def piece(audit: str, name: str, seconds: float, gate: str = "") -> dict[str, Any]:
    """Takes so many seconds, from when the file `gate` exists."""
    note(audit, name, "began")
    while gate and not os.path.exists(gate):
        time.sleep(0.005)
    time.sleep(seconds)
    note(audit, name, "ended")
    return answer(name)


def block(audit: str, name: str, nbytes: int) -> bytes:
    """A value that stays where it was made, in systems that leave values there."""
    note(audit, name, "began")
    data = content(name, nbytes)
    note(audit, name, "ended")
    return data


def digest_of(audit: str, name: str, data: bytes) -> str:
    """A task that needs the value of another one."""
    note(audit, name, "began")
    digest = hashlib.sha256(data).hexdigest()
    note(audit, name, "ended")
    return digest


def endless(audit: str, name: str, walltime: float | None = None) -> None:
    """Never comes back by itself.  walltime: how Parsl hands a time limit on; not looked at."""
    note(audit, name, "began")
    while True:
        pass


def endless_in_c(audit: str, name: str, walltime: float | None = None) -> None:
    """The same inside a call of C, where no Python exception can be raised meanwhile."""
    note(audit, name, "began")
    time.sleep(100_000)


def poison(audit: str, name: str) -> None:
    """Kills the process that runs it, each time."""
    note(audit, name, "began")
    os.kill(os.getpid(), signal.SIGKILL)
