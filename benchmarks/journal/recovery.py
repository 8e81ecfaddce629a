"""How long it takes until all go on, after a broker was killed amid work and started again."""

from __future__ import annotations

import itertools
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from zfabric import Client

N_WORKERS = 4
N_CLIENTS = 3
N_ROWS = 200
TASK_S = 0.05
BY_THEMSELVES_S = 5.0
"""Seconds within which workers and clients are to be back."""


class Recovery(NamedTuple):
    """Seconds from the start of the next broker until it listened, all peers were back, the first
    new result was there, and all were. ran_twice: tasks that the audit file has more than once."""

    listens: float
    back: float
    first: float
    all: float
    ran_twice: int


def work(audit: str, name: str) -> str:
    """A task that leaves a line behind."""
    time.sleep(TASK_S)
    with open(audit, "a") as file:
        file.write(f"{name}\n")
    return name


class Fabric:
    """A broker with a journal, workers and clients."""

    def __init__(self, directory: Path) -> None:
        self.audit = str(directory / "audit")
        self._address = f"ipc://{directory}/broker"
        self._journal = f"{directory}/journal"
        self._broker = self._start_broker()
        self._workers = [self._start("worker", self._address, "-n", "1") for _ in range(N_WORKERS)]
        self._clients = [Client(self._address) for _ in range(N_CLIENTS)]
        self._clients[0].wait_for_workers(N_WORKERS, timeout=60)

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "zfabric", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def _start_broker(self) -> subprocess.Popen[str]:
        broker = self._start("broker", "--listen", self._address, "--journal", self._journal)
        assert broker.stdout is not None and "zfabric broker at" in broker.stdout.readline()
        return broker

    def restart(self) -> Recovery:
        """Kill the broker while some rows run, others have ended and most wait."""
        names = [[f"{c}.{n}" for n in range(N_ROWS // N_CLIENTS)] for c in range(N_CLIENTS)]
        ended: list[float] = []
        futures = []
        for client, own in zip(self._clients, names, strict=True):
            futures.append(client.map(work, itertools.repeat(self.audit, len(own)), own))
            for future in futures[-1]:
                future.add_done_callback(lambda _: ended.append(time.perf_counter()))
        while len(ended) < N_ROWS // 5:
            time.sleep(0.01)
        self._broker.send_signal(signal.SIGKILL)
        self._broker.wait()
        begun = time.perf_counter()
        self._broker = self._start_broker()
        listens = time.perf_counter()
        for client in self._clients:
            info = client.info()
        while len(info["workers"]) < N_WORKERS:
            info = self._clients[0].info()
        back = time.perf_counter()
        for client, own, wanted in zip(self._clients, futures, names, strict=True):
            if client.gather(own) != wanted:
                raise AssertionError("an answer was wrong")
        over = time.perf_counter()
        ran = Counter(Path(self.audit).read_text().split())
        lost = {name for own in names for name in own} - ran.keys()
        if lost:
            raise AssertionError(f"answers without an execution: {sorted(lost)[:5]}")
        Path(self.audit).unlink()
        first = min(at for at in ended if at > listens)
        moments = (listens - begun, back - begun, first - begun, over - begun)
        return Recovery(*moments, sum(n > 1 for n in ran.values()))

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for child in [self._broker, *self._workers]:
            child.terminate()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


def measure(directory: Path, rounds: int) -> bool:
    """Print the figures of some restarts. Returns whether the slowest was fast enough, and no task
    ran twice."""
    fabric = Fabric(directory)
    try:
        seen = [fabric.restart() for _ in range(rounds)]
    finally:
        fabric.close()
    print(
        f"broker killed amid {N_ROWS} tasks of {TASK_S} s, {N_WORKERS} workers, {N_CLIENTS}"
        f" clients, and started again at once; {rounds} times, median (longest):"
    )
    for text, column in zip(
        ("it listens after", "all are back after", "first new result after", "all results after"),
        list(zip(*seen, strict=True))[:4],
        strict=True,
    ):
        print(f"  {text:24}{statistics.median(column):6.2f} ({max(column):.2f}) s")
    n_twice = sum(one.ran_twice for one in seen)
    print(f"  tasks that ran twice    {n_twice:6}   (target: all back within {BY_THEMSELVES_S} s)")
    return n_twice == 0 and max(one.back for one in seen) <= BY_THEMSELVES_S
