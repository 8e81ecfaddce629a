"""Who gets what: credit, the emptiest, the holder of the inputs, successors, resources."""

from __future__ import annotations

import pytest

from zfabric import messages as m
from zfabric.core import placer as placer_module
from zfabric.core.placement import EmptiestFirst, emptiest, fullness, signature
from zfabric.core.tasks import ASSIGNED, FAILED, READY, WAITING
from zfabric.messages import LOCAL, STORED, UNFIT, TaskOptions
from zfabric.testing.bench import FN, FUNCTION, Bench, Said, results, run, tid


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.client(1)
    return bench


def placed(said: Said) -> dict[int, list[int]]:
    """Worker -> counters of the tasks that it was sent."""
    found: dict[int, list[int]] = {}
    for number, message in said:
        if isinstance(message, m.Run):
            found.setdefault(number, []).extend(id_ & 0xFFFF for id_ in message.ids)
    return found


# --- Credit -------------------------------------------------------------------------------------


def test_no_worker_gets_more_rows_than_it_is_willing_to_hold(bench: Bench) -> None:
    bench.worker(101, credit=3)
    assert placed(bench.submit(*range(1, 11))) == {101: [1, 2, 3]}
    assert placed(bench.ended(1, credit=3)) == {101: [4]}
    assert placed(bench.ended(2, credit=5)) == {101: [5, 6, 7]}
    assert placed(bench.ended(3, 4, credit=1)) == {}
    assert placed(bench.ended(5, 6, 7, credit=1)) == {101: [8]}


def test_credit_alone_may_be_told(bench: Bench) -> None:
    bench.worker(101, credit=0)
    bench.submit(1)
    assert placed(bench.say(101, m.Done([], [], b"", [], 4))) == {101: [1]}


def test_a_new_worker_is_given_two_rows_per_slot_to_begin_with(bench: Bench) -> None:
    bench.worker(101, slots=3)
    assert len(placed(bench.submit(*range(1, 11)))[101]) == 6


def test_a_suspect_worker_gets_nothing_until_it_is_heard(bench: Bench) -> None:
    bench.worker(101)
    bench.scheduler.set_suspect(101, True)
    assert bench.submit(1) == []
    bench.scheduler.set_suspect(101, False)
    assert placed(bench.turn()) == {101: [1]}


# --- Where --------------------------------------------------------------------------------------


def test_rows_spread_by_slots(bench: Bench) -> None:
    bench.worker(101, slots=1, credit=9)
    bench.worker(102, slots=2, credit=9)
    counts = {number: len(rows) for number, rows in placed(bench.submit(*range(1, 10))).items()}
    assert counts == {101: 3, 102: 6}


def test_a_task_goes_to_its_large_input(bench: Bench) -> None:
    bench.worker(101, credit=3)
    bench.submit(1)
    bench.worker(102, credit=3)
    bench.stored(1)
    bench.submit(10)  # the emptiest: whoever it is, one is fuller now
    assert placed(bench.submit(2, deps={2: [1]})) == {101: [2]}


def test_unless_that_worker_is_much_fuller(bench: Bench) -> None:
    bench.worker(101, credit=9)
    bench.submit(1, 2, 3, 4, 5)
    bench.worker(102, credit=9)
    bench.hear(101, m.Done([tid(1)], [1], bytes([STORED]), [(1 << 20).to_bytes(8, "little")], 9))
    assert placed(bench.submit(6, deps={6: [1]})) == {102: [6]}


def test_small_inputs_draw_nobody(bench: Bench) -> None:
    bench.worker(101, credit=9)
    bench.submit(1, 2)
    bench.worker(102, credit=9)
    bench.stored(1, nbytes=100)
    assert placed(bench.submit(3, deps={3: [1]})) == {102: [3]}


