"""What tasks change in their process is not what the next one in it finds. Row 34 of the matrix."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zfabric import Client, LocalFabric

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """One slot: each task comes into the process that the one before has left."""
    with LocalFabric(slots=1) as fabric, Client(fabric) as client:
        yield client


def state() -> dict[str, Any]:
    """Of the process that a task finds."""
    umask = os.umask(0)
    os.umask(umask)
    return {
        "pid": os.getpid(),
        "directory": os.getcwd(),
        "environ": dict(os.environ),
        "umask": umask,
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "handlers": [str(signal.getsignal(n)) for n in (2, 13, 14, 15, 17)],
        "timer": signal.setitimer(signal.ITIMER_REAL, 0),
        "limits": [resource.getrlimit(n) for n in range(10)],
        "depth": sys.getrecursionlimit(),
        "files": [os.readlink(f"/proc/self/fd/{n}") for n in range(3)],
        "streams": [sys.stdout.name, sys.stderr.name, sys.stdout.closed, sys.stderr.closed],
    }


def move_away() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)


def rewrite_environ() -> None:
    os.environ["PATH"] = "/nowhere"
    os.environ["LEFT_BEHIND"] = "1"
    del os.environ["HOME"]


def change_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.umask(0o777)


def set_an_alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 3600)


def lower_limits() -> None:
    sys.setrecursionlimit(150)
    for name in ("NOFILE", "FSIZE", "CORE"):
        limit = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(limit, (32, resource.getrlimit(limit)[1]))


def replace_streams() -> None:
    sys.stdout = open(os.devnull, "w")
    sys.stderr = None  # type: ignore[assignment]


def close_streams() -> None:
    sys.stdout.close()
    sys.stderr.close()


def close_files() -> None:
    for fd in range(3):
        os.close(fd)


def redirect_files(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(fd, standard)
    os.close(fd)


@pytest.mark.parametrize(
    "spoil",
    [
        move_away,
        rewrite_environ,
        change_signals,
        set_an_alarm,
        lower_limits,
        replace_streams,
        close_streams,
        close_files,
    ],
)
def test_the_next_task_finds_its_process_as_it_was(
    client: Client, spoil: Callable[[], None]
) -> None:
    before = client.submit(state).result(30)
    futures = [client.submit(spoil), client.submit(state), client.submit(spoil)]
    futures.append(client.submit(state))
    _, once, _, twice = client.gather(futures)
    assert once == before
    assert twice == before


def speak(text: str) -> None:
    print(text)
    os.write(1, b"below Python\n")


def test_what_is_printed_next_lands_in_nobodys_file(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    client.submit(redirect_files, str(path)).result(30)
    told = client.submit(speak, "aloud")
    told.result(30)
    assert told.logs() == "aloud\nbelow Python\n"
    assert path.read_bytes() == b""


def fork_and_return() -> int:
    return os.fork()


def test_a_fork_that_comes_back_twice_ends_once(client: Client) -> None:
    pids = [client.submit(fork_and_return, key=f"fork-{n}").result(30) for n in range(5)]
    assert 0 not in pids  # the children's answers
    assert client.gather(client.map(pow, range(200), [2] * 200)) == [n * n for n in range(200)]


def leak_all() -> int:
    try:
        while True:
            os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return os.getpid()


def count_files() -> tuple[int, int]:
    return os.getpid(), len(os.listdir("/proc/self/fd"))


def test_descriptors_that_run_out_end_the_slot_and_blame_nobody(client: Client) -> None:
    rows = [client.submit(leak_all), *client.map(pow, range(50), [2] * 50)]
    spoilt, *squares = client.gather(rows)
    assert squares == [n * n for n in range(50)]
    pid, n_open = client.submit(count_files).result(30)
    assert pid != spoilt and n_open < 100


def start_thread(path: str) -> None:
    """It never ends, and is not a daemon: an interpreter would wait for it on its way out."""

    def spin() -> None:
        while True:
            time.sleep(60)

    threading.Thread(target=spin).start()
    import atexit

    atexit.register(time.sleep, 3600)
    Path(path).write_text(str(os.getpid()))


def test_threads_and_exit_handlers_hold_up_no_end(
    tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    path = tmp_path / "pid"
    with LocalFabric(slots=1) as fabric, Client(fabric) as client:
        client.submit(start_thread, str(path)).result(30)
        assert client.submit(pow, 2, 5).result(30) == 32
        pid = int(path.read_text())
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"))


def set_up(directory: str) -> None:
    os.chdir(directory)
    os.environ["SET_UP"] = "1"


def where() -> tuple[str, str | None]:
    return os.getcwd(), os.environ.get("SET_UP")


def where_after_leaving(_: int) -> tuple[str, str | None]:
    found = where()
    move_away()
    return found


def test_what_an_initializer_sets_up_stays(client: Client, tmp_path: Path) -> None:
    with client.get_executor(initializer=set_up, initargs=(str(tmp_path),)) as executor:
        found = list(executor.map(where_after_leaving, range(5)))
    assert found == [(str(tmp_path), "1")] * 5


def multiply_within(limit: int) -> int:
    """A fork bomb in a room of its own: children have children until the limit refuses."""
    from subprocess import PIPE, run

    script = (
        "import os, resource, sys, time\n"
        "os.setgid(54321); os.setuid(54321)\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (int(sys.argv[1]), int(sys.argv[1])))\n"
        "n = 0\n"
        "while True:\n"
        "    try:\n"
        "        pid = os.fork()\n"
        "    except BlockingIOError:\n"
        "        break\n"
        "    n += bool(pid)\n"
        "time.sleep(3600)\n"
    )
    run([sys.executable, "-c", script, str(limit)], stdout=PIPE)
    return limit


def of_user(uid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == uid:
                    found.append(int(entry.name))
            except FileNotFoundError:
                continue
    return found


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="a user of its own for the bomb needs root")
def test_a_fork_bomb_ends_with_its_task(client: Client, wait_until: Callable[..., Any]) -> None:
    bomb = client.submit(multiply_within, 30)
    wait_until(lambda: len(of_user(54321)) >= 30, 30.0)
    bomb.cancel()
    wait_until(lambda: not of_user(54321), 30.0)
    assert client.submit(pow, 2, 5).result(30) == 32
