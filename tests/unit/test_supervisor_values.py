"""The worker's machine: where the inputs of rows come from, and what follows them into a slot."""

from __future__ import annotations

import pytest

from tests.unit.supervisor_bench import FN, Bench, Stored
from zfabric.core.supervisor_effects import (
    SKIPPED,
    FetchValue,
    FreeValues,
    KeepValue,
    SendRows,
    TakeBack,
)
from zfabric.messages import (
    CANCELLED,
    ERROR,
    INLINE,
    LOCAL,
    REMOTE,
    STORED,
    Holds,
    Missing,
)

# --- dependencies -----------------------------------------------------------------------------


def test_inline_values_ride_along() -> None:
    bench = Bench()
    bench.run(1, deps={1: [(77, INLINE, b"v77")]})
    assert bench.effects() == [SendRows(1, [FN], [[1, 1, 5, b"args", [b"v77"], False]])]


def test_a_local_value_is_waited_for() -> None:
    bench = Bench(1)
    bench.run(1, 2, deps={2: [(1, LOCAL, 0)]})
    assert bench.sent() == {1: [1]}
    bench.done(1, b"v1")
    assert bench.effects() == [SendRows(1, [], [[2, 1, 5, b"args", [b"v1"], False]])]


def test_an_inline_value_made_here_is_kept_until_its_done_is_acked() -> None:
    bench = Bench(1)
    bench.run(1)
    bench.sent()
    bench.done(1, b"v1")
    bench.said()
    bench.run(2, deps={2: [(1, LOCAL, 0)]})
    assert bench.effects()[0].rows == [[2, 1, 5, b"args", [b"v1"], False]]
    bench.machine.acked(bench.seq)
    bench.run(3, deps={3: [(1, LOCAL, 0)]})
    assert bench.effects() == [], "it would be a value that ended without one"
    assert bench.machine.n_rows == 1


def test_a_stored_value_stays_until_it_is_freed() -> None:
    bench = Bench(1)
    bench.run(1, 2, deps={2: [(1, LOCAL, 0)]})
    bench.sent()
    value = Stored()
    bench.done(1, (STORED, value))
    assert bench.effects() == [
        KeepValue(1, value),
        SendRows(1, [], [[2, 1, 5, b"args", [(1,)], False]]),
    ]
    assert bench.said() == [("done", (1, 1, STORED, (5000).to_bytes(8, "little")))]
    bench.machine.acked(bench.seq)
    bench.run(3, deps={3: [(1, LOCAL, 5000)]})
    bench.done(1, b"v2")
    assert bench.effects()[0].rows == [[3, 1, 5, b"args", [(1,)], False]]
    bench.machine.free([1, 55])
    assert bench.effects() == [FreeValues([1])]


def test_a_remote_value_is_fetched_once_for_all() -> None:
    bench = Bench(1)
    remote = (9, REMOTE, [100, [[3, "ipc://w3"]]])
    bench.run(1, 2, deps={1: [remote], 2: [remote]})
    assert bench.effects() == [FetchValue(9, 100, [(3, "ipc://w3")])]
    bench.machine.value_fetched(9, 100)
    assert bench.sent() == {1: [1, 2]}
    assert bench.said() == [Holds([9])]


def test_rows_are_given_back_when_a_fetch_fails() -> None:
    bench = Bench(1)
    bench.run(1, 2, deps={1: [(9, REMOTE, [100, []])], 2: [(1, LOCAL, 0)]})
    bench.effects()
    bench.machine.fetch_failed(9)
    assert bench.said() == [Missing([9]), ("returned", 1, 2)]
    assert bench.machine.is_idle()


def test_a_value_that_nobody_waits_for_any_more_is_not_kept() -> None:
    bench = Bench(1)
    bench.run(1, deps={1: [(9, REMOTE, [100, []])]})
    bench.effects()
    bench.machine.drop([1])
    bench.machine.value_fetched(9, 100)
    assert bench.effects() == [FreeValues([9])]
    assert bench.said() == [("returned", 1)]


