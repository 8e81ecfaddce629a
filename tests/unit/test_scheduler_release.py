"""What nobody wants goes, what may be needed again stays, and what was lost is made again."""

from __future__ import annotations

import pytest

from zfabric import messages as m
from zfabric.core import invariants
from zfabric.core.outcomes import stored_payload
from zfabric.core.scheduler import MAX_LOSSES
from zfabric.core.table import MAX_STRIKES
from zfabric.core.tasks import ASSIGNED, DONE, FAILED, READY, RELEASED, WAITING
from zfabric.messages import ERROR, INLINE, KILLED, LOCAL, LOST, STORED
from zfabric.testing.bench import FUNCTION, Bench, results, run, tid

BIG = 1 << 20


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.client(1)
    bench.worker(101)
    return bench


def emptied(bench: Bench) -> bool:
    invariants.check_empty(bench.scheduler)
    return True


@pytest.mark.parametrize("state", [WAITING, READY, ASSIGNED])
def test_release_before_the_end_takes_the_task_away(state: int) -> None:
    bench = Bench()
    bench.client(1)
    if state == ASSIGNED:
        bench.worker(101)
    bench.submit(1)
    if state == WAITING:
        bench.submit(2, deps={2: [1]})
        assert bench.release(2) == []
    said = bench.release(1)
    assert said == ([(101, m.Drop([tid(1)]))] if state == ASSIGNED else [])
    assert emptied(bench)


def test_release_of_a_stored_value_frees_it(bench: Bench) -> None:
    bench.submit(1)
    bench.stored(1)
    assert bench.release(1) == [(101, m.Free([tid(1)]))]
    assert emptied(bench)


def test_a_released_input_lives_until_its_dependents_have_run(bench: Bench) -> None:
    bench.submit(1, 2, deps={2: [1]})
    assert bench.release(1) == []
    assert bench.ended(1) == []  # nobody is told: nobody wants it for itself
    assert bench.states(1, 2) == [DONE, ASSIGNED]
    assert bench.ended(2) == [(1, results(2))]
    assert bench.states(1, 2) == [None, DONE]


def test_the_recipe_of_a_stored_value_stays_as_long_as_the_value(bench: Bench) -> None:
    bench.submit(1, 2, deps={2: [1]})
    bench.stored(1)
    bench.release(1)
    assert bench.stored(2) == [
        (101, m.Free([tid(1)])),
        (1, results(2, status=STORED, payload=stored_payload(BIG, [(101, "ipc://101")]))),
    ]
    assert bench.states(1, 2) == [RELEASED, DONE]
    assert bench.release(2) == [(101, m.Free([tid(2)]))]
    assert emptied(bench)


def test_a_small_input_of_a_stored_value_is_its_own_recipe(bench: Bench) -> None:
    bench.submit(1, 2, deps={2: [1]})
    bench.ended(1)
    bench.release(1)
    bench.stored(2)
    assert bench.states(1, 2) == [DONE, DONE]
    bench.release(2)
    assert emptied(bench)


def test_a_lost_value_is_made_again_from_its_recipe(bench: Bench) -> None:
    bench.submit(1, 2, 3, deps={2: [1], 3: [2]})
    for number in (1, 2):
        bench.stored(number)
    bench.release(1, 2)
    bench.stored(3)
    assert bench.states(1, 2, 3) == [RELEASED, RELEASED, DONE]
    bench.worker(102)
    assert bench.worker_left(101) == [
        (
            102,
            m.Run([FUNCTION], [tid(1), tid(2)], [2, 2], [7, 7], [b"args"] * 2,
                  [(1, [(tid(1), LOCAL, 0)])]),
        )
    ]  # fmt: skip
    assert bench.states(1, 2, 3) == [ASSIGNED, ASSIGNED, WAITING]
    bench.stored(1, worker=102)
    bench.stored(2, worker=102)
    there = stored_payload(BIG, [(102, "ipc://102")])
    assert bench.stored(3, worker=102) == [
        (102, m.Free([tid(2)])),
        (1, results(3, status=STORED, payload=there)),
    ]
    bench.release(3)
    assert emptied(bench)


def test_what_waits_for_a_lost_value_waits_again(bench: Bench) -> None:
    bench.submit(1, 2, deps={2: [1]})
    bench.scheduler.workers[101].credit = 0
    bench.stored(1)
    bench.task(2)
    bench.worker_left(101)
    assert bench.states(1, 2) == [READY, WAITING]
    bench.worker(102, credit=1)
    assert bench.turn() == [(102, run(1, attempt=2, functions=[FUNCTION]))]