def test_emptiest_first_follows_rows_as_they_are_added() -> None:
    bench = Bench()
    for number, slots in ((101, 1), (102, 4)):
        bench.worker(number, slots=slots, credit=10)
    workers = list(bench.scheduler.workers.values())
    order = EmptiestFirst(workers)
    taken = []
    for n in range(12):
        first = order.first()
        assert first is not None
        assert fullness(first) == min(map(fullness, workers))
        first.rows[n] = None  # type: ignore[assignment]
        taken.append(first.number)
    assert taken.count(102) > taken.count(101)
    assert emptiest([]) is None


# --- Order --------------------------------------------------------------------------------------


def test_priorities_before_age(bench: Bench) -> None:
    bench.submit(1, 2, 3, options={2: TaskOptions(priority=5), 3: TaskOptions(priority=-1)})
    bench.worker(101, credit=1)
    order = []
    said = bench.turn()
    for _ in range(3):
        (n,) = placed(said)[101]
        order.append(n)
        said = bench.ended(n, credit=1)
    assert order == [2, 1, 3]


def test_two_clients_take_turns(bench: Bench) -> None:
    bench.client(2)
    bench.submit(*range(1, 1001))
    bench.submit(1, client=2)
    bench.worker(101, credit=100)
    (run_,) = [message for _, message in bench.turn() if isinstance(message, m.Run)]
    owners = [id_ >> 40 for id_ in run_.ids]
    assert 2 in owners


# --- Successors ---------------------------------------------------------------------------------


def test_a_chain_is_sent_ahead_to_one_worker(bench: Bench) -> None:
    bench.worker(101, credit=5)
    bench.worker(102, credit=5)
    assert bench.submit(1, 2, 3, deps={2: [1], 3: [2]}) == [
        (
            101,
            m.Run([FUNCTION], [tid(1), tid(2), tid(3)], [1] * 3, [FN] * 3, [b"args"] * 3,
                  [(1, [(tid(1), LOCAL, 0)]), (2, [(tid(2), LOCAL, 0)])]),
        )
    ]  # fmt: skip
    assert bench.ended(1, 2, 3) == [(1, results(1, 2, 3))]


def test_a_join_waits_for_inputs_that_are_made_in_two_places(bench: Bench) -> None:
    bench.worker(101, credit=2)
    bench.worker(102, credit=2)
    assert placed(bench.submit(1, 2, 3, deps={3: [1, 2]})) == {101: [1], 102: [2]}
    assert bench.states(3) == [WAITING]
    assert placed(bench.ended(1)) == {102: [3]}  # the only one missing is made there


def test_a_fan_out_is_not_kept_where_it_begins(bench: Bench) -> None:
    bench.worker(101, credit=9)
    bench.worker(102, credit=9)
    fan = range(2, 8)
    said = bench.submit(1, *fan, deps={n: [1] for n in fan})
    assert placed(said) == {101: [1]}
    spread = placed(bench.ended(1, credit=9))
    assert sorted(map(len, spread.values())) == [3, 3]


def test_a_fan_out_of_a_lone_worker_goes_ahead(bench: Bench) -> None:
    bench.worker(101, credit=9)
    fan = range(2, 8)
    assert len(placed(bench.submit(1, *fan, deps={n: [1] for n in fan}))[101]) == 7


def test_a_successor_is_fenced_when_its_input_moves(bench: Bench) -> None:
    bench.worker(101, credit=2)
    bench.submit(1, 2, deps={2: [1]})
    assert bench.states(1, 2) == [ASSIGNED, ASSIGNED]
    bench.scheduler.workers[101].credit = 0
    bench.worker(102, credit=2)
    said = bench.say(101, m.Returned([tid(1), tid(2)], [1, 1], 0))
    assert placed(said) == {102: [1, 2]}
    assert bench.ended(2, attempt=1) == []
    assert bench.states(2) == [ASSIGNED]