@pytest.mark.parametrize("status", [ERROR, CANCELLED])
def test_rows_that_wait_for_a_failure_are_given_back(status: int) -> None:
    bench = Bench(1)
    bench.run(1, 2, 3, deps={2: [(1, LOCAL, 0)], 3: [(2, LOCAL, 0)]})
    bench.sent()
    bench.done(1, (status, b""))
    assert bench.effects() == []
    assert bench.said() == [("done", (1, 1, status, b"")), ("returned", 2, 3)]
    assert bench.machine.is_idle()
    bench.run(4, deps={4: [(1, LOCAL, 0)]})
    assert bench.effects() == [] and bench.machine.n_rows == 0
    assert bench.said() == [("returned", 4)]


def test_ready_successors_go_before_later_rows() -> None:
    bench = Bench(1)
    bench.run(1, 2, 3, 4, deps={2: [(1, LOCAL, 0)]})
    assert bench.sent() == {1: [1, 3]}
    bench.done(1, b"v1")
    assert bench.sent() == {1: [2]}


# --- followers --------------------------------------------------------------------------------


def test_a_chain_of_short_rows_follows_into_the_slot() -> None:
    bench = Bench(2)
    bench.short_rows()
    bench.run(1, 2, 3, deps={2: [(1, LOCAL, 0)], 3: [(7, INLINE, b"v7"), (2, LOCAL, 0)]})
    (effect,) = bench.effects()
    assert effect.rows == [
        [1, 1, 5, b"args", (), True],
        [2, 1, 5, b"args", [1], True],
        [3, 1, 5, b"args", [b"v7", 2], False],
    ]
    bench.done(effect.slot, b"v1", b"v2", b"v3")
    assert len(bench.said()[0]) == 4
    assert bench.machine.is_idle()


def test_a_chain_longer_than_the_slot_goes_on_following() -> None:
    bench = Bench(1)
    bench.short_rows()
    n = 2000
    bench.run(*range(1, n + 1), deps={i: [(i - 1, LOCAL, 0)] for i in range(2, n + 1)})
    seen: list[int] = []
    rounds = 0
    while bench.machine.n_rows:
        rounds += 1
        for rows in bench.sent().values():
            seen += rows
        bench.done(1, *[b"v"] * min(100, len(seen) - 100 * (rounds - 1)), busy_s=1e-3)
    assert seen == list(range(1, n + 1))
    assert rounds == n // 100


def test_followers_of_a_failure_are_given_back_once() -> None:
    bench = Bench(1)
    bench.short_rows()
    bench.run(1, 2, 3, deps={2: [(1, LOCAL, 0)], 3: [(2, LOCAL, 0)]})
    assert bench.sent() == {1: [1, 2, 3]}
    bench.done(1, (ERROR, b"!"), (SKIPPED, b""), (SKIPPED, b""))
    assert bench.said() == [("done", (1, 1, ERROR, b"!")), ("returned", 2, 3)]
    assert bench.machine.is_idle() and bench.effects() == []


def test_a_follower_of_a_stored_value_runs_when_it_was_skipped() -> None:
    bench = Bench(1)
    bench.short_rows()
    bench.run(1, 2, deps={2: [(1, LOCAL, 0)]})
    bench.sent()
    value = Stored()
    bench.done(1, (STORED, value), (SKIPPED, b""))
    assert bench.effects() == [
        KeepValue(1, value),
        SendRows(1, [], [[2, 1, 5, b"args", [(1,)], False]]),
    ]


def test_followers_that_are_taken_back_wait_again() -> None:
    bench = Bench(2)
    bench.short_rows()
    bench.run(1, 2, 3, deps={2: [(1, LOCAL, 0)], 3: [(2, LOCAL, 0)]})
    (slot,) = bench.sent()
    bench.machine.recall([2])
    assert bench.effects() == [TakeBack(slot, 2)]
    bench.machine.taken_back(slot, 2)
    assert bench.said() == [("returned", 2, 3)], "row 3 goes with row 2"
    assert bench.machine.n_rows == 1
    bench.done(slot, b"v1")
    assert bench.effects() == []


def test_several_waiters_do_not_follow_but_spread() -> None:
    bench = Bench(2)
    bench.short_rows()
    bench.run(1, 2, 3, deps={2: [(1, LOCAL, 0)], 3: [(1, LOCAL, 0)]})
    (slot,) = bench.sent()
    bench.done(slot, b"v1")
    assert sorted(bench.sent()) == [1, 2]
