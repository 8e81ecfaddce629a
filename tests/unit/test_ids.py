"""Ids: who made them and in which order, and nothing twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfabric import ids


@given(
    session=st.integers(1, ids.MAX_SESSION),
    counter=st.integers(0, ids.MAX_COUNTER),
)
def test_a_task_id_tells_its_session_and_counter(session: int, counter: int) -> None:
    task = ids.task_id(session, counter)
    assert (ids.session_of(task), ids.counter_of(task)) == (session, counter)
    assert 0 < task < 1 << 63


@pytest.mark.parametrize(
    ("session", "counter"),
    [(0, 1), (-1, 1), (ids.MAX_SESSION + 1, 1), (1, -1), (1, ids.MAX_COUNTER + 1)],
)
def test_what_does_not_fit_is_an_error(session: int, counter: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        ids.task_id(session, counter)


def test_ids_ascend_within_a_session() -> None:
    assert ids.task_id(3, 8) < ids.task_id(3, 9) < ids.task_id(4, 0)


def test_tokens_are_fresh_positive_and_signed_64_bit() -> None:
    tokens = {ids.new_token() for _ in range(1000)}
    assert len(tokens) == 1000
    assert all(0 < token < 1 << 63 for token in tokens)


def test_a_token_is_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", bytes)
    assert ids.new_token() == 1
