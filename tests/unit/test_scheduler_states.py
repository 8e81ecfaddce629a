"""One event, the exact messages, and nothing else: a task's way through its states."""

from __future__ import annotations

import pytest

from zfabric import messages as m
from zfabric.config import DEFAULTS
from zfabric.core.outcomes import stored_payload, text_payload
from zfabric.core.retry import class_names, names_behind, pause_s, with_names
from zfabric.core.tasks import ASSIGNED, DONE, FAILED, READY, RELEASED, WAITING
from zfabric.core.why import reasons
from zfabric.errors import RemoteProtocolError
from zfabric.messages import CANCELLED, DIED, ERROR, INLINE, KILLED, LOCAL, LOST, REMOTE, STORED
from zfabric.testing.bench import FN, FUNCTION, Bench, results, run, tid

BIG = 1 << 20
AT_101 = stored_payload(BIG, [(101, "ipc://101")])


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.client(1)
    return bench


def test_a_lone_task(bench: Bench) -> None:
    assert bench.submit(1) == []
    assert bench.states(1) == [READY]
    bench.worker(101)
    assert bench.turn() == [(101, run(1, functions=[FUNCTION]))]
    assert bench.states(1) == [ASSIGNED]
    assert bench.ended(1) == [(1, results(1))]
    assert bench.states(1) == [DONE]
    assert bench.release(1) == []
    assert not bench.scheduler.tasks


def test_a_function_travels_once_per_worker(bench: Bench) -> None:
    bench.worker(101)
    assert bench.submit(1) == [(101, run(1, functions=[FUNCTION]))]
    assert bench.submit(2) == [(101, run(2))]
    bench.worker(102)
    assert bench.submit(3) == [(102, run(3, functions=[FUNCTION]))]


def test_a_turn_with_many_rows_is_one_message_per_peer(bench: Bench) -> None:
    bench.worker(101, credit=10)
    assert bench.submit(1, 2, 3) == [(101, run(1, 2, 3, functions=[FUNCTION]))]
    assert bench.ended(1, 2, 3) == [(1, results(1, 2, 3))]


def test_a_dependent_gets_a_small_value_in_its_row(bench: Bench) -> None:
    bench.worker(101, credit=1)
    bench.submit(1)
    assert bench.submit(2, deps={2: [1]}) == []
    assert bench.states(2) == [WAITING]
    assert bench.ended(1, credit=1) == [
        (101, run(2, deps=[(0, [(tid(1), INLINE, b"value")])])),
        (1, results(1)),
    ]


def test_a_dependent_is_told_where_a_large_value_is(bench: Bench) -> None:
    bench.worker(101, credit=1)
    bench.submit(1)
    bench.worker(102, credit=0)
    assert bench.stored(1) == [(1, results(1, status=STORED, payload=AT_101))]
    bench.scheduler.workers[101].credit = 0
    bench.scheduler.workers[102].credit = 1
    there = [BIG, [[101, "ipc://101"]]]
    assert bench.submit(2, deps={2: [1]}) == [
        (102, run(2, functions=[FUNCTION], deps=[(0, [(tid(1), REMOTE, there)])]))
    ]


