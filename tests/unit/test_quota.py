"""What sessions may keep at the broker: counted, refused beyond, and free again."""

from __future__ import annotations

import gc

import pytest
from msgpack import unpackb

from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core import invariants
from zfabric.core.placement import WorkerRecord
from zfabric.core.scheduler import Scheduler
from zfabric.core.tasks import TASK_NBYTES
from zfabric.ids import task_id
from zfabric.messages import FULL, LOST
from zfabric.testing.bench import FN, FUNCTION

ROW = TASK_NBYTES + 1000


def scheduler(**settings: int) -> Scheduler:
    made = Scheduler(Settings(**settings))  # type: ignore[arg-type]
    made.client_joined(1, "one", user="client:alice:1")
    made.client_joined(2, "two", user="client:alice:1")
    made.client_joined(3, "three", user="client:bob:2")
    return made


def submit(to: Scheduler, client: int, *counters: int, functions: bool = True) -> list[int]:
    """Submit rows of ROW bytes; returns the statuses of what was told."""
    ids = [task_id(client, n) for n in counters]
    known = [FUNCTION] if functions else []
    to.on_message(client, m.Submit(known, ids, [FN] * len(ids), [b"a" * 1000] * len(ids)), 0.0)
    said = [message for _, message in to.flush() if isinstance(message, m.Results)]
    invariants.check(to)
    return [status for results in said for status in results.statuses]


def test_what_a_session_may_not_keep_is_refused_and_release_makes_room() -> None:
    to = scheduler(session_bytes=10 * ROW)
    for n in range(9):
        assert submit(to, 1, n) == []
    assert submit(to, 1, 9, 10) == [FULL, FULL]
    assert len(to.tasks) == 9 and to.quota.refused == 2
    assert submit(to, 2, 1) == []  # another session's room is its own
    to.on_message(1, m.Release([task_id(1, 0), task_id(1, 1)]), 0.0)
    assert submit(to, 1, 11, functions=False) == []
    assert to.clients[1].task_nbytes == 8 * ROW
    to.on_message(1, m.Release([task_id(1, n) for n in (*range(2, 12),)]), 0.0)
    assert to.clients[1].task_nbytes == 0 and to.info()["refused"] == 2


def test_the_text_names_the_setting_and_what_to_do() -> None:
    to = scheduler(session_bytes=100)
    to.on_message(1, m.Submit([FUNCTION], [task_id(1, 1)], [FN], [b""]), 0.0)
    ((_, results),) = to.flush()
    assert isinstance(results, m.Results)
    (text,) = unpackb(results.payloads[0])
    assert "ZFABRIC_SESSION_BYTES" in text and "futures" in text


def test_functions_of_refused_rows_are_known_and_count_until_they_are_forgotten() -> None:
    to = scheduler(session_bytes=10 * ROW)
    big = b"x" * 20 * ROW
    to.on_message(1, m.Submit([(5, "f", big)], [task_id(1, 1)], [5], [b""]), 0.0)
    assert not to.tasks and to.clients[1].blob_nbytes == len(big)
    for n in range(m.MAX_FUNCTIONS + 1):
        to.on_message(1, m.Submit([(10 + n, "f", b"")], [], [], []), 0.0)
    assert to.clients[1].blob_nbytes == 0


def test_what_waits_for_a_refused_row_and_a_retry_of_it_end() -> None:
    to = scheduler(session_bytes=2 * ROW)
    assert submit(to, 1, 1, 2, 3) == [FULL] * 3
    row = m.Submit([], [task_id(1, 4)], [FN], [b""], [(0, [task_id(1, 3)])])
    to.on_message(1, row, 0.0)
    to.on_message(1, m.Retry([task_id(1, 3)]), 0.0)
    ((_, results),) = to.flush()
    assert isinstance(results, m.Results)
    assert list(results.statuses) == [LOST, FULL]
    invariants.check(to)


@pytest.mark.parametrize("setting", ["broker_bytes", "key_bytes"])
def test_sessions_together(setting: str) -> None:
    to = scheduler(**{setting: 4 * ROW + 500})
    assert submit(to, 1, 1, 2) == []
    assert submit(to, 2, 1, 2) == []
    assert submit(to, 2, 3) == [FULL]
    assert submit(to, 3, 1) == ([] if setting == "key_bytes" else [FULL])
    to.tick(1.0)
    assert submit(to, 1, 3) == [FULL]
    to.client_left(1)
    gc.collect()
    to.tick(2.0)
    assert submit(to, 2, 4) == []


def test_values_that_outlive_their_session_count() -> None:
    to = scheduler(broker_bytes=4 * ROW)
    assert submit(to, 1, 1) == []
    needs = m.Submit([FUNCTION], [task_id(2, 1)], [FN], [b""], [(0, [task_id(1, 1)])])
    to.on_message(2, needs, 0.0)
    to.client_left(1)
    to.tick(1.0)
    assert task_id(1, 1) in to.tasks and to.quota.nbytes > ROW + TASK_NBYTES
    to.client_left(2)
    gc.collect()
    to.tick(2.0)
    assert not to.tasks and to.quota.nbytes < TASK_NBYTES


def test_inputs_and_options_count() -> None:
    to = scheduler()
    assert submit(to, 1, 1) == []
    options = m.TaskOptions(key="k" * 1000)
    row = m.Submit([], [task_id(1, 2)], [FN], [b""], [(0, [task_id(1, 1)] * 50)], [(0, options)])
    before = to.clients[1].task_nbytes
    to.on_message(1, row, 0.0)
    assert to.clients[1].task_nbytes - before > TASK_NBYTES + 50 * 100 + 1000
    to.on_message(1, m.Release([task_id(1, 1), task_id(1, 2)]), 0.0)
    assert to.clients[1].task_nbytes == 0


def test_scattered_values_that_do_not_fit_are_freed() -> None:
    to = scheduler(session_bytes=3 * TASK_NBYTES)
    to.worker_joined(WorkerRecord(101, "w", 1), 0.0)
    ids = [task_id(1, n) for n in range(5)]
    to.on_message(1, m.Register(ids, [9] * 5, [[101]] * 5), 0.0)
    assert not to.tasks and to.flush() == [(101, m.Free(ids))]
    invariants.check(to)
