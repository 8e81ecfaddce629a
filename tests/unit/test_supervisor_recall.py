"""The worker's machine: rows that are taken back, dropped, or killed."""

from __future__ import annotations

import pytest

from tests.unit.supervisor_bench import FN, Bench, Stored
from zfabric.core.supervisor_effects import (
    AgeOfRow,
    KillRow,
    PeekSlot,
    SendRows,
    StartSlot,
    StopSlot,
    TakeBack,
)
from zfabric.core.supervisor_rows import STUCK_S
from zfabric.core.supervisor_slots import KILL_AGAIN_S
from zfabric.errors import InternalError
from zfabric.messages import (
    CANCELLED,
    LATE,
    LOCAL,
    OVERSIZE,
    STORED,
    VALUE,
    Run,
)


def test_rows_in_line_are_recalled_at_once() -> None:
    bench = Bench(1, started=False)
    bench.run(1, 2, 3, deps={3: [(2, LOCAL, 0)]})
    bench.machine.recall([2, 99])
    assert bench.said() == [("returned", 2, 3)]
    assert bench.machine.n_rows == 1


def test_a_row_is_given_back_once_though_it_is_recalled_with_what_it_waits_for() -> None:
    bench = Bench(1, started=False)
    bench.run(1, 2, deps={2: [(1, LOCAL, 0)]})
    bench.machine.recall([1, 2])
    assert bench.said() == [("returned", 1, 2)]
    assert bench.machine.is_idle()


def test_every_recall_is_answered() -> None:
    bench = Bench(1)
    bench.machine.recall([7])
    assert bench.said() == [("returned",)]
    bench.run(1)
    bench.sent()
    bench.machine.recall([1])
    assert bench.effects() == [TakeBack(1, 1)]
    bench.machine.taken_back(1, 0)
    assert bench.said() == [("returned",)]
    assert bench.said() == []


def test_rows_in_a_slot_are_recalled_if_they_have_not_begun() -> None:
    bench = Bench(1)
    bench.short_rows()
    bench.run(1, 2, 3, 4)
    bench.sent()
    bench.machine.recall([1, 3])
    assert bench.effects() == [TakeBack(1, 4)]
    bench.machine.taken_back(1, 2)
    assert bench.said() == [("returned", 3)]
    assert bench.effects() == [], "nothing is sent until the slot knows"
    bench.machine.slot_reset(1)
    assert bench.sent() == {1: [4]}
    bench.done(1, b"v1", b"v2", b"v4")
    assert bench.said()[0][1:] == tuple((i, 1, VALUE, b"v%d" % i) for i in (1, 2, 4))


@pytest.mark.parametrize("how", ["recall", "drop", "blocked"])
def test_nothing_is_sent_to_a_slot_while_it_is_asked_for_rows(how: str) -> None:
    """What is taken back are the last rows sent: a row sent in the same turn would be taken for
    one of those, and each result after it given to the row before."""
    bench = Bench(1)
    bench.short_rows()
    bench.run(1, 2, 3)
    bench.sent()
    if how == "blocked":
        bench.machine.slot_blocked(1)
    else:
        getattr(bench.machine, how)([2])
    bench.run(4)
    effects = [effect for effect in bench.effects() if not isinstance(effect, StartSlot)]
    assert effects == [TakeBack(1, 2)]
    bench.machine.taken_back(1, 2)
    assert not any(isinstance(effect, SendRows) for effect in bench.effects())
    bench.done(1, b"v1")
    if how == "blocked":
        bench.machine.slot_unblocked(1)
    bench.machine.slot_reset(1)
    assert bench.sent()[1] == ([2, 3, 4] if how == "blocked" else [3, 4])


def test_a_slot_that_reports_other_rows_than_it_was_sent_is_a_bug_and_stops_us() -> None:
    bench = Bench(1)
    bench.run(1)
    bench.sent()
    with pytest.raises(InternalError, match="reports other rows"):
        bench.machine.slot_done(1, bytes([VALUE]), [b"v2"], 0.0, bench.now, [2])