def test_a_copy_that_a_worker_made_counts(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    bench.stored(1)
    bench.worker(102)
    assert bench.say(102, m.Holds([tid(1)])) == []
    both = stored_payload(BIG, [(101, "ipc://101"), (102, "ipc://102")])
    assert bench.say(1, m.Ask(1, "locate", [tid(1)])) == [
        (1, results(1, status=STORED, payload=both))
    ]
    assert bench.release(1) == [(101, m.Free([tid(1)])), (102, m.Free([tid(1)]))]


def test_a_copy_that_nobody_needs_is_freed_at_once(bench: Bench) -> None:
    bench.worker(101)
    assert bench.say(101, m.Holds([tid(9)])) == [(101, m.Free([tid(9)]))]


def test_a_value_given_to_a_worker_survives_late_news_of_an_older_copy(bench: Bench) -> None:
    """The value was stored once, lost, made again small, and given to this worker."""
    bench.worker(101)
    bench.submit(1)
    bench.ended(1)
    task, worker = bench.task(1), bench.scheduler.workers[101]
    task.holders = {worker}
    worker.values.add(task.id)
    assert bench.say(101, m.Holds([tid(1)])) == []


def test_an_error_reaches_the_client_and_all_that_wait(bench: Bench) -> None:
    bench.worker(101, credit=1)
    bench.submit(1)
    bench.submit(2, 3, 4, deps={2: [1], 3: [2]})
    said = bench.ended(1, status=ERROR, payload=b"exc", credit=1)
    assert said == [
        (101, run(4)),
        (1, results(1, 2, 3, status=ERROR, payload=b"exc")),
    ]
    assert bench.states(1, 2, 3) == [FAILED] * 3


def test_a_task_that_needs_a_failed_one_fails_with_it(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    bench.ended(1, status=ERROR, payload=b"exc")
    assert bench.submit(2, deps={2: [1]}) == [(1, results(2, status=ERROR, payload=b"exc"))]


def test_a_failing_input_spares_the_others_the_work(bench: Bench) -> None:
    """2 was let go and would have to be made again for 4, but 4 fails with 3 anyhow."""
    bench.worker(101)
    bench.submit(1)
    bench.stored(1)
    bench.submit(2, 3, deps={2: [1]})
    bench.stored(2)
    bench.ended(3, status=ERROR, payload=b"exc")
    bench.release(1)
    bench.worker_left(101)
    bench.submit(4, deps={4: [1 + 1, 3]})
    assert bench.states(4) == [FAILED]


def test_retries_after_an_error(bench: Bench) -> None:
    bench.worker(101)
    twice = m.TaskOptions(retries=1)
    bench.submit(1, options={1: twice})
    assert bench.ended(1, status=ERROR, payload=b"exc") == []
    assert bench.scheduler.due_at == bench.now + pause_s(1, tid(1), DEFAULTS)
    assert bench.tick(0.01) == []
    assert bench.tick(DEFAULTS.retry_s) == [(101, run(1, attempt=2))]
    assert bench.ended(1, status=ERROR, payload=b"exc2") == [
        (1, results(1, status=ERROR, payload=b"exc2"))
    ]


@pytest.mark.parametrize("how", ["cancel", "release", "client"])
def test_nothing_is_left_of_one_that_waited_for_its_retry(bench: Bench, how: str) -> None:
    bench.worker(101)
    bench.submit(1, options={1: m.TaskOptions(retries=1)})
    bench.ended(1, status=ERROR, payload=b"exc")
    if how == "cancel":
        bench.cancel(1)
        bench.release(1)
    elif how == "release":
        bench.release(1)
    else:
        bench.client_left(1)
    assert not bench.scheduler.tasks and not bench.scheduler.table.later
    assert bench.tick(1.0) == []


def test_only_wanted_exceptions_are_retried(bench: Bench) -> None:
    bench.worker(101, credit=9)
    options = m.TaskOptions(retries=2, retry_on=("builtins.ConnectionError",))
    bench.submit(1, 2, 3, options={1: options, 2: options, 3: options})
    reset = with_names(b"pickle", class_names(ConnectionResetError))
    wrong = with_names(b"pickle", class_names(ValueError))
    assert bench.ended(1, status=ERROR, payload=reset, credit=9) == []
    assert bench.ended(2, status=ERROR, payload=wrong, credit=9) == [
        (1, results(2, status=ERROR, payload=wrong))
    ]
    late = text_payload("too long")
    assert bench.ended(3, status=m.LATE, payload=late, credit=9) == [
        (1, results(3, status=m.LATE, payload=late))
    ]
    assert bench.states(1) == [READY]


def test_pauses_double_with_a_jitter_and_have_an_end() -> None:
    pauses = [pause_s(n, 12345, DEFAULTS) for n in range(1, 40)]
    for n, pause in enumerate(pauses):
        longest = min(DEFAULTS.retry_s * 2**n, DEFAULTS.max_retry_s)
        assert longest / 2 <= pause <= longest
    assert len({pause_s(1, id_, DEFAULTS) for id_ in range(100)}) == 100


@pytest.mark.parametrize("blob", [b"", b"x", b"\xff\xff", b"raised"])
def test_names_behind_anything_are_no_error(blob: bytes) -> None:
    assert "builtins.ValueError" not in names_behind(blob)


@pytest.mark.parametrize("how", ["its process died", "its worker said good-bye", "was cut off"])
def test_what_must_not_run_twice_ends_as_unknown(bench: Bench, how: str) -> None:
    bench.worker(101)
    bench.submit(1, options={1: m.TaskOptions(idempotent=False)})
    if how == "its process died":
        ((number, end),) = bench.ended(1, status=m.DIED, payload=text_payload("SIGSEGV"))
    elif how == "was cut off":
        bench.worker(102)
        assert bench.worker_left(101) == [], "it may come back with it"
        ((code, _),) = reasons(bench.scheduler.placer, bench.task(1), lambda _: 0.0)
        assert code == "doubt"
        bench.now += bench.scheduler.settings.dead_s
        bench.scheduler.tick(bench.now)
        ((number, end),) = bench.turn()
    else:
        bench.scheduler.worker_left(101, "said good-bye", bench.now)
        ((number, end),) = bench.turn()
    assert number == 1 and isinstance(end, m.Results) and end.statuses == bytes([m.UNKNOWN])
    bench.release(1)
    assert not bench.scheduler.tasks


def test_what_must_not_run_twice_is_not_made_again(bench: Bench) -> None:
    bench.worker(101)
    bench.worker(102)
    bench.submit(1, options={1: m.TaskOptions(idempotent=False)})
    holder = bench.task(1).worker.number
    bench.stored(1, worker=holder)
    bench.submit(2, deps={2: [1]})
    bench.stored(2, worker=holder)
    bench.release(1)
    assert bench.states(1) == [DONE]  # kept for 2, which could not be made again without it
    bench.worker_left(holder)
    assert bench.states(1, 2) == [FAILED, FAILED]


def test_what_must_not_run_twice_runs_elsewhere_if_it_had_not_begun(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1, options={1: m.TaskOptions(idempotent=False)})
    assert bench.returned(1) == [(101, run(1, attempt=2))]


def test_time_limits_travel_with_their_rows(bench: Bench) -> None:
    bench.worker(101, credit=9)
    ((_, told),) = bench.submit(1, 2, options={2: m.TaskOptions(timeout_s=2.5)})
    assert isinstance(told, m.Run)
    assert list(told.limits) == [(list(told.ids).index(tid(2)), 2.5)]


def test_a_client_may_retry_a_failed_task_and_what_failed_with_it(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1, 2, deps={2: [1]})
    bench.ended(1, status=ERROR, payload=b"exc")
    said = bench.retry(1, 2)
    assert said == [
        (101, run(1, attempt=2)),
        (101, run(2, attempt=2, deps=[(0, [(tid(1), LOCAL, 0)])])),
    ] or said == [
        (101, m.Run([], [tid(1), tid(2)], [2, 2], [FN] * 2, [b"args"] * 2,
                    [(1, [(tid(1), LOCAL, 0)])]))
    ]  # fmt: skip
    assert bench.ended(1) == [(1, results(1))]


def test_retry_of_one_whose_input_still_fails_fails_again(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1, 2, deps={2: [1]})
    bench.ended(1, status=ERROR, payload=b"exc")
    assert bench.retry(2) == [(1, results(2, status=ERROR, payload=b"exc"))]


def test_retry_of_one_that_took_an_unknown_value_fails_again(bench: Bench) -> None:
    bench.worker(101)
    first = bench.submit(1, deps={1: [99]})
    assert [number for number, _ in first] == [1]
    assert first[0][1].statuses == bytes([LOST])  # type: ignore[union-attr]
    assert bench.retry(1) == first
    bench.release(1)
    assert not bench.scheduler.tasks


def test_a_task_cannot_wait_for_itself(bench: Bench) -> None:
    said = bench.submit(1, deps={1: [1]})
    assert said[0][1].statuses == bytes([LOST])  # type: ignore[union-attr]


def test_retry_of_what_did_not_fail(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    assert bench.retry(1) == []
    ((client, results_of_unknown),) = bench.retry(50)  # it was refused for want of room
    assert client == 1 and isinstance(results_of_unknown, m.Results)
    assert results_of_unknown.statuses == bytes([m.FULL])
    bench.ended(1)
    # The client cancelled it when the value was on its way, and now waits for it again.
    assert bench.cancel(1) == []
    assert bench.retry(1) == [(1, results(1))]


def test_three_deaths_of_a_slot_end_a_task(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    text = text_payload("SIGSEGV")
    for attempt in (2, 3):
        assert bench.ended(1, status=DIED, payload=text) == [(101, run(1, attempt=attempt))]
    (number, end), *rest = bench.ended(1, status=DIED, payload=text)
    assert (number, rest) == (1, [])
    assert isinstance(end, m.Results) and end.statuses == bytes([KILLED])
    assert b"SIGSEGV" in end.payloads[0] and b"3 tries" in end.payloads[0]


def test_deaths_with_rubbish_for_a_text(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    for rubbish in (b"", b"\xc1", b"\x90", b"\x91\xa1\xff"):
        if bench.states(1) == [ASSIGNED]:
            bench.ended(1, status=DIED, payload=rubbish)
    assert bench.states(1) == [FAILED]


def test_returned_rows_run_elsewhere_oldest_first(bench: Bench) -> None:
    bench.worker(101, credit=3)
    bench.submit(1, 2, 3)
    bench.scheduler.workers[101].credit = 1
    bench.worker(102, credit=5)
    assert bench.returned(2, 3, credit=1) == [(102, run(2, 3, attempt=2, functions=[FUNCTION]))]


# --- Cancel -------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_worker", [False, True])
def test_cancel(bench: Bench, with_worker: bool) -> None:
    if with_worker:
        bench.worker(101, credit=1)
    bench.submit(1, 2, deps={2: [1]})
    drop = [(101, m.Drop([tid(1)]))] if with_worker else []
    assert bench.cancel(1) == [*drop, (1, results(1, 2, status=CANCELLED, payload=b""))]
    assert bench.cancel(1, 2, 99) == []
    assert bench.release(1, 2) == []
    assert not bench.scheduler.tasks


def test_a_finished_task_stays_finished(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    bench.ended(1)
    assert bench.cancel(1) == []
    assert bench.states(1) == [DONE]


def test_the_end_of_a_cancelled_attempt_is_only_counted(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    bench.cancel(1)
    assert bench.ended(1) == []
    assert bench.scheduler.table.n_stale == 1
    assert bench.ended(1, status=STORED, payload=(5).to_bytes(8, "little")) == [
        (101, m.Free([tid(1)]))
    ]


def test_a_cancelled_row_reported_as_such(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    assert bench.ended(1, status=CANCELLED, payload=b"") == [
        (1, results(1, status=CANCELLED, payload=b""))
    ]


def test_cancel_ends_what_others_wait_for(bench: Bench) -> None:
    bench.client(2)
    bench.submit(1)
    bench.submit(1, client=2, deps={1: [tid(1)]})
    assert bench.cancel(1) == [
        (1, results(1, status=CANCELLED, payload=b"")),
        (2, results(1, status=CANCELLED, payload=b"", client=2)),
    ]


# --- Fencing ------------------------------------------------------------------------------------


def test_rows_count_for_the_live_attempt_of_the_right_worker_only(bench: Bench) -> None:
    bench.worker(101, credit=1)
    bench.worker(102, credit=0)
    bench.submit(1)
    assert bench.ended(1, worker=102) == []
    assert bench.ended(1, attempt=2) == []
    bench.returned(1, credit=1)  # comes back to 101 as attempt 2
    assert bench.task(1).attempt == 2
    assert bench.ended(1, attempt=1) == []
    assert bench.states(1) == [ASSIGNED]
    assert bench.scheduler.table.n_stale == 3
    assert bench.ended(1, attempt=2) == [(1, results(1))]


def test_a_row_reported_twice_in_one_message(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    assert bench.ended(1, 1) == [(1, results(1))]
    assert bench.scheduler.table.n_stale == 1


def test_messages_that_a_role_does_not_send() -> None:
    bench = Bench()
    bench.client(1)
    bench.worker(101)
    for number, message in [(1, m.Holds([1])), (101, m.Release([1])), (1, m.Free([1]))]:
        with pytest.raises(RemoteProtocolError) as caught:
            bench.say(number, message)
        assert caught.value.reason == "role"
    assert bench.say(55, m.Release([1])) == []  # its session ended a moment ago


@pytest.mark.parametrize(
    "message",
    [
        m.Submit([], [tid(1)], [FN], [b""]),  # a function that was not sent
        m.Submit([FUNCTION], [tid(1), tid(1)], [FN, FN], [b"", b""]),
        m.Submit([FUNCTION], [tid(1, 2)], [FN], [b""]),  # an id of somebody else
        m.Register([tid(1, 2)], [5], [[101]]),
        m.Ask(1, "the time"),
    ],
)
def test_messages_that_make_no_sense(message: m.Message) -> None:
    bench = Bench()
    bench.client(1)
    with pytest.raises(RemoteProtocolError):
        bench.say(1, message)
    bench.client_left(1)
    assert not bench.scheduler.tasks


# --- Scattered data -----------------------------------------------------------------------------


def test_registered_values_are_inputs_like_others(bench: Bench) -> None:
    bench.worker(101, credit=2)
    assert bench.say(1, m.Register([tid(1)], [BIG], [[101]])) == []
    assert bench.submit(2, deps={2: [1]}) == [
        (101, run(2, functions=[FUNCTION], deps=[(0, [(tid(1), LOCAL, BIG)])]))
    ]
    bench.ended(2)
    assert bench.release(1) == [(101, m.Free([tid(1)]))]
    bench.release(2)
    assert not bench.scheduler.tasks


def test_a_registered_value_whose_worker_is_gone_is_lost(bench: Bench) -> None:
    said = bench.say(1, m.Register([tid(1)], [5], [[101]]))
    assert said[0][1].statuses == bytes([LOST])  # type: ignore[union-attr]
    assert bench.retry(1) == said


# --- Questions ----------------------------------------------------------------------------------


def test_locate(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    bench.stored(1)
    locate = m.Ask(1, "locate", [tid(1)])
    assert bench.say(1, locate) == [(1, results(1, status=STORED, payload=AT_101))]
    bench.submit(2)
    assert bench.say(1, m.Ask(2, "locate", [tid(2)])) == []  # told when it is done
    said = bench.say(1, m.Ask(3, "locate", [tid(77)]))
    assert said[0][1].statuses == bytes([LOST])  # type: ignore[union-attr]


def test_info_counts_states(bench: Bench) -> None:
    bench.worker(101, credit=1)
    bench.submit(1, 2, 3, deps={3: [2]})
    info = bench.scheduler.info()
    assert [info["tasks"][name] for name in ("waiting", "ready", "running")] == [1, 1, 1]
    assert info["workers"][0]["held"] == 1
    assert RELEASED == 5  # the names in info() are in the order of the numbers
