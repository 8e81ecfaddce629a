"""What tests of slots run there. It imports little, so that a slot has it in no time."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from pathlib import Path
from typing import Any


def add(a: int, b: int) -> int:
    return a + b


def fail() -> None:
    raise LookupError("no such thing")


def interrupted() -> None:
    raise KeyboardInterrupt


class Unreadable:
    """Cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


async def later(x: int) -> int:
    return x + 1


def kill_self(number: int) -> None:
    os.kill(os.getpid(), number)


def segfault() -> None:
    # A core file of it would be large, and nobody wants it.
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def start_child_and_die(path: str) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    Path(path).write_text(str(child.pid))
    os._exit(1)


def hold_gil(fifo: str) -> str:
    """Until somebody writes to the pipe; no other thread of the process runs meanwhile."""
    fd = ctypes.PyDLL(None).open(os.fsencode(fifo), os.O_RDONLY)
    os.close(fd)
    return "released"


def never_end(path: str, in_c: bool) -> None:
    """Make a file, then wait for ever; in_c: holding the GIL."""
    Path(path).touch()
    if in_c:
        while True:
            ctypes.PyDLL(None).pause()
    threading.Event().wait()


def wait_blocked(fifo: str) -> str:
    """Until somebody writes to the pipe, telling the worker that this row only waits."""
    from zfabric.runtime.slot_context import current

    context = current()
    assert context is not None
    with context.blocked(), context.blocked():
        Path(fifo).read_text()
    return f"{context.worker} {context.task_id}"


def write(fifo: str) -> None:
    """Let go whoever waits at the other end; it may close it before a byte is written."""
    os.close(os.open(fifo, os.O_WRONLY))


def spoil(array: Any) -> int:
    array[:] = 7
    return int(array.sum())


def n_mappings() -> int:
    """How many values this process has mapped."""
    with open("/proc/self/maps") as lines:
        return sum("zfabric-value" in line for line in lines)


def mapped_at(array: Any) -> tuple[int, int]:
    """Where an array lies, and how many values are mapped."""
    return array.ctypes.data, n_mappings()


def total(*arrays: Any) -> int:
    return int(sum(a[0] for a in arrays))
