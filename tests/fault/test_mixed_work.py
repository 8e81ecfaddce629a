"""Mixed work while slots die, workers are killed and stopped: nothing lost, nothing wrong, nothing
kept. `make faults` runs it for a minute per seed, the usual tests for a few seconds."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import zfabric
from tests.fault.mixed_work import User, is_empty
from zfabric.launch.local import LocalFabric

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("leaves_nothing")]

SECONDS = float(os.environ.get("FAULT_SECONDS", "8"))


class Saboteur(threading.Thread):
    """Kills a worker now and then, or stops it for a second; a killed one is replaced."""

    def __init__(self, fabric: LocalFabric, seed: int, until: float) -> None:
        super().__init__(name="saboteur", daemon=True)
        self.n_killed = self.n_stopped = 0
        self._fabric = fabric
        self._rng = random.Random(seed)
        self._until = until
        self._pause = threading.Event()

    def run(self) -> None:
        while time.monotonic() < self._until:
            self._pause.wait(self._rng.uniform(0.5, 2.0))
            workers = [p for p in self._fabric._processes[1:] if p.poll() is None]
            victim = self._rng.choice(workers)
            if self._rng.random() < 0.7:
                victim.send_signal(signal.SIGKILL)
                self._fabric.add_worker()
                self.n_killed += 1
            else:
                victim.send_signal(signal.SIGSTOP)
                self._pause.wait(1.0)
                victim.send_signal(signal.SIGCONT)
                self.n_stopped += 1


@pytest.fixture
def fabric() -> Iterator[LocalFabric]:
    with LocalFabric(n_workers=3, slots=2) as fabric:
        yield fabric


@pytest.mark.timeout(SECONDS + 150)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("sabotage", [False, True], ids=["calm", "sabotage"])
def test_mixed_work_comes_out_right_and_leaves_nothing(
    fabric: LocalFabric, seed: int, sabotage: bool, wait_until: Callable[..., Any]
) -> None:
    with zfabric.Client(fabric.address) as one, zfabric.Client(fabric.address) as two:
        one.wait_for_workers(3, timeout=30)
        until = time.monotonic() + SECONDS
        users = [User(client, 10 * seed + n, until) for n, client in enumerate((one, one, two))]
        threads: list[threading.Thread] = list(users)
        if sabotage:
            threads.append(Saboteur(fabric, seed, until - 2))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for user in users:
            if user.error is not None:
                raise user.error
        assert sum(sum(user.done.values()) for user in users) > 5
        wait_until(lambda: is_empty(one.info()), 20, "tables and stores empty")


@pytest.mark.timeout(SECONDS + 150)
def test_mixed_work_on_an_embedded_fabric(wait_until: Callable[..., Any]) -> None:
    with zfabric.Client(slots=2) as client:
        until = time.monotonic() + SECONDS
        users = [User(client, seed, until) for seed in (5, 6)]
        for user in users:
            user.start()
        for user in users:
            user.join()
        for user in users:
            if user.error is not None:
                raise user.error
        wait_until(lambda: is_empty(client.info()), 20, "tables and stores empty")
