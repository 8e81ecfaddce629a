"""The client's machine: rows out, settled outcomes in. Every message goes through the wire."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from zfabric import ids, wire
from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core.scheduler import Scheduler
from zfabric.core.submitter import KEPT_FUNCTIONS, PENDING, Outcome, Submitter
from zfabric.messages import MAX_FUNCTIONS

FN = 11


def through_wire(message: Any) -> Any:
    seq = 1 if wire.is_sequenced(message) else 0
    return wire.decode([bytes(f) for f in wire.encode(message, token=5, seq=seq)])[1]


def machine(**settings: Any) -> Submitter:
    submitter = Submitter(Settings(**settings))
    submitter.welcomed(3)
    submitter.functions[FN] = (FN, "f", b"blob")
    return submitter


def submit(submitter: Submitter, payload: bytes = b"x", **row: Any) -> Outcome:
    outcome = submitter.new_outcome(FN)
    submitter.rows.append((outcome.id, FN, payload, row.get("deps"), row.get("options")))
    return outcome


def drain(submitter: Submitter) -> list[Any]:
    messages = []
    while (message := submitter.next_message()) is not None:
        messages.append(through_wire(message))
    assert not submitter.has_work()
    return messages


def results(*ended: tuple[Outcome, int, bytes]) -> m.Results:
    columns = [list(column) for column in zip(*ended, strict=True)]
    return through_wire(m.Results([o.id for o in columns[0]], bytes(columns[1]), columns[2]))


def test_all_that_is_queued_leaves_as_one_message() -> None:
    submitter = machine()
    first = submit(submitter, b"a")
    second = submit(submitter, b"b", deps=[first.id])
    third = submit(submitter, b"c", options=m.TaskOptions(priority=4))
    (message,) = drain(submitter)
    assert list(message.ids) == [first.id, second.id, third.id]
    assert list(message.fns) == [FN] * 3 and list(message.payloads) == [b"a", b"b", b"c"]
    assert [(row, list(deps)) for row, deps in message.deps] == [(1, [first.id])]
    assert list(message.options) == [(2, m.TaskOptions(priority=4))]
    assert [tuple(f) for f in message.functions] == [(FN, "f", b"blob")]
    assert ids.session_of(first.id) == 3


def test_a_function_travels_once_per_session() -> None:
    submitter = machine()
    submit(submitter)
    assert drain(submitter)[0].functions
    submit(submitter)
    assert not drain(submitter)[0].functions
    submitter.session_lost("gone")
    submitter.welcomed(4)
    submit(submitter)
    assert drain(submitter)[0].functions


@pytest.mark.parametrize(
    ("settings", "payload", "sizes"),
    [
        ({"batch_rows": 2}, b"x", [2, 2, 1]),
        ({"batch_bytes": 8000, "inline_limit": 100}, b"x" * 4000, [2, 2, 1]),
        ({"batch_bytes": 8000, "inline_limit": 100}, b"x" * 9000, [1] * 5),
    ],
)
def test_messages_are_cut_by_rows_and_bytes(
    settings: dict[str, Any], payload: bytes, sizes: list[int]
) -> None:
    submitter = machine(**settings)
    for _ in range(5):
        submit(submitter, payload)
    assert [len(message.ids) for message in drain(submitter)] == sizes


def test_function_blobs_count_as_bytes() -> None:
    submitter = machine(batch_bytes=8000, inline_limit=100)
    for fn in range(4):
        submitter.functions[fn] = (fn, "f", b"b" * 5000)
        outcome = submitter.new_outcome(fn)
        submitter.rows.append((outcome.id, fn, b"x", None, None))
    assert [len(message.ids) for message in drain(submitter)] == [2, 2]


def test_a_release_follows_the_submit_that_was_queued_before_it() -> None:
    submitter = machine(batch_rows=2)
    outcomes = [submit(submitter) for _ in range(5)]
    submitter.released.extend(o.id for o in outcomes)
    messages = drain(submitter)
    assert [type(message) for message in messages] == [m.Submit] * 3 + [m.Release] * 3
    assert [i for r in messages[3:] for i in r.ids] == [o.id for o in outcomes]
    assert submitter.outcomes == {}


def test_new_rows_do_not_hold_up_releases() -> None:
    submitter = machine(batch_rows=2)
    first = submit(submitter)
    submitter.released.append(first.id)
    kinds = []
    for _ in range(4):
        submit(submitter), submit(submitter), submit(submitter)
        kinds.append(type(submitter.next_message()))
    assert m.Release in kinds


def test_a_release_between_two_looks_waits_for_its_row() -> None:
    submitter = machine()
    old = submit(submitter)
    submitter.released.append(old.id)
    assert isinstance(submitter.next_message(), m.Submit)  # here the release was noted
    new = submit(submitter)
    submitter.released.append(new.id)
    assert list(submitter.next_message().ids) == [old.id]
    assert list(submitter.next_message().ids) == [new.id]
    assert submitter.next_message() == m.Release([new.id])


def test_releasing_twice_is_said_once() -> None:
    submitter = machine()
    outcome = submit(submitter)
    submitter.released.extend([outcome.id, outcome.id])
    assert [type(message) for message in drain(submitter)] == [m.Submit, m.Release]


def test_a_call_does_not_wait_for_futures_dropped_before_it() -> None:
    submitter = machine()
    old = submit(submitter)
    drain(submitter)
    submitter.released.append(old.id)
    assert submitter.has_work() and not submitter.has_work(releasing=False)
    new = submit(submitter)
    message = submitter.next_message(releasing=False)
    assert isinstance(message, m.Submit) and list(message.ids) == [new.id]
    assert submitter.next_message(releasing=False) is None
    assert drain(submitter) == [m.Release([old.id])]


def test_a_released_pending_outcome_ends_so_that_nobody_waits_for_ever() -> None:
    submitter = machine()
    outcome = submit(submitter)
    rung = []
    outcome.waiters = [rung.append]
    submitter.released.append(outcome.id)
    drain(submitter)
    assert outcome.status == m.CANCELLED and rung == [outcome]


def test_results_settle_and_name_the_awaited() -> None:
    submitter = machine()
    one, two = submit(submitter), submit(submitter)
    two.waiters = [lambda _: None]
    assert submitter.results(results((one, m.VALUE, b"1"), (two, m.ERROR, b"2"))) == [two]
    assert (one.status, one.payload) == (m.VALUE, b"1")
    assert (two.status, two.payload) == (m.ERROR, b"2")
    assert submitter.n_settled == 2


def test_an_end_is_final() -> None:
    submitter = machine()
    outcome = submit(submitter)
    submitter.results(results((outcome, m.VALUE, b"1")))
    submitter.results(results((outcome, m.ERROR, b"2")))
    assert submitter.cancel([outcome]) == []
    assert (outcome.status, outcome.payload) == (m.VALUE, b"1")
    assert [type(message) for message in drain(submitter)] == [m.Submit]


def test_results_of_unknown_tasks_are_ignored() -> None:
    submitter = machine()
    assert submitter.results(results((Outcome(999, FN), m.VALUE, b""))) == []


def test_cancel_settles_here_and_follows_the_row() -> None:
    submitter = machine()
    outcome = submit(submitter)
    outcome.waiters = [lambda _: None]
    assert submitter.cancel([outcome]) == [outcome]
    assert outcome.status == m.CANCELLED
    kinds = drain(submitter)
    assert [type(message) for message in kinds] == [m.Submit, m.Cancel]
    submitter.results(results((outcome, m.VALUE, b"late")))
    assert outcome.status == m.CANCELLED


def test_retry_makes_failed_ones_pending_again() -> None:
    submitter = machine()
    failed, fine = submit(submitter), submit(submitter)
    submitter.results(results((failed, m.ERROR, b"e"), (fine, m.VALUE, b"v")))
    submitter.retry([failed, fine], frozenset({m.ERROR}))
    assert failed.status == PENDING and fine.status == m.VALUE
    assert drain(submitter)[-1] == m.Retry([failed.id])
    submitter.results(results((failed, m.VALUE, b"2")))
    assert failed.payload == b"2"


def test_a_value_that_is_not_where_it_should_be_is_asked_for() -> None:
    submitter = machine()
    outcome = submit(submitter)
    submitter.results(results((outcome, m.STORED, b"there")))
    submitter.locate(outcome, 8)
    assert outcome.status == PENDING
    assert drain(submitter)[-1] == m.Ask(8, "locate", [outcome.id])


def test_a_lost_session_ends_what_it_held_and_keeps_what_arrived() -> None:
    submitter = machine()
    done, stored, pending = (submit(submitter) for _ in range(3))
    pending.waiters = [lambda _: None]
    submitter.results(results((done, m.VALUE, b"1"), (stored, m.STORED, b"there")))
    submitter.released.append(done.id)
    assert submitter.session_lost("the broker restarted") == [pending]
    assert done.status == m.VALUE and stored.status == m.LOST and pending.status == m.LOST
    assert msgpack.unpackb(pending.payload) == ["the broker restarted"]
    submitter.welcomed(9)
    assert drain(submitter) == []


def test_a_row_made_while_the_session_was_lost_does_not_reach_the_next_one() -> None:
    submitter = machine()
    submitter.session_lost("gone")
    late = submit(submitter)  # its id is still of the session before
    submitter.welcomed(9)
    fresh = submit(submitter)
    (message,) = drain(submitter)
    assert list(message.ids) == [fresh.id]
    assert late.status == m.LOST and late.id not in submitter.outcomes


def test_closing_ends_what_is_pending() -> None:
    submitter = machine()
    done, pending = submit(submitter), submit(submitter)
    submitter.results(results((done, m.VALUE, b"1")))
    pending.waiters = [lambda _: None]
    assert submitter.closed("closed") == [pending]
    assert done.status == m.VALUE and pending.status == m.CANCELLED
    assert submitter.closed_text == "closed"


def test_many_outcomes_at_once_have_ascending_ids() -> None:
    submitter = machine()
    one = submitter.new_outcome(FN)
    many = submitter.new_outcomes(FN, 3)
    assert [o.id - one.id for o in many] == [1, 2, 3]
    assert all(submitter.outcomes[o.id] is o for o in many)


def test_functions_are_sent_again_when_the_broker_has_forgotten_them() -> None:
    """Client and broker forget by the same rule: no row ever names a function that is unknown."""
    submitter = Submitter()
    submitter.welcomed(1)
    scheduler = Scheduler()
    scheduler.client_joined(1, "client")
    n = 3 * MAX_FUNCTIONS
    order = [*range(1, n), *range(1, n, 7), *range(n - 50, n), 1, 2, 3]
    for batch in (order[:10], order[10:1500], order[1500:]):
        for fn in batch:
            submitter.learn((fn, "f", b"blob"))
            submitter.rows.append((submitter.new_outcome(fn).id, fn, b"args", None, None))
        while (message := submitter.next_message()) is not None:
            scheduler.on_message(1, message, 0.0)
    assert len(scheduler.tasks) == len(order)
    assert len(scheduler.clients[1].functions) == MAX_FUNCTIONS
    assert list(scheduler.clients[1].functions) == list(submitter._known)


def test_a_program_that_makes_a_function_per_call_does_not_keep_them_all() -> None:
    submitter = Submitter()
    for fn in range(1, 3 * KEPT_FUNCTIONS):
        submitter.learn((fn, "f", b"blob"))
    assert len(submitter.functions) <= KEPT_FUNCTIONS
    assert submitter.function_name(3 * KEPT_FUNCTIONS - 1) == "f"
    assert submitter.function_name(1) == "task"


def test_options_count_towards_a_frame_with_all_their_names() -> None:
    submitter = machine()
    limit = Settings().max_frame
    options = m.TaskOptions(workers=tuple(f"worker-{number:04}" for number in range(100)))
    outcomes = [submit(submitter, options=options) for _ in range(5_000)]
    told = []
    while (message := submitter.next_message()) is not None:
        frames = wire.encode(message, token=5, seq=1)
        assert max(map(len, frames)) < limit
        told += message.ids  # type: ignore[union-attr]
    assert told == [outcome.id for outcome in outcomes]


def test_a_message_brings_no_more_functions_than_the_broker_keeps() -> None:
    submitter = machine()
    for fn in range(100, 100 + 2 * MAX_FUNCTIONS):
        submitter.learn((fn, "f", b"blob"))
        submitter.rows.append((submitter.new_outcome(fn).id, fn, b"", None, None))
    first, second = drain(submitter)
    assert len(first.functions) == len(second.functions) == MAX_FUNCTIONS


def test_a_row_without_its_function_ends_alone() -> None:
    submitter = machine()
    outcome = submitter.new_outcome(77)
    submitter.rows.append((outcome.id, 77, b"", None, None))
    other = submit(submitter)
    (message,) = drain(submitter)
    assert list(message.ids) == [other.id]
    assert outcome.status == m.LOST and other.status == PENDING


def test_questions_under_an_alarm_go_out_of_sequence_and_are_put_again_when_it_is_over() -> None:
    submitter = Submitter()
    submitter.ask(1, "info")
    assert submitter.queries() == []
    assert submitter.alarmed("full")
    assert not submitter.alarmed("full, still"), "no news"
    submitter.ask(2, "why", [5], "")
    submitter.ask(3, "sync")
    assert submitter.queries() == [m.Query(1, "info"), m.Query(2, "why", [5])]
    submitter.answered(1)
    assert submitter.queries() == [m.Query(2, "why", [5])]
    said = [submitter.next_message(), submitter.next_message(), submitter.next_message()]
    assert said == [m.Ask(1, "info"), m.Ask(3, "sync"), None]
    assert submitter.alarmed("")
    assert submitter.queries() == []
    assert submitter.next_message() == m.Ask(2, "why", [5])
    assert submitter.next_message() is None
