"""The worker's machine: one event, the exact effects and messages, and nothing left over."""

from __future__ import annotations

import msgpack
import pytest

from tests.unit.supervisor_bench import FN, Bench, Stored
from zfabric.core.supervisor import CREDIT_S
from zfabric.core.supervisor_effects import (
    ForgetFunctions,
    FreeValues,
    PeekSlot,
    SendRows,
    StartSlot,
    StopSlot,
    TakeBack,
)
from zfabric.errors import InternalError, RemoteProtocolError
from zfabric.messages import (
    DIED,
    ERROR,
    LOCAL,
    REMOTE,
    STORED,
    VALUE,
    Done,
    Give,
)


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