def test_a_successor_whose_input_died_waits_again(bench: Bench) -> None:
    bench.worker(101, credit=2)
    bench.submit(1, 2, deps={2: [1]})
    bench.hear(101, m.Done([tid(1)], [1], bytes([m.DIED]), [b"\x91\xa0"], 0))
    bench.hear(101, m.Returned([tid(2)], [1], 0))
    assert bench.states(1, 2) == [READY, WAITING]
    assert placed(bench.say(101, m.Done([], [], b"", [], 2))) == {101: [1, 2]}


# --- Restrictions -------------------------------------------------------------------------------

GPU = TaskOptions(resources={"GPU": 1})


def test_resources_are_counted(bench: Bench) -> None:
    bench.worker(101, credit=9)
    bench.worker(102, credit=9, resources={"GPU": 2})
    said = bench.submit(1, 2, 3, options=dict.fromkeys((1, 2, 3), GPU))
    assert placed(said) == {102: [1, 2]}
    assert placed(bench.ended(1, worker=102, credit=9)) == {102: [3]}
    bench.ended(2, 3, worker=102, credit=9)
    assert bench.scheduler.workers[102].used == {"GPU": 0}


def test_resources_come_back_however_the_row_ends(bench: Bench) -> None:
    bench.worker(101, credit=9, resources={"GPU": 1})
    bench.submit(1, 2, 3, 4, options=dict.fromkeys((1, 2, 3, 4), GPU))
    assert placed(bench.ended(1, status=m.ERROR, credit=9)) == {101: [2]}
    assert placed(bench.cancel(2)) == {}  # it may still run: it is to be killed
    assert placed(bench.ended(2, status=m.CANCELLED, attempt=1, credit=9)) == {101: [3]}
    assert placed(bench.release(3)) == {}
    assert placed(bench.returned(3, attempt=1, credit=9)) == {101: [4]}
    assert placed(bench.returned(4, credit=9)) == {101: [4]}


def test_named_workers(bench: Bench) -> None:
    bench.worker(101, credit=9)
    bench.worker(102, credit=9)
    there = TaskOptions(workers=("worker-102",))
    assert placed(bench.submit(1, 2, options={1: there, 2: there})) == {102: [1, 2]}


def test_impossible_wishes_may_wait_for_a_worker_that_fits(bench: Bench) -> None:
    bench.client(1)
    bench.worker(101)
    bench.submit(1, options={1: TaskOptions(resources={"GPU": 1}, must_fit=False)})
    assert bench.tick(10.0) == []
    (text,) = bench.scheduler.info()["unfit"]
    assert "GPU" in text
    bench.worker(102, resources={"GPU": 1})
    assert [number for number, _ in bench.turn()] == [102]
    assert bench.scheduler.info()["unfit"] == []


def test_impossible_wishes_are_refused_once_the_fabric_has_settled(bench: Bench) -> None:
    bench.submit(1, 2, options={1: GPU, 2: TaskOptions(workers=("nobody",))})
    assert bench.tick(10) == []  # no workers at all: they may be on their way
    bench.worker(101)
    assert bench.tick(0.5) == []
    (number, end), *rest = bench.tick(1.0)
    assert (number, rest) == (1, [])
    assert isinstance(end, m.Results)
    assert end.statuses == bytes([UNFIT, UNFIT])
    assert b"GPU" in end.payloads[0] and b"worker-101" in end.payloads[0]
    assert b"nobody" in end.payloads[1]
    assert bench.states(1, 2) == [FAILED, FAILED]
    bench.release(1, 2)
    assert not bench.scheduler.tasks


def test_a_wish_that_only_a_full_worker_can_grant_waits(bench: Bench) -> None:
    bench.worker(101, credit=9, resources={"GPU": 1})
    bench.submit(1, 2, options={1: GPU, 2: GPU})
    assert bench.tick(100) == []
    assert bench.states(1, 2) == [ASSIGNED, READY]


