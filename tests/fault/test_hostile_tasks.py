"""Tasks that do to their process what no task should: each ends as told, and harms nobody else.

Rows 28 to 34 of the fault matrix. Everything that a task starts is bounded.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zfabric import Client, CodecError, KilledTask, LocalFabric, TaskFailed

pytestmark = [pytest.mark.slow, pytest.mark.fault]


@pytest.fixture(scope="module")
def fabric() -> Iterator[LocalFabric]:
    with LocalFabric(slots=2) as fabric:
        yield fabric


@pytest.fixture(scope="module")
def client(fabric: LocalFabric) -> Iterator[Client]:
    with Client(fabric) as client:
        yield client


@pytest.fixture(autouse=True)
def nobody_else_is_harmed(client: Client) -> Iterator[None]:
    beside = client.map(pow, range(20), [2] * 20)
    yield
    assert client.gather(beside) == [n * n for n in range(20)]
    assert client.submit(pow, 2, 10).result(30) == 1024


def quiet() -> None:
    """No core dumps, no stack dumps in the log of the test."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()


def segfault() -> None:
    quiet()
    ctypes.string_at(0)


def abort() -> None:
    quiet()
    os.abort()


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_at_once() -> None:
    os._exit(7)


def overflow() -> None:
    """The C stack, by a recursion that Python does not count."""
    quiet()
    sys.setrecursionlimit(10**9)
    nested: Any = []
    for _ in range(10**6):
        nested = [nested]
    repr(nested)
    os.abort()  # where the interpreter counts that recursion after all


@pytest.mark.parametrize(
    ("fn", "how"),
    [
        (segfault, "SIGSEGV"),
        (abort, "SIGABRT"),
        (kill_self, "SIGKILL"),
        (exit_at_once, "exit code 7"),
    ],
)
def test_a_death_is_named_with_all_its_attempts(
    client: Client, fn: Callable[[], None], how: str
) -> None:
    with pytest.raises(KilledTask, match=how) as caught:
        client.submit(fn).result(60)
    assert len(caught.value.attempts) == 3
    assert all(how in text and "peak memory" in text for text in caught.value.attempts)


def test_a_stack_overflow_ends_its_process_or_raises(client: Client) -> None:
    with pytest.raises((KilledTask, RecursionError)):
        client.submit(overflow).result(60)


def leave(how: str) -> None:
    if how == "exit":
        sys.exit(3)
    if how == "quit":
        raise SystemExit
    if how == "interrupt":
        raise KeyboardInterrupt
    raise BaseExceptionGroup("several", [ValueError("one"), KeyboardInterrupt()])


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("exit", SystemExit),
        ("quit", SystemExit),
        ("interrupt", KeyboardInterrupt),
        ("group", BaseExceptionGroup),
    ],
)
def test_what_would_end_a_program_is_the_tasks_error(
    client: Client, how: str, kind: type[BaseException]
) -> None:
    future = client.submit(leave, how)
    assert isinstance(future.exception(30), kind)
    if kind is not BaseExceptionGroup:
        with pytest.raises(TaskFailed, match=kind.__name__) as raised:
            client.gather([future])
        assert isinstance(raised.value.__cause__, kind)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__

    def __reduce__(self) -> Any:
        raise RuntimeError("no pickle")


def raise_odd(how: str) -> None:
    if how == "mute":
        raise Mute
    if how == "huge":
        raise ValueError("x" * 100_000_000)
    if how == "circle":
        one, two = ValueError("one"), KeyError("two")
        one.__cause__, two.__cause__ = two, one
        raise one
    raise ExceptionGroup("group", [ValueError("one"), ExceptionGroup("inner", [KeyError("two")])])


@pytest.mark.parametrize("how", ["mute", "huge", "circle", "group"])
def test_odd_exceptions_arrive_in_some_form(client: Client, how: str) -> None:
    error = client.submit(raise_odd, how).exception(60)
    assert isinstance(error, Exception)
    if how == "group":
        assert isinstance(error, ExceptionGroup)


class Bomb:
    """Harmless until it is loaded."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return _explode, (self.how,)


def _explode(how: str) -> None:
    if how == "raise":
        raise ValueError("not to be loaded")
    sys.exit(4)


def give(what: str) -> Any:
    return (n for n in range(3)) if what == "generator" else Bomb("raise")


def take(_: object) -> str:
    return "never"


def test_values_that_do_not_travel_name_their_side(client: Client) -> None:
    with pytest.raises((CodecError, TypeError), match="cannot return"):
        client.submit(give, "generator").result(30)
    with pytest.raises(CodecError, match="not to be loaded"):
        client.submit(take, Bomb("raise")).result(30)
    with pytest.raises((CodecError, TaskFailed)):
        client.submit(take, Bomb("exit")).result(30)


def have_children(path: str, n: int) -> int:
    """A few children that outlive the task, in its process group."""
    pids = []
    for _ in range(n):
        pid = os.fork()
        if not pid:
            time.sleep(300)
            os._exit(0)
        pids.append(pid)
    Path(path).write_text(" ".join(map(str, pids)))
    os._exit(1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_children_die_with_their_slot(
    client: Client, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    path = tmp_path / "pids"
    with pytest.raises(KilledTask):
        client.submit(have_children, str(path), 5).result(60)
    pids = list(map(int, path.read_text().split()))
    assert len(pids) == 5
    wait_until(lambda: not any(map(is_alive, pids)))


def hold_socket(path: str) -> None:
    """A child in a session of its own keeps the slot's socket open, which tells no end then."""
    pid = os.fork()
    if not pid:
        os.setsid()
        time.sleep(300)
        os._exit(0)
    with open(path, "a") as file:
        file.write(f"{pid} ")
    os._exit(1)


def test_a_death_is_noticed_though_a_child_holds_the_socket(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    try:
        with pytest.raises(KilledTask):
            client.submit(hold_socket, str(path)).result(30)
    finally:
        for pid in path.read_text().split():
            os.kill(int(pid), signal.SIGKILL)


def flood(nbytes: int) -> int:
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    saved = os.dup(1)
    os.dup2(null, 1)
    try:
        for _ in range(nbytes // 10_000):
            print("x" * 9_999)
        sys.stdout.flush()
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)
    return nbytes


def leak_descriptors() -> str:
    held = []
    try:
        while len(held) < 100_000:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as exc:
        return type(exc).__name__
    finally:
        for fd in held:
            os.close(fd)
    return "no limit"


def test_output_and_descriptors_without_end(client: Client) -> None:
    assert client.submit(flood, 50_000_000).result(60) == 50_000_000
    assert client.submit(leak_descriptors).result(60) in ("OSError", "no limit")