def test_a_lost_value_that_nobody_needs_is_not_made_again(bench: Bench) -> None:
    bench.submit(1, 2, deps={2: [1]})
    bench.stored(1)
    bench.release(1)
    bench.ended(2)
    assert bench.worker_left(101) == []
    assert bench.states(1, 2) == [None, DONE]


def test_small_values_outlive_their_worker(bench: Bench) -> None:
    bench.submit(1)
    bench.ended(1)
    assert bench.worker_left(101) == []
    assert bench.states(1) == [DONE]


def test_lost_scattered_data_ends_what_needs_it(bench: Bench) -> None:
    bench.say(1, m.Register([tid(1)], [BIG], [[101]]))
    bench.submit(2, deps={2: [1]})
    (number, end), *rest = bench.worker_left(101)
    assert (number, rest) == (1, [])
    assert isinstance(end, m.Results)
    assert list(end.ids) == [tid(1), tid(2)]
    assert end.statuses == bytes([LOST, LOST])
    assert b"scattered data is gone" in end.payloads[1]
    bench.release(1, 2)
    assert emptied(bench)


def test_scattered_data_that_a_stored_value_came_from_is_kept(bench: Bench) -> None:
    bench.say(1, m.Register([tid(1)], [BIG], [[101]]))
    bench.submit(2, deps={2: [1]})
    bench.stored(2)
    assert bench.release(1) == []
    assert bench.states(1, 2) == [DONE, DONE]
    assert bench.release(2) == [(101, m.Free([tid(2), tid(1)]))]
    assert emptied(bench)


def test_scattered_data_lost_as_a_recipe_fails_what_is_made_from_it(bench: Bench) -> None:
    bench.say(1, m.Register([tid(1)], [BIG], [[101]]))
    bench.submit(2, deps={2: [1]})
    bench.stored(2)
    bench.release(1)
    said = bench.worker_left(101)
    assert [end.statuses for _, end in said] == [bytes([LOST])]  # type: ignore[union-attr]
    assert bench.states(1, 2) == [FAILED, FAILED]
    bench.release(2)
    assert emptied(bench)


def test_a_client_that_leaves_frees_what_it_held(bench: Bench) -> None:
    bench.submit(1, 2, 3, deps={3: [1]})
    bench.stored(1)
    said = bench.client_left(1)
    assert said == [(101, m.Drop([tid(2), tid(3)])), (101, m.Free([tid(1)]))] or said == [
        (101, m.Drop([tid(3), tid(2)])),
        (101, m.Free([tid(1)])),
    ]
    assert emptied(bench)


def test_a_client_that_leaves_spares_what_another_needs(bench: Bench) -> None:
    bench.client(2)
    bench.submit(1)
    bench.submit(1, client=2, deps={1: [tid(1)]})
    assert bench.client_left(1) == []
    assert bench.ended(1) == []
    assert bench.ended(tid(1, 2)) == [(2, results(1, client=2))]
    bench.client_left(2)
    assert emptied(bench)


def test_another_clients_value_comes_from_its_recipe_though_the_owner_left(bench: Bench) -> None:
    bench.client(2)
    bench.submit(1)
    bench.submit(1, client=2, deps={1: [tid(1)]})
    bench.stored(1)
    bench.stored(tid(1, 2))
    bench.client_left(1)
    bench.worker(102)
    assert bench.worker_left(101)[0][0] == 102
    bench.ended(1, worker=102)
    assert bench.ended(tid(1, 2), worker=102) == [(2, results(1, client=2))]


# --- Workers that go ----------------------------------------------------------------------------


def test_a_lost_workers_rows_run_elsewhere_in_their_order(bench: Bench) -> None:
    bench.submit(1, 2)
    bench.worker(102, credit=5)
    assert bench.worker_left(101) == [(102, run(1, 2, attempt=2, functions=[FUNCTION]))]
    # Only the first can have been running.
    assert [len(bench.task(n).history or ()) for n in (1, 2)] == [1, 0]


def test_a_task_that_takes_many_workers_down_ends(bench: Bench) -> None:
    bench.worker_left(101)
    bench.submit(1)
    for n in range(MAX_LOSSES):
        assert bench.states(1) == [READY]
        bench.worker(200 + n)
        bench.turn()
        said = bench.worker_left(200 + n, "the kernel ended it")
    assert len(said) == 1
    end = said[0][1]
    assert isinstance(end, m.Results)
    assert end.statuses == bytes([KILLED])
    assert end.payloads[0].count(b"the kernel ended it") >= MAX_LOSSES