def test_signature() -> None:
    assert signature(TaskOptions(priority=3)) is None
    assert signature(TaskOptions(resources={"a": 1, "b": 2})) == signature(
        TaskOptions(resources={"b": 2, "a": 1}, key="x")
    )


# --- Recall -------------------------------------------------------------------------------------


def test_rows_behind_a_long_one_are_recalled_for_an_idle_worker(bench: Bench) -> None:
    bench.worker(101, credit=4)
    bench.submit(1, 2, 3)
    bench.worker(102)
    bench.turn()
    assert bench.tick(0.01) == []  # it may still be about to report
    assert bench.scheduler.has_surplus()
    assert bench.tick(0.1) == [(101, m.Recall([tid(3)]))]
    assert bench.tick(0.1) == []  # once until it is answered
    assert placed(bench.returned(3, credit=1)) == {102: [3]}
    bench.ended(3, worker=102, credit=1)
    assert bench.tick(0.1) == [(101, m.Recall([tid(2)]))]
    assert bench.say(101, m.Returned([], [], 1)) == []


def test_no_recall_while_all_are_busy_or_alone(bench: Bench) -> None:
    bench.worker(101, credit=4)
    bench.submit(1, 2, 3, 4)
    assert bench.tick(5) == []
    bench.worker(102, credit=1)
    bench.submit(5)
    assert bench.tick(5) == []


# --- Functions ----------------------------------------------------------------------------------


def one(client: int, number: int, fn: int, functions: bool = True) -> m.Submit:
    blob = [(fn, f"f{fn}", b"blob %d" % fn)] if functions else []
    return m.Submit(blob, [tid(number, client)], [fn], [b"args"])


def test_both_ends_forget_the_oldest_function_of_a_session(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(m, "MAX_FUNCTIONS", 3)
    for n in range(1, 5):
        bench.say(1, one(1, n, n))
    assert list(bench.scheduler.clients[1].functions) == [2, 3, 4]
    # Sent again, it is the newest, and the oldest goes.
    bench.say(1, one(1, 5, 2))
    bench.say(1, one(1, 6, 9))
    assert list(bench.scheduler.clients[1].functions) == [4, 2, 9]
    bench.worker(101, credit=20)
    (run_,) = [message for _, message in bench.turn() if isinstance(message, m.Run)]
    # Tasks keep the functions that they need, known to the session or not.
    assert sorted(fn for fn, _, _ in run_.functions) == [1, 2, 3, 4, 9]


def test_a_worker_forgets_the_oldest_function_but_not_before_its_rows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placer_module, "MAX_KNOWN", 2)
    bench.worker(101, credit=20)
    bench.say(1, one(1, 1, 1))
    for n, fn in ((2, 1), (3, 2), (4, 3)):
        bench.hear(1, one(1, n, fn))
    said = bench.turn()
    assert [type(message) for _, message in said] == [m.Run, m.Forget]
    assert said[1] == (101, m.Forget([1]))
    assert list(bench.scheduler.workers[101].known) == [2, 3]


def test_a_function_needed_again_in_the_turn_that_would_forget_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placer_module, "MAX_KNOWN", 2)
    bench.worker(101, credit=20)
    known: set[int] = set()
    number = 0
    for fns in ([1, 2, 3, 1], [1], [2, 3, 2], [1, 2, 3, 4, 1, 2]):
        for fn in fns:
            number += 1
            bench.hear(1, one(1, number, fn))
        for _, message in bench.turn():
            if isinstance(message, m.Run):
                known.update(fn for fn, _, _ in message.functions)
                assert known.issuperset(message.fns), "a row calls what the worker does not have"
            elif isinstance(message, m.Forget):
                known.difference_update(message.fns)
        assert known == set(bench.scheduler.workers[101].known)


