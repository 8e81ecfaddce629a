"""Cancel and retry against what is on its way: an old end is not taken for a new one."""

from __future__ import annotations

from zfabric import messages as m
from zfabric.core.submitter import PENDING, Outcome, Submitter

FAILED = frozenset((m.ERROR, m.CANCELLED))


def submitted(n: int = 1) -> tuple[Submitter, list[Outcome]]:
    submitter = Submitter()
    submitter.welcomed(1)
    submitter.functions[7] = (7, "f", b"blob")
    outcomes = submitter.new_outcomes(7, n)
    for outcome in outcomes:
        submitter.rows.append((outcome.id, 7, b"args", None, None))
    assert isinstance(submitter.next_message(), m.Submit)
    return submitter, outcomes


def said(submitter: Submitter) -> list[m.Message]:
    messages = []
    while (message := submitter.next_message()) is not None:
        messages.append(message)
    return messages


def tell(submitter: Submitter, outcome: Outcome, status: int) -> None:
    submitter.results(m.Results([outcome.id], bytes([status]), [b"payload"]))


def test_the_end_of_a_cancelled_run_is_not_that_of_its_retry() -> None:
    submitter, (outcome,) = submitted()
    submitter.cancel([outcome])
    submitter.retry([outcome], FAILED)
    assert outcome.status == PENDING
    messages = said(submitter)
    assert [type(message) for message in messages] == [m.Cancel]
    tell(submitter, outcome, m.CANCELLED)
    assert outcome.status == PENDING
    (retry,) = said(submitter)
    assert retry == m.Retry([outcome.id]) and type(retry) is m.Retry
    tell(submitter, outcome, m.VALUE)
    assert outcome.status == m.VALUE


def test_what_takes_a_retried_value_follows_the_retry() -> None:
    """Or the broker would end it with the end that is just being taken back."""
    submitter, (outcome,) = submitted()
    tell(submitter, outcome, m.ERROR)
    for cancelling in (False, True):
        if cancelling:
            submitter.cancel([outcome])
        submitter.retry([outcome], FAILED)
        after = submitter.new_outcome(7)
        submitter.rows.append((after.id, 7, b"args", [outcome.id], None))
        if cancelling:
            assert [type(message) for message in said(submitter)] == [m.Cancel]
            assert submitter.is_held_up
            tell(submitter, outcome, m.CANCELLED)
        assert [type(message) for message in said(submitter)] == [m.Retry, m.Submit]


def test_a_retry_does_not_overtake_the_rows_before_it() -> None:
    submitter, (outcome,) = submitted()
    tell(submitter, outcome, m.ERROR)
    before = submitter.new_outcomes(7, 3)
    for each in before:
        submitter.rows.append((each.id, 7, b"args", None, None))
    submitter.cancel([before[2]])
    submitter.retry([outcome], FAILED)
    submitter.rows.append((submitter.new_outcome(7).id, 7, b"args", None, None))
    kinds = [(type(message).__name__, len(message.ids)) for message in said(submitter)]
    assert kinds == [("Submit", 3), ("Cancel", 1), ("Retry", 1), ("Submit", 1)]


def test_a_value_that_was_on_its_way_does_not_undo_a_cancel() -> None:
    submitter, (outcome,) = submitted()
    submitter.cancel([outcome])
    tell(submitter, outcome, m.VALUE)
    assert outcome.status == m.CANCELLED
    said(submitter)
    submitter.retry([outcome], FAILED)
    (retry,) = said(submitter)
    assert type(retry) is m.Retry  # at once: nothing else is to come
    tell(submitter, outcome, m.VALUE)
    assert outcome.status == m.VALUE


def test_a_retry_that_is_cancelled_before_it_left() -> None:
    submitter, (outcome,) = submitted()
    submitter.cancel([outcome])
    submitter.retry([outcome], FAILED)
    submitter.cancel([outcome])
    tell(submitter, outcome, m.CANCELLED)
    assert outcome.status == m.CANCELLED
    cancel, nothing = said(submitter)
    assert type(cancel) is m.Cancel and nothing == m.Retry([])


def test_what_is_released_or_lost_is_not_remembered() -> None:
    submitter, outcomes = submitted(2)
    submitter.cancel(outcomes)
    submitter.released.append(outcomes[0].id)
    assert [type(message) for message in said(submitter)] == [m.Cancel, m.Release]
    tell(submitter, outcomes[0], m.CANCELLED)
    submitter.session_lost("the broker restarted")
    assert not submitter._cancelled
    assert not said(submitter)


def test_a_row_of_an_earlier_session_is_not_sent_in_the_next() -> None:
    for number in (1, 5):  # a restarted broker may give lower numbers, or higher ones
        submitter = Submitter()
        submitter.welcomed(3)
        submitter.functions[7] = (7, "f", b"blob")
        late = submitter.new_outcome(7)
        submitter.welcomed(number)
        submitter.rows.append((late.id, 7, b"args", None, None))
        assert said(submitter) == []
        assert late.status == m.LOST


def test_after_a_restart_a_held_up_retry_asks_for_the_end_that_it_waits_for() -> None:
    """The broker told it just before it was killed, and would not tell it again unasked."""
    submitter, (outcome, failed) = submitted(2)
    tell(submitter, failed, m.ERROR)
    submitter.cancel([outcome])
    assert [type(message) for message in said(submitter)] == [m.Cancel]
    submitter.retry([outcome, failed], FAILED)
    (inventory,) = submitter.inventory()
    assert list(inventory.ids) == [outcome.id]
    tell(submitter, outcome, m.CANCELLED)
    assert said(submitter) == [m.Retry([outcome.id, failed.id])]


def test_a_retry_that_has_not_left_is_taken_back_by_a_cancel() -> None:
    """The Cancel behind it would be what it waits for, and all that follows waits for both."""
    submitter, (outcome, other) = submitted(2)
    tell(submitter, outcome, m.ERROR)
    submitter.retry([outcome], FAILED)
    submitter.cancel([outcome])
    submitter.cancel([other])
    assert outcome.status == m.CANCELLED
    assert said(submitter) == [m.Retry([]), m.Cancel([other.id])]
    submitter.retry([outcome], FAILED)
    assert said(submitter) == [m.Retry([outcome.id])]