def test_a_worker_that_says_good_bye_is_held_against_nobody(bench: Bench) -> None:
    bench.submit(1)
    bench.scheduler.worker_left(101, "said good-bye", bench.now)
    assert bench.states(1) == [READY]
    assert not bench.task(1).history


def test_rows_of_a_lost_worker_that_come_late_are_nobodys(bench: Bench) -> None:
    bench.submit(1)
    bench.worker_left(101)
    bench.worker(102)
    bench.turn()
    done = m.Done([tid(1)], [1], bytes([m.VALUE]), [b"late"], 1)
    assert bench.say(101, done) == []  # the number is gone with its session
    assert bench.say(102, done) == []  # and an old attempt never counts
    assert bench.states(1) == [ASSIGNED]


def test_what_a_lost_worker_was_to_hear_is_forgotten(bench: Bench) -> None:
    bench.submit(1)
    bench.hear(1, m.Cancel([tid(1)]))
    assert bench.worker_left(101) == [(1, results(1, status=m.CANCELLED, payload=b""))]


# --- Values that cannot be fetched --------------------------------------------------------------


def test_a_value_that_cannot_be_fetched_is_tried_again_and_then_made_again(bench: Bench) -> None:
    bench.submit(1)
    bench.stored(1)
    bench.scheduler.workers[101].credit = 0
    bench.worker(102, credit=1)
    bench.submit(2, deps={2: [1]})
    for strike in range(1, MAX_STRIKES):
        assert bench.say(102, m.Missing([tid(1)])) == []
        said = bench.returned(2, worker=102, credit=1)
        assert [type(message) for _, message in said] == [m.Run]
        assert bench.task(2).attempt == strike + 1
    assert bench.say(102, m.Missing([tid(1)])) == [(101, m.Free([tid(1)]))]
    assert bench.states(1, 2) == [READY, ASSIGNED]
    (number, again), *rest = bench.returned(2, worker=102, credit=1)
    assert (number, again, rest) == (102, run(1, attempt=2), [])
    assert bench.states(1, 2) == [ASSIGNED, WAITING]


def test_strikes_are_forgotten_with_the_value(bench: Bench) -> None:
    bench.submit(1)
    bench.stored(1)
    bench.say(101, m.Missing([tid(1)]))
    bench.release(1)
    assert emptied(bench)


def test_missing_news_of_what_is_no_value_any_more(bench: Bench) -> None:
    bench.submit(1, 2)
    bench.ended(1)
    assert bench.say(101, m.Missing([tid(1), tid(2), tid(50)])) == []


# --- Values given ahead -------------------------------------------------------------------------


def test_give_ahead_and_its_release() -> None:
    bench = Bench()
    bench.client(1)
    bench.worker(101, credit=100)
    inputs = range(1, 31)
    bench.submit(*inputs)
    bench.ended(*inputs, payload=b"x" * 4000, credit=100)
    said = bench.submit(50, deps={50: inputs})
    ways = [(tid(n), LOCAL, 4000) for n in inputs]
    assert said == [
        (101, m.Give([tid(n) for n in inputs], [b"x" * 4000] * 30)),
        (101, run(50, deps=[(0, ways)])),
    ]
    # A second one needs nothing more, and a small one may use what is there.
    again = bench.submit(51, 52, deps={51: inputs, 52: [1]})
    assert [type(message) for _, message in again] == [m.Run]
    bench.worker(102, credit=100)
    bench.ended(50, 51, 52, credit=0)
    assert bench.submit(53, deps={53: [1]}) == [
        (102, run(53, functions=[FUNCTION], deps=[(0, [(tid(1), INLINE, b"x" * 4000)])]))
    ]
    bench.ended(53, worker=102)
    said = bench.release(*inputs)
    assert said == [(101, m.Free([tid(n) for n in reversed(inputs)]))] or said == [
        (101, m.Free([tid(n) for n in inputs]))
    ]
    bench.release(50, 51, 52, 53)
    assert emptied(bench)


def test_given_values_outlive_the_worker_that_got_them() -> None:
    bench = Bench()
    bench.client(1)
    bench.worker(101, credit=100)
    inputs = range(1, 31)
    bench.submit(*inputs)
    bench.ended(*inputs, payload=b"x" * 4000, credit=100)
    bench.submit(50, deps={50: inputs})
    bench.worker(102)
    said = bench.worker_left(101)
    assert [(number, type(message)) for number, message in said] == [(102, m.Give), (102, m.Run)]
    bench.ended(50, worker=102, status=ERROR)
    bench.release(50, *inputs)
    assert emptied(bench)
