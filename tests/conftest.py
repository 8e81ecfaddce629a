"""What every test may use: waiting for a condition, free ports, a count of what is left over."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# A shared machine stalls now and then, and a stall is no failure: no deadline per example. CI is
# repeatable; a run by hand looks at new examples each time.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def wait_until(condition: Callable[[], Any], timeout_s: float = 10.0, what: str = "") -> Any:
    """Waits until `condition()` is true and returns its value; fails with the last value seen."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        seen = condition()
        if seen:
            return seen
        if time.monotonic() > deadline:
            pytest.fail(f"{what or condition} not true after {timeout_s} s; last seen: {seen!r}")
        pause.wait(0.005)


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[..., Any]:
    return wait_until


@pytest.fixture
def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def open_descriptors() -> dict[int, str]:
    """This process's open files: number to what it points at."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = os.readlink(entry)
        except OSError:  # the descriptor that was listing this folder
            continue
    return found


def child_processes() -> set[int]:
    """Ids of the processes that this one started and that have not been waited for."""
    import psutil

    return {child.pid for child in psutil.Process().children(recursive=True)}


def _threads() -> set[threading.Thread]:
    """All but those that start with the process's first use of ZeroMQ, and stay: pyzmq's own, and
    the one that ends the context at exit."""
    return {
        thread
        for thread in threading.enumerate()
        if type(thread).__name__ != "GarbageCollectorThread" and thread.name != "zfabric-zmq-term"
    }


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Fails the test when it leaves a child process, a thread or a descriptor behind.

    ZeroMQ's own context keeps its descriptors for the whole process, so a test that is the
    first to use it may keep a handful; a leak per object is found by looping inside the test.
    """
    gc.collect()
    children, threads = child_processes(), _threads()
    descriptors = len(open_descriptors())
    yield
    gc.collect()
    wait_until(lambda: child_processes() <= children, what="children gone")
    wait_until(lambda: _threads() <= threads, what="threads gone")
    if sys.platform == "linux":
        spare = 16  # the ZeroMQ context and its I/O threads
        wait_until(
            lambda: len(open_descriptors()) <= descriptors + spare, what="descriptors closed"
        )