def test_large_functions_go_ahead_one_by_one(bench: Bench) -> None:
    bench.worker(101, credit=20)
    size = bench.scheduler.settings.batch_bytes // 2 + 1
    blobs = [(n, f"f{n}", bytes([n]) * size) for n in (1, 2)]
    bench.hear(1, m.Submit([blobs[0]], [tid(1)], [1], [b"args"]))
    bench.hear(1, m.Submit([blobs[1]], [tid(2)], [2], [b"args"]))
    said = bench.turn()
    assert said == [
        (101, m.Run([blobs[0]], [], [], [], [], [])),
        (101, m.Run([blobs[1]], [], [], [], [], [])),
        (101, m.Run([], [tid(1), tid(2)], [1, 1], [1, 2], [b"args"] * 2, [])),
    ]


def test_large_turns_are_cut_into_messages(bench: Bench) -> None:
    bench.worker(101, credit=4096)
    n = bench.scheduler.settings.batch_rows
    bench.submit(1)
    said = bench.submit(*range(2, 10), payload=b"x" * 300_000)
    assert [len(message.ids) for _, message in said] == [3, 3, 2]  # type: ignore[union-attr]
    assert run(1) is not None and n == 4096


def test_amounts_that_were_given_back_are_all_there_again(bench: Bench) -> None:
    """0.1 + 0.2 + 0.3 - 0.1 - 0.2 - 0.3 is not 0 in floating point."""
    bench.worker(101, credit=20, resources={"GPU": 1.0})
    for n, amount in enumerate((0.1, 0.2, 0.3), 1):
        bench.say(1, one_asking(n, {"GPU": amount}))
    bench.turn()
    for n in (1, 2, 3):
        bench.say(101, m.Done([tid(n)], [1], bytes([m.VALUE]), [b"v"], 20))
    bench.say(1, one_asking(4, {"GPU": 1.0}))
    assert tid(4) in bench.scheduler.workers[101].rows


def test_rows_that_no_idle_worker_may_run_are_not_asked_back(bench: Bench) -> None:
    bench.worker(101, credit=20)
    bench.worker(102, credit=20)
    name = bench.scheduler.workers[101].name
    for n in (1, 2, 3, 4, 5):
        bench.say(1, one_asking(n, {}, workers=(name,)))
    bench.turn()
    assert len(bench.scheduler.workers[101].rows) == 5
    assert bench.tick(10.0) == []


def one_asking(number: int, resources: dict[str, float], workers: tuple[str, ...] = ()) -> m.Submit:
    options = [(0, m.TaskOptions(resources=resources, workers=workers))]
    return m.Submit([(1, "f", b"blob")], [tid(number)], [1], [b"args"], (), options)


def test_a_task_whose_inputs_no_message_can_name_ends_with_a_sentence(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placer_module, "MANY_INPUTS", 3)
    monkeypatch.setattr(placer_module, "MAX_WAYS_NBYTES", 100)
    bench.worker(101, credit=20)
    for n in range(1, 6):
        bench.say(1, one_asking(n, {}))
    bench.turn()
    bench.stored(1, 2, 3, 4, 5)
    inputs = [tid(n) for n in range(1, 6)]
    said = bench.say(1, m.Submit([], [tid(6)], [1], [b"args"], [(0, inputs)]))
    said = said or bench.turn()
    (results,) = [message for _, message in said if isinstance(message, m.Results)]
    assert results.statuses == bytes([m.UNFIT]) and b"tree of tasks" in results.payloads[0]


def test_priority_counts_among_tasks_that_only_some_may_run(bench: Bench) -> None:
    bench.worker(101, credit=1, resources={"GPU": 1.0})
    bench.say(1, one_asking(1, {"GPU": 1.0}))
    for n, priority in ((2, 0), (3, 5)):
        options = [(0, m.TaskOptions(priority=priority, resources={"GPU": 1.0}))]
        bench.say(1, m.Submit([], [tid(n)], [1], [b"args"], (), options))
    bench.say(101, m.Done([tid(1)], [1], bytes([m.VALUE]), [b"v"], 1))
    assert list(bench.scheduler.workers[101].rows) == [tid(3)]