def test_a_dropped_row_that_had_begun_is_reported_without_its_value() -> None:
    bench = Bench(1)
    bench.run(1, 2, deps={2: [(1, LOCAL, 0)]})
    bench.sent()
    bench.machine.drop([1])
    assert bench.effects() == [TakeBack(1, 1)]
    bench.machine.taken_back(1, 0)
    assert bench.machine.n_rows == 0
    bench.done(1, (STORED, Stored()))
    assert bench.effects() == []
    assert bench.said() == [("done", (1, 1, CANCELLED, b"")), ("returned", 2)]


def test_a_dropped_row_that_had_not_begun_is_returned() -> None:
    bench = Bench(1)
    bench.run(1, 2)
    bench.sent()
    bench.machine.drop([2])
    assert bench.effects() == [TakeBack(1, 1)]
    bench.machine.taken_back(1, 1)
    bench.machine.slot_reset(1)
    bench.done(1, b"v1")
    assert bench.effects() == []
    assert bench.said() == [("done", (1, 1, VALUE, b"v1")), ("returned", 2)]
    assert not bench.machine.table.dropped


def test_a_dropped_row_that_runs_is_killed_and_its_neighbours_run_elsewhere() -> None:
    bench = Bench(1)
    bench.run(1, 2)
    assert bench.sent() == {1: [1, 2]}
    bench.machine.drop([1])
    assert bench.effects() == [TakeBack(1, 2)]
    bench.machine.taken_back(1, 1)
    (kill,) = bench.effects()
    assert kill == KillRow(1, 1, "it was cancelled")
    bench.machine.slot_reset(1)
    assert bench.effects() == []  # nothing is sent to a slot that is about to die
    assert bench.machine.wake_at(bench.now) == bench.now + KILL_AGAIN_S
    bench.machine.slot_died(1, "was killed by SIGKILL", True, bench.now)
    assert bench.said() == [("done", (1, 1, CANCELLED, b""))]
    assert bench.effects() == [StartSlot(2)]
    bench.machine.slot_started(2, bench.now)
    assert bench.sent() == {2: [2]}
    assert not bench.machine.table.dropped


def test_a_row_that_has_just_ended_saves_its_slot() -> None:
    bench = Bench(1)
    bench.run(1)
    bench.sent()
    bench.machine.drop([1])
    assert bench.effects() == [TakeBack(1, 1)]
    bench.machine.taken_back(1, 0)
    assert bench.effects() == [KillRow(1, 1, "it was cancelled")]
    bench.done(1, b"too late")
    bench.now += 1.0
    assert bench.effects() == []
    assert bench.said() == [("done", (1, 1, CANCELLED, b""))]
    bench.run(2)
    assert bench.sent() == {1: [2]}


def test_a_kill_that_came_too_early_is_asked_for_again() -> None:
    bench = Bench(1)
    bench.run(1)
    bench.sent()
    bench.machine.drop([1])
    bench.effects()
    bench.machine.taken_back(1, 0)
    assert bench.effects() == [KillRow(1, 1, "it was cancelled")]
    assert bench.effects() == []
    bench.now += KILL_AGAIN_S
    assert bench.effects() == [KillRow(1, 1, "it was cancelled")]


def test_a_thread_keeps_its_dropped_row() -> None:
    bench = Bench(1, can_kill=False)
    bench.run(1)
    bench.sent()
    bench.machine.drop([1])
    assert bench.effects() == [TakeBack(1, 1)]
    bench.machine.taken_back(1, 0)
    bench.run(2)
    assert bench.sent() == {1: [2]}  # behind it
    bench.done(1, b"v1")
    assert bench.said() == [("done", (1, 1, CANCELLED, b""))]


