"""Small graphs that are computed again and again become one row, where that is the faster way."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("dask")

import zfabric
from zfabric.client.collections.habits import KEPT, LIGHT_BYTES, Habits, shape_of
from zfabric.client.collections.scheduler import State


def together(habits: Habits, n_tasks: int = 10, n_slots: int = 4) -> bool:
    return habits.is_together("a shape", n_tasks, n_slots)


def test_the_faster_way_is_taken() -> None:
    habits = Habits()
    assert not together(habits)
    habits.note("a shape", False, 0.004, 100)
    assert together(habits)
    habits.note("a shape", True, 0.002, 100)
    assert together(habits)
    habits.note("a shape", True, 0.05, 100)
    assert together(habits), "one slow run may be the machine's"
    habits.note("a shape", True, 0.05, 100)
    assert not together(habits)


def test_a_shape_whose_tasks_became_long_is_spread_at_once() -> None:
    habits = Habits()
    habits.note("a shape", False, 0.004, 100)
    habits.note("a shape", True, 0.002, 100)
    habits.note("a shape", True, 3.0, 100)
    for _ in range(3):
        assert not together(habits)
        habits.note("a shape", False, 1.0, 100)
    # Small again: it is tried, and may not be tried in vain over and over.
    habits.note("a shape", False, 0.004, 100)
    assert not together(habits)
    habits.note("a shape", False, 0.004, 100)
    trials = 0
    for _ in range(1000):
        if together(habits):
            trials += 1
            habits.note("a shape", True, 3.0, 100)
        else:
            habits.note("a shape", False, 0.004, 100)
    assert 5 < trials < 25


def test_long_tasks_are_never_tried_as_one_row() -> None:
    habits = Habits()
    habits.note("a shape", False, 0.03, 0)
    assert not together(habits, n_tasks=10, n_slots=4)
    assert together(habits, n_tasks=2, n_slots=4)


def test_much_data_stays_spread() -> None:
    habits = Habits()
    habits.note("a shape", False, 0.001, LIGHT_BYTES + 1)
    assert not together(habits)
    assert not habits.gives_little("a shape")
    habits.note("a shape", False, 0.001, LIGHT_BYTES)
    assert together(habits)
    assert habits.gives_little("a shape")


def test_few_shapes_are_remembered() -> None:
    habits = Habits()
    for number in range(KEPT + 5):
        habits.note(number, False, 0.001, 0)
    assert not habits.is_together(4, 2, 2)
    assert habits.is_together(5, 2, 2)


def test_tokens_do_not_count_in_a_shape() -> None:
    first = [("add-0123456789abcdef0123456789abcdef", 0), "f-4f6e4b6c-2f3f-4c62-a3a5-7b1f2d0c9e11"]
    second = [("add-fedcba9876543210fedcba9876543210", 7), "f-c2d3a1b0-1111-4c62-a3a5-7b1f2d0c9e22"]
    assert shape_of(first, 1) == shape_of(second, 1)
    assert shape_of(first, 1) != shape_of(first, 2)
    assert shape_of(first, 1) != shape_of([*first, *second], 1)


def test_a_graph_that_is_known_to_be_quick_is_one_row(
    monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Any]
) -> None:
    noted: list[bool] = []
    note = Habits.note

    def quick(self: Habits, shape: Any, as_one: bool, seconds: float, nbytes: int) -> None:
        note(self, shape, as_one, 0.001, nbytes)  # however slow this machine is
        noted.append(as_one)

    monkeypatch.setattr(Habits, "note", quick)
    graph = {("a", n): (operator.add, n, 1) for n in range(5)} | {
        "total": (sum, [("a", n) for n in range(5)])
    }
    with zfabric.Client(slots=2) as client:
        for number, rows in enumerate([6, 1, 1]):
            before = client._submitter.n_submitted
            assert client.get(graph, "total") == 15
            assert client._submitter.n_submitted - before == rows
            wait_until(lambda n=number: len(noted) == n + 1)
        assert noted == [False, True, True]
        # What they give is known to be little, so a graph that waits for it may be one row too.
        state = client.get.state
        assert isinstance(state, State)
        held = state.hold(graph, ["total"], {})["total"]
        assert held.light and held.result() == 15
        del held  # or it would be used
        # One that fails says nothing of the time it took.
        with pytest.raises(ZeroDivisionError):
            client.get({"x": (operator.truediv, 1, 0), "y": (abs, "x")}, "y")
        assert client.get(graph, "total") == 15
        wait_until(lambda: len(noted) == 5)
