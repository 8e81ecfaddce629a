"""The worker's machine: one event, the exact effects and messages, and nothing left over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
import pytest

from zfabric.config import Settings
from zfabric.core.supervisor import CREDIT_S, Supervisor
from zfabric.core.supervisor_effects import (
    SKIPPED,
    AgeOfRow,
    FetchValue,
    ForgetFunctions,
    FreeValues,
    KeepValue,
    KillRow,
    PeekSlot,
    SendRows,
    StartSlot,
    StopSlot,
    TakeBack,
)
from zfabric.core.supervisor_rows import STUCK_S
from zfabric.core.supervisor_slots import KILL_AGAIN_S
from zfabric.errors import InternalError, RemoteProtocolError
from zfabric.messages import (
    CANCELLED,
    DIED,
    ERROR,
    INLINE,
    LATE,
    LOCAL,
    OVERSIZE,
    REMOTE,
    STORED,
    VALUE,
    Done,
    Give,
    Holds,
    Missing,
    Returned,
    Run,
)

FN = (5, "f", b"blob of f")


class Stored:
    """Stands for a value in the store."""

    nbytes = 5000


class Bench:
    """A machine with a clock, whose slots and store are this test."""

    def __init__(
        self, n_slots: int = 1, *, started: bool = True, can_kill: bool = True, **settings: Any
    ) -> None:
        self.now = 100.0
        self.machine = Supervisor(
            n_slots, settings=Settings(**settings), now=self.now, can_kill=can_kill
        )
        self.functions = [FN]
        self.seq = 0
        if started:
            for effect in self.effects():
                assert isinstance(effect, StartSlot)
                self.machine.slot_started(effect.slot, self.now)

    def run(
        self, *ids: int, deps: dict[int, Sequence[Any]] | None = None, attempt: int = 1
    ) -> None:
        """Rows; deps: by id."""
        sparse = [(ids.index(id_), d) for id_, d in (deps or {}).items()]
        self.machine.run(
            Run(
                self.functions,
                ids,
                [attempt] * len(ids),
                [FN[0]] * len(ids),
                [b"args"] * len(ids),
                sparse,
            )
        )
        self.functions = []

    def effects(self) -> list[Any]:
        """All effects until there are none; a TakeBack must be answered by the test."""
        return self.machine.effects(self.now)

    def sent(self) -> dict[int, list[int]]:
        """Ids sent to each slot, when that is all there is to do."""
        out: dict[int, list[int]] = {}
        for effect in self.effects():
            assert isinstance(effect, SendRows), effect
            out.setdefault(effect.slot, []).extend(row[0] for row in effect.rows)
        return out

    def done(self, slot: int, *outcomes: Any, busy_s: float = 0.0) -> None:
        """Rows ended; each outcome is (status, payload), or a payload for VALUE."""
        pairs = [o if isinstance(o, tuple) else (VALUE, o) for o in outcomes]
        self.machine.slot_done(
            slot, bytes(s for s, _ in pairs), [p for _, p in pairs], busy_s, self.now
        )

    def said(self) -> list[Any]:
        """Messages without their credit, which has tests of its own."""
        out: list[Any] = []
        for message in self.machine.messages(self.now):
            if isinstance(message, Done):
                self.seq += 1
                self.machine.done_posted(message, self.seq)
                rows = zip(message.ids, message.attempts, message.statuses, message.payloads)
                out.append(("done", *rows))
            elif isinstance(message, Returned):
                out.append(("returned", *message.ids))
            else:
                out.append(message)
        return out

    def short_rows(self) -> None:
        """Let the machine believe that rows take 10 us."""
        self.run(900, 901)
        ids = self.sent()
        for slot, rows in ids.items():
            self.done(slot, *[b"x"] * len(rows), busy_s=1e-5 * len(rows))
        while any(self.sent().values()):
            raise AssertionError("rows left")
        self.said()
        self.machine.acked(self.seq)


def test_slots_are_started_at_once() -> None:
    bench = Bench(3, started=False)
    assert bench.effects() == [StartSlot(1), StartSlot(2), StartSlot(3)]
    assert bench.effects() == []
    assert bench.said() == []


def test_rows_wait_for_a_slot_and_go_in_order_with_their_function_once() -> None:
    bench = Bench(1, started=False)
    bench.run(1, 2)
    assert bench.effects() == [StartSlot(1)]
    bench.machine.slot_started(1, bench.now)
    assert bench.effects() == [SendRows(1, [FN], [(1, 1, 5, b"args"), (2, 1, 5, b"args")])]
    bench.done(1, b"one")
    assert bench.said() == [("done", (1, 1, VALUE, b"one"))]
    bench.run(3)
    assert bench.effects() == [SendRows(1, [], [(3, 1, 5, b"args")])]
    bench.done(1, b"two", (ERROR, b"trouble"))
    assert bench.said() == [("done", (2, 1, VALUE, b"two"), (3, 1, ERROR, b"trouble"))]
    assert bench.machine.is_idle()


def test_rows_are_shared_out_among_slots() -> None:
    bench = Bench(2)
    bench.run(1, 2, 3, 4)
    assert bench.sent() == {1: [1, 2], 2: [3, 4]}


def test_a_function_that_was_never_sent_is_the_brokers_fault() -> None:
    bench = Bench()
    bench.functions = []
    with pytest.raises(RemoteProtocolError):
        bench.run(1)


def test_a_slot_that_reports_too_much_is_a_bug() -> None:
    bench = Bench()
    with pytest.raises(InternalError):
        bench.done(1, b"?")


def test_short_rows_go_in_deep_long_ones_one_by_one() -> None:
    bench = Bench(1)
    bench.short_rows()
    bench.run(*range(1, 301))
    assert len(bench.sent()[1]) == 300
    bench.done(1, *[b"x"] * 300, busy_s=300 * 0.2)
    bench.said()
    bench.run(*range(301, 311))
    assert bench.sent() == {1: [301]}


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


# --- taking back ------------------------------------------------------------------------------


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


# --- deaths -----------------------------------------------------------------------------------


def test_only_the_running_row_is_blamed_for_a_death() -> None:
    bench = Bench(1)
    bench.short_rows()
    bench.run(1, 2, 3, 4, deps={4: [(1, LOCAL, 0)]})
    bench.sent()
    bench.machine.slot_died(1, "SIGSEGV", True, bench.now)
    (_, died), returned = bench.said()
    assert returned == ("returned", 4)
    assert died[:3] == (1, 1, DIED) and msgpack.unpackb(died[3]) == ["SIGSEGV"]
    assert bench.effects() == [StartSlot(2)]
    bench.machine.slot_started(2, bench.now)
    assert bench.effects() == [
        SendRows(2, [FN], [(2, 1, 5, b"args"), (3, 1, 5, b"args")]),
    ]


def test_a_slot_that_dies_between_rows_takes_nobody_along() -> None:
    bench = Bench(1)
    bench.run(1, 2)
    bench.sent()
    bench.machine.slot_died(1, "SIGKILL", False, bench.now)
    assert bench.said() == []
    assert bench.machine.n_rows == 2


def test_slots_that_cannot_start_are_given_up() -> None:
    bench = Bench(1, started=False)
    for number in (1, 2, 3):
        assert bench.effects() == [StartSlot(number)]
        assert not bench.machine.failure
        bench.machine.slot_died(number, "no module named zfabric", False, bench.now)
        assert bench.effects() == [], "not at once again"
        wake = bench.machine.wake_at(bench.now)
        assert wake is not None and wake > bench.now
        bench.now = wake
    assert "no module named zfabric" in bench.machine.failure
    assert bench.effects() == []


# --- blocked ----------------------------------------------------------------------------------


def test_a_blocked_slot_is_replaced_and_its_rows_come_back() -> None:
    bench = Bench(1)
    bench.run(1, 2)
    bench.sent()
    bench.machine.slot_blocked(1)
    assert bench.effects() == [TakeBack(1, 1), StartSlot(2)]
    bench.machine.taken_back(1, 1)
    bench.machine.slot_started(2, bench.now)
    assert bench.sent() == {2: [2]}
    bench.done(2, b"v2")
    bench.machine.slot_unblocked(1)
    bench.machine.slot_reset(1)
    bench.done(1, b"v1")
    bench.run(3)
    assert bench.sent() == {1: [3]}, "the spare one is parked"
    bench.machine.slot_blocked(1)
    assert bench.effects() == [], "and there at once when it is needed again"
    bench.run(4)
    assert bench.sent() == {2: [4]}


def test_credit_counts_blocked_rows_on_top_and_is_told_at_once() -> None:
    bench = Bench(1)
    bench.run(1, 2)
    bench.sent()
    assert bench.machine.messages(bench.now) == []
    bench.machine.slot_blocked(1)
    assert bench.machine.messages(bench.now) == [Done([], [], b"", [], 3)]
    bench.machine.slot_unblocked(1)
    assert bench.machine.messages(bench.now) == [Done([], [], b"", [], 2)]


def test_spare_slots_do_not_pile_up() -> None:
    bench = Bench(1)
    for number in range(1, 13):
        bench.run(number)
        assert bench.sent() == {number: [number]}
        bench.machine.slot_blocked(number)
        assert bench.effects() == [StartSlot(number + 1)]
        bench.machine.slot_started(number + 1, bench.now)
    for number in range(1, 13):
        bench.machine.slot_unblocked(number)
        bench.done(number, b"")
    stopped = bench.effects()
    assert [type(effect) for effect in stopped] == [StopSlot] * 4
    assert bench.machine.n_slots == 9


# --- credit -----------------------------------------------------------------------------------


def test_credit_follows_the_duration_of_rows() -> None:
    bench = Bench(2, lookahead_s=0.02, max_rows=1000)
    assert bench.machine.credit(bench.now) == 4
    bench.short_rows()
    assert bench.machine.credit(bench.now) == 1000
    bench.run(1)
    (slot,) = bench.sent()
    bench.done(slot, b"", busy_s=10.0)
    assert bench.machine.credit(bench.now) == 2


def test_credit_shrinks_while_long_rows_run_and_that_is_told() -> None:
    bench = Bench(1)
    bench.short_rows()
    bench.run(1)
    bench.sent()
    bench.now += 1.0
    ((message),) = bench.machine.messages(bench.now)
    assert message == Done([], [], b"", [], 2)
    bench.now += CREDIT_S
    assert bench.machine.messages(bench.now) == []


def test_a_done_is_split_before_it_outgrows_a_frame() -> None:
    bench = Bench(1, batch_bytes=10_000, batch_rows=50, inline_limit=4096)
    bench.short_rows()
    bench.run(*range(1, 101))
    bench.sent()
    bench.done(1, *[b"x" * 1000] * 30, *[b"y"] * 70)
    messages = bench.machine.messages(bench.now)
    assert [len(m.ids) for m in messages] == [10, 10, 10, 50, 20]  # type: ignore[union-attr]
    assert [i for m in messages for i in m.ids] == list(range(1, 101))  # type: ignore[union-attr]


def test_forgotten_functions_are_sent_again() -> None:
    bench = Bench(1)
    bench.run(1)
    bench.sent()
    bench.done(1, b"")
    bench.machine.forget([5, 6])
    assert bench.effects() == [ForgetFunctions(1, [5])]
    bench.functions = [FN]
    bench.run(2)
    assert bench.effects() == [SendRows(1, [FN], [(2, 1, 5, b"args")])]


def test_a_function_is_kept_as_long_as_a_row_calls_it() -> None:
    bench = Bench(1)
    bench.run(1, 2, deps={2: [(1, LOCAL, 0)]})
    bench.sent()
    bench.machine.forget([FN[0]])
    assert bench.effects() == []
    bench.done(1, b"v1")
    bench.said()
    assert bench.sent() == {1: [2]}
    bench.done(1, b"v2")
    bench.said()
    assert bench.effects() == [ForgetFunctions(1, [FN[0]])]
    with pytest.raises(RemoteProtocolError):
        bench.run(3)


def test_functions_forgotten_one_after_the_other_all_go_once_their_rows_have_ended() -> None:
    bench = Bench(2)
    other = (6, "g", b"blob")
    bench.functions = [FN, other]
    bench.run(1, 2)
    bench.sent()
    bench.machine.forget([FN[0]])
    bench.machine.forget([other[0]])
    bench.done(1, b"v1")
    bench.done(2, b"v2")
    bench.said()
    with pytest.raises(RemoteProtocolError):
        bench.run(3)


def test_a_recall_does_not_outlive_the_row_that_was_dropped() -> None:
    bench = Bench(1)
    bench.short_rows()
    bench.run(1, 2)
    bench.sent()
    bench.machine.recall([2])
    bench.machine.drop([2])
    bench.effects()
    bench.machine.taken_back(1, 1)
    bench.machine.slot_reset(1)
    assert not bench.machine.table.recalled


def test_a_function_that_comes_again_is_not_forgotten_any_more() -> None:
    bench = Bench(1)
    bench.run(1)
    bench.sent()
    bench.machine.forget([FN[0]])
    bench.functions = [FN]
    bench.run(2)
    bench.sent()
    bench.done(1, b"v1")
    bench.said()
    bench.sent()
    bench.done(1, b"v2")
    bench.said()
    bench.run(3)
    assert bench.sent() == {1: [3]}


def test_given_values_are_there_until_they_are_freed() -> None:
    bench = Bench(1)
    bench.machine.give(Give([8, 9], [b"eight", b"nine"]))
    for id_ in (1, 2):
        bench.run(id_, deps={id_: [(8, LOCAL, 5), (9, LOCAL, 4)]})
        (effect,) = bench.effects()
        assert effect.rows[0][4] == [b"eight", b"nine"]
        bench.done(1, b"value")
        bench.said()
    bench.machine.free([8])
    assert bench.effects() == []
    bench.run(3, deps={3: [(8, LOCAL, 5)]})
    assert bench.said() == [("returned", 3)]


def test_a_fetched_value_that_a_row_made_meanwhile_stays() -> None:
    bench = Bench(1)
    bench.run(1, deps={1: [(9, REMOTE, [100, []])]})
    bench.effects()
    bench.run(9)
    bench.sent()
    bench.done(1, (STORED, Stored()))
    bench.effects()
    bench.machine.value_fetched(9, 100)
    assert not [e for e in bench.effects() if isinstance(e, FreeValues)]


def test_an_answer_is_expected_soon_from_a_lone_short_row_only() -> None:
    bench = Bench(2)
    bench.run(1)
    (slot,) = bench.sent()
    assert not bench.machine.answers_soon(0.001), "nobody knows how long it takes"
    bench.done(slot, b"", busy_s=1e-5)
    assert not bench.machine.answers_soon(0.001), "nothing runs"
    bench.run(2)
    assert not bench.machine.answers_soon(0.001), "it is not in a slot yet"
    bench.sent()
    assert bench.machine.answers_soon(0.001)
    bench.run(*range(3, 9))
    bench.sent()
    assert not bench.machine.answers_soon(0.001), "many are reported together"


def test_nothing_is_asked_of_a_slot_that_died_in_the_same_turn() -> None:
    bench = Bench(1)
    bench.short_rows()
    bench.run(1, 2, 3)
    bench.sent()
    bench.machine.recall([2])
    bench.machine.forget([77])
    bench.machine.slot_died(1, "SIGSEGV", True, bench.now)
    assert bench.effects() == [StartSlot(2)]
    assert bench.said()[1] == ("returned", 2)


def test_a_row_whose_value_was_freed_before_it_was_sent_is_given_back() -> None:
    bench = Bench(1)
    bench.machine.value_put(9, 100)
    bench.run(1)
    bench.sent()
    bench.run(2, 3, deps={2: [(9, LOCAL, 100)], 3: [(2, LOCAL, 0)]})
    bench.machine.free([9])
    assert [e for e in bench.effects() if not isinstance(e, PeekSlot)] == [FreeValues([9])]
    bench.done(1, b"v1")
    assert bench.effects() == []
    assert bench.said() == [("done", (1, 1, VALUE, b"v1")), ("returned", 2, 3)]
    assert bench.machine.is_idle()
