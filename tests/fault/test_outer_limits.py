"""Limits that come from outside: a kernel that kills for memory, a wall clock that jumps, a peer of
another version. Rows 6, 37 and 39 of the matrix; and a sum over ten thousand inputs, row 27."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import zfabric
from benchmarks.sampler.cells import ready, start
from zfabric.wire import PROTOCOL

pytestmark = pytest.mark.fault

ZF = [sys.executable, "-m", "zfabric"]
LISTEN = ["--listen", "tcp://127.0.0.1:0", "--insecure"]
CGROUP = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def hoard(nbytes: int) -> int:
    return len(bytearray(os.urandom(1) * nbytes))


@pytest.mark.root
@pytest.mark.skipif(
    os.geteuid() != 0 or not (CGROUP / "memory.limit_in_bytes").exists(),
    reason="needs root and memory cgroups of version 1",
)
def test_row_6_the_kernel_kills_a_task_for_memory(
    stack: ExitStack, wait_until: Callable[..., Any]
) -> None:
    """Supervisor and slots have 300 MB together: the slot dies, and the error says of what."""
    group = CGROUP / f"zfabric-test-{os.getpid()}"
    group.mkdir()

    def remove() -> None:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()

    stack.callback(remove)
    (group / "memory.limit_in_bytes").write_text(str(300_000_000))
    address = ready(start(stack, [*ZF, "broker", *LISTEN], {}))
    enter = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
    worker = start(stack, [*enter, *ZF, "worker", address, "-n", "2"], {})
    with zfabric.Client(address) as client:
        client.wait_for_workers(1, timeout=60)
        beside = client.map(pow, range(50), [2] * 50)
        with pytest.raises(zfabric.KilledTask, match="SIGKILL.*out of memory"):
            client.submit(hoard, 1_000_000_000).result(60)
        assert client.gather(beside) == [n * n for n in range(50)]
        assert client.submit(pow, 2, 5).result(60) == 32
    assert worker.poll() is None


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>

/* A day later once the file exists that CLOCK_GATE names. */
static long shift(void) {
    struct stat found;
    const char *gate = getenv("CLOCK_GATE");
    return gate && stat(gate, &found) == 0 ? atol(getenv("CLOCK_SHIFT")) : 0;
}

int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int done = real(id, at);
    if (id == CLOCK_REALTIME) at->tv_sec += shift();
    return done;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="a clock that jumps needs a C compiler")
@pytest.mark.parametrize("shift_s", [86_400, -86_400])
def test_row_37_the_wall_clock_jumps(shift_s: int, stack: ExitStack, tmp_path: Path) -> None:
    """By a day, for broker, worker and task: nobody is given up, and no lease or limit ends."""
    source, shim, gate = tmp_path / "shim.c", tmp_path / "shim.so", tmp_path / "gate"
    source.write_text(SHIM)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    environ = {"LD_PRELOAD": str(shim), "CLOCK_GATE": str(gate), "CLOCK_SHIFT": str(shift_s)}
    address = ready(start(stack, [*ZF, "broker", *LISTEN], environ))
    start(stack, [*ZF, "worker", address, "-n", "1"], environ)
    with zfabric.Client(address) as client:
        client.wait_for_workers(1, timeout=60)
        pid = client.submit(os.getppid, timeout=60).result(60)
        running = client.submit(jump, str(gate), timeout=60)
        assert abs(running.result(60) - shift_s) < 3600
        assert client.submit(os.getppid, timeout=60).result(60) == pid
        assert client.info()["clients"] == 1


def jump(gate: str) -> float:
    """Seconds by which the wall clock moved, as a task sees it."""
    before = time.time()
    Path(gate).touch()
    return time.time() - before


def test_row_39_a_worker_of_the_next_version(stack: ExitStack, tmp_path: Path) -> None:
    """It is told so, and ends."""
    address = ready(start(stack, [*ZF, "broker", *LISTEN], {}))
    package = Path(zfabric.__file__).parent
    shutil.copytree(package, tmp_path / "zfabric", ignore=shutil.ignore_patterns("__pycache__"))
    header = tmp_path / "zfabric" / "wire" / "header.py"
    text = header.read_text()
    assert f"\nPROTOCOL = {PROTOCOL}\n" in text
    later = text.replace(f"\nPROTOCOL = {PROTOCOL}\n", f"\nPROTOCOL = {PROTOCOL + 1}\n")
    header.write_text(later)
    ended = subprocess.run(
        [*ZF, "worker", address, "-n", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1, ended.stderr
    assert "protocol" in ended.stderr and "Traceback" not in ended.stderr


def total(*numbers: int) -> int:
    return sum(numbers)


def test_row_27_ten_thousand_inputs_of_one_task() -> None:
    with zfabric.LocalFabric(slots=2) as fabric, zfabric.Client(fabric) as client:
        inputs = client.map(pow, range(10_000), [2] * 10_000)
        assert client.submit(total, *inputs).result(60) == sum(n * n for n in range(10_000))