def test_a_row_that_runs_too_long_is_killed() -> None:
    bench = Bench(1)
    run = Run(bench.functions, [1, 2], [1, 1], [5, 5], [b"a", b"b"], (), [(0, 2.0)])
    bench.machine.run(run)
    assert bench.sent() == {1: [1, 2]}
    assert bench.machine.wake_at(bench.now) <= bench.now + 2.0
    bench.now += 2.0
    effects = bench.effects()
    assert AgeOfRow(1, 1) in effects
    bench.machine.row_age(1, 1, 1.5, bench.now)  # it did not begin at once
    bench.machine.slot_settled(1)
    assert bench.machine.wake_at(bench.now) == bench.now + 0.5
    bench.now += 0.5
    assert bench.effects() == [AgeOfRow(1, 1)]
    bench.machine.row_age(1, 1, 2.0, bench.now)
    assert bench.effects()[0] == TakeBack(1, 1)
    bench.machine.taken_back(1, 1)
    bench.machine.slot_died(1, "was killed by SIGKILL", True, bench.now)
    ((_, (id_, attempt, status, payload)),) = bench.said()
    assert (id_, attempt, status) == (1, 1, LATE)
    assert b"longer than its limit of 2 s; was killed" in payload


def test_a_slot_that_takes_too_much_is_killed_for_the_row_that_runs() -> None:
    bench = Bench(1)
    bench.run(1)
    bench.sent()
    bench.machine.slot_too_large(1, False, "too much", bench.now)  # whose it is is not known
    assert bench.effects() == []
    bench.machine.slot_too_large(1, True, "too much", bench.now)
    assert bench.effects() == [KillRow(1, 1, "too much")]
    bench.machine.slot_died(1, "was killed", True, bench.now)
    ((_, (_, _, status, payload)),) = bench.said()
    assert status == OVERSIZE and b"too much; was killed" in payload
    assert bench.effects() == [StartSlot(2)]
    bench.machine.slot_started(2, bench.now)
    bench.machine.slot_too_large(2, False, "too much", bench.now)
    assert bench.effects() == [StopSlot(2), StartSlot(3)]


def test_a_new_attempt_replaces_an_old_one() -> None:
    bench = Bench(1, started=False)
    bench.run(1)
    bench.run(1, attempt=2)
    bench.effects()
    bench.machine.slot_started(1, bench.now)
    assert bench.effects() == [SendRows(1, [FN], [(1, 2, 5, b"args")])]


def test_an_idle_slot_takes_rows_from_one_that_is_stuck() -> None:
    bench = Bench(2)
    bench.short_rows()
    bench.run(1, 2, 3, 4, 5, 6)
    first, second = bench.sent().items()
    bench.done(second[0], b"", b"", b"")
    assert bench.effects() == [], "10 us rows are not worth it"
    bench.now += STUCK_S * 1.01
    assert bench.effects() == [TakeBack(first[0], 2), PeekSlot(first[0])]
    bench.machine.taken_back(first[0], 2)
    assert bench.sent() == {second[0]: first[1][1:]}
    bench.machine.slot_settled(first[0])
    bench.now += 1
    assert bench.effects() == [PeekSlot(second[0])], "a slot with nothing to take is left alone"


def test_a_slot_that_is_quiet_is_peeked_until_nothing_can_be_hidden() -> None:
    bench = Bench(1)
    bench.run(1, 2)
    bench.sent()
    pause = STUCK_S
    for _ in range(3):
        wake = bench.machine.wake_at(bench.now)
        assert wake == pytest.approx(bench.now + pause)
        bench.now = wake
        assert bench.effects() == [PeekSlot(1)]
        pause *= 2
    bench.machine.slot_settled(1)
    assert bench.machine.wake_at(bench.now) is None
    bench.now += 10
    assert bench.effects() == []
    bench.done(1, b"v1")
    bench.run(3)
    bench.sent()
    assert bench.machine.wake_at(bench.now) == pytest.approx(bench.now + STUCK_S)
