"""What counts as a stall, what does not, and that it is said once."""

from __future__ import annotations

import json

import pytest

from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core.dump import picture
from zfabric.core.watchdog import Watchdog
from zfabric.testing.bench import Bench, tid

SETTINGS = Settings(stall_s=60.0)


class Yard:
    """A bench with a dog, and a clock between two looks."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.bench.client(1)
        self.dog = Watchdog(SETTINGS, 0.0)
        self.now = 0.0

    def after(self, seconds: float, asleep_s: float = 0.0) -> str:
        self.now += seconds
        return self.dog.look(self.bench.scheduler, self.now, asleep_s)

    def load(self, held: int, running: int) -> None:
        worker = self.bench.scheduler.workers[101]
        worker.load = (held, running, 1, 0, 0, 0)
        worker.n_beats += 1


@pytest.fixture
def yard() -> Yard:
    yard = Yard()
    assert yard.after(1.0) == ""
    return yard


def test_an_idle_fabric_is_no_stall(yard: Yard) -> None:
    yard.bench.worker(101)
    assert yard.after(1000.0) == ""
    assert yard.after(1000.0) == ""


def test_a_long_task_is_no_stall(yard: Yard) -> None:
    yard.bench.worker(101)
    yard.bench.submit(1)
    for _ in range(10):
        yard.load(1, 1)
        assert yard.after(59.0) == ""
    assert yard.after(1.0) == ""
    assert yard.after(59.0) != "", "its last word is old"


def test_work_without_workers_is_no_stall(yard: Yard) -> None:
    yard.bench.submit(1)
    yard.after(1.0)
    assert yard.after(1000.0) == ""


def test_rows_that_are_held_but_never_run_are_a_stall_said_once(yard: Yard) -> None:
    yard.bench.worker(101)
    yard.bench.submit(1)
    yard.load(1, 0)
    yard.after(1.0)
    assert yard.after(59.0) == ""
    assert "1 tasks are unfinished" in yard.after(1.0)
    assert yard.after(60.0) == ""
    assert yard.dog.stalled_s(yard.now) == 120.0
    yard.bench.ended(1)
    assert yard.after(1.0) == ""
    assert yard.dog.stalled_s(yard.now) == 0.0


def test_our_own_sleep_does_not_count(yard: Yard) -> None:
    yard.bench.worker(101)
    yard.bench.submit(1)
    yard.load(1, 0)
    yard.after(1.0)
    assert yard.after(600.0, asleep_s=600.0) == ""
    assert yard.after(59.0) == ""
    assert yard.after(1.0) != ""


def test_what_no_worker_can_run_is_no_stall(yard: Yard) -> None:
    """That has warnings of its own."""
    yard.bench.worker(101)
    options = m.TaskOptions(resources={"TPU": 1.0}, must_fit=False)
    yard.bench.submit(1, options={1: options})
    yard.bench.submit(2, deps={2: [1]})
    yard.load(0, 0)
    yard.after(1.0)
    assert yard.after(120.0) == ""
    yard.bench.submit(3)
    yard.after(1.0)
    assert "1 tasks are unfinished" in yard.after(61.0)


def test_rows_that_a_worker_says_it_does_not_hold(yard: Yard) -> None:
    yard.bench.worker(101, credit=1)
    yard.bench.submit(1)
    yard.load(0, 0)
    assert yard.after(1.0) == ""
    assert "none runs" in yard.after(60.0), "silent for so long: its old beats say nothing"
    yard.bench.scheduler.workers[101].n_beats += 2
    assert "thought to hold 1 rows" in yard.after(1.0)
    assert yard.after(1.0) == ""


def test_a_picture_says_why_and_is_plain(yard: Yard) -> None:
    yard.bench.worker(101, credit=1)
    yard.bench.submit(1, 2)
    yard.bench.submit(3, deps={3: [2]}, options={3: m.TaskOptions(key="third")})
    state = json.loads(json.dumps(picture(yard.bench.scheduler, lambda _: 0.0)))
    assert state["unfinished"] == 3
    assert state["rows"] == {"worker-101": [f"{tid(1):x}"]}
    keys = [task["key"] for task in state["unfinished_tasks"]]
    assert keys[2] == "third"
    assert all(task["reasons"] for task in state["unfinished_tasks"])
