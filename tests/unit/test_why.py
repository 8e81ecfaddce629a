"""Every unfinished task has a reason: what the broker says of each state, what a worker adds."""

from __future__ import annotations

import pytest
from msgpack import unpackb

from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core.explain import explain
from zfabric.core.questions import WORD_S, Questions
from zfabric.core.supervisor import Supervisor
from zfabric.core.supervisor_effects import StartSlot
from zfabric.core.why import Reason, reasons
from zfabric.testing.bench import Bench, tid


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.client(1)
    return bench


def why(bench: Bench, number: int, silent_s: float = 0.0) -> list[Reason]:
    return reasons(bench.scheduler.placer, bench.task(number), lambda _: silent_s)


def test_without_workers(bench: Bench) -> None:
    bench.submit(1)
    ((code, text),) = why(bench, 1)
    assert code == "no workers"
    assert "zfabric worker" in text


def test_after_a_restart_the_workers_are_waited_for(bench: Bench) -> None:
    bench.worker(101)
    bench.scheduler.settling = True
    bench.submit(1)
    ((code, text),) = why(bench, 1)
    assert code == "settling"
    assert "before the restart" in text


def test_all_slots_are_busy(bench: Bench) -> None:
    bench.worker(101, credit=1)
    bench.submit(1, 2, 3)
    ((code, text),) = why(bench, 3)
    assert code == "saturated"
    assert "1 rows" in text and "1 other" in text


def test_no_worker_fits(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1, options={1: m.TaskOptions(resources={"GPU": 1})})
    ((code, text),) = why(bench, 1)
    assert code == "no fit"
    assert "GPU" in text


def test_the_resource_is_in_use(bench: Bench) -> None:
    bench.worker(101, credit=4, resources={"GPU": 1})
    bench.submit(1, options={1: m.TaskOptions(resources={"GPU": 1})})
    bench.submit(2, options={2: m.TaskOptions(resources={"GPU": 1})})
    ((code, text),) = why(bench, 2)
    assert code == "resources"
    assert "1 of 1 GPU" in text


def test_it_is_with_a_worker_that_is_silent(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    assert why(bench, 1)[0][0] == "assigned"
    bench.scheduler.set_suspect(101, True)
    ((code, text),) = why(bench, 1, silent_s=7.25)
    assert code == "suspect"
    assert "7.2 s" in text


def test_inputs_are_missing_and_why_the_first_of_them_is(bench: Bench) -> None:
    bench.submit(1)
    bench.submit(2, deps={2: [1]})
    bench.submit(3, deps={3: [2]})
    first, second = why(bench, 3)
    assert first[0] == "inputs" and "1 of 1 inputs" in first[1]
    assert second[0] == "no workers" and bench.task(1).name in second[1]


def test_an_ended_one(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    bench.ended(1)
    assert why(bench, 1) == [("ended", "it has finished")]


class Desk:
    """Questions over a bench; time is at hand."""

    def __init__(self, bench: Bench) -> None:
        self.questions = Questions(bench.scheduler)
        self.now = 50.0

    def ask(self, *ids: int, text: str = "") -> list[tuple[int, m.Message]]:
        question = m.Ask(7, "why", ids, text)
        return self.questions.why(1, question, lambda _: 0.0, self.now)


def stories(said: list[tuple[int, m.Message]]) -> dict[int, list[str]]:
    ((client, answer),) = said
    assert client == 1
    assert isinstance(answer, m.Answer) and answer.request == 7
    return {s["id"]: [code for code, _ in s["reasons"]] for s in unpackb(answer.payload)}


def test_what_no_worker_has_is_answered_at_once(bench: Bench) -> None:
    bench.submit(1)
    assert stories(Desk(bench).ask(tid(1), tid(9))) == {
        tid(1): ["no workers"],
        tid(9): ["unknown"],
    }


def test_the_worker_that_has_it_is_asked(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    desk = Desk(bench)
    assert desk.ask(tid(1)) == [(101, m.Explain(1, [tid(1)]))]
    word = m.Explained(1, [tid(1)], ["running"], ["runs in slot 1"])
    assert desk.questions.explained(999, word) == []
    assert stories(desk.questions.explained(101, word)) == {tid(1): ["assigned", "running"]}
    assert desk.questions.explained(101, word) == []
    assert desk.questions.wake_at() is None


def test_a_worker_that_says_nothing_is_an_answer(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    desk = Desk(bench)
    desk.ask(tid(1))
    assert desk.questions.tick(desk.now) == []
    until = desk.questions.wake_at()
    assert until == desk.now + WORD_S
    assert stories(desk.questions.tick(until)) == {tid(1): ["assigned", "silent"]}


def test_a_worker_that_is_lost_meanwhile_is_an_answer(bench: Bench) -> None:
    bench.worker(101)
    bench.submit(1)
    desk = Desk(bench)
    desk.ask(tid(1))
    assert stories(desk.questions.worker_left(101)) == {tid(1): ["assigned", "lost"]}


def test_tasks_are_found_by_name(bench: Bench) -> None:
    bench.submit(1, options={1: m.TaskOptions(key="load-17")})
    bench.submit(2)
    desk = Desk(bench)
    assert stories(desk.ask(text="load-17")).keys() == {tid(1)}
    assert stories(desk.ask(text="f-2")).keys() == {tid(2)}
    assert stories(desk.ask(text="load")) == {}


# --- at the worker --------------------------------------------------------------------------------

FUNCTION = (5, "f", b"blob")


def supervisor(*, started: bool = True) -> Supervisor:
    machine = Supervisor(1, settings=Settings(), now=10.0)
    for effect in machine.effects(10.0):
        if started and isinstance(effect, StartSlot):
            machine.slot_started(effect.slot, 10.0)
    return machine


def give(machine: Supervisor, *ids: int, deps: list[tuple[int, list[m.Dependency]]] = ()) -> None:
    n = len(ids)
    machine.run(m.Run([FUNCTION], ids, [1] * n, [5] * n, [b""] * n, deps))
    machine.effects(10.0)


def codes(machine: Supervisor, *ids: int, now: float = 12.5) -> list[tuple[str, str]]:
    said = explain(machine, m.Explain(3, ids), now)
    assert said.ticket == 3 and list(said.ids) == list(ids)
    return list(zip(said.codes, said.texts, strict=True))


def test_rows_in_a_slot() -> None:
    machine = supervisor()
    give(machine, 1, 2)
    first, second = codes(machine, 1, 2)
    assert first[0] == "running" and "2.5 s" in first[1]
    assert second[0] == "behind" and "2.5 s" in second[1]


def test_rows_before_any_slot_is_there() -> None:
    machine = supervisor(started=False)
    give(machine, 1)
    assert codes(machine, 1)[0][0] == "in line"


def test_rows_at_a_worker_whose_memory_is_full() -> None:
    machine = supervisor()
    machine.set_full(True)
    give(machine, 1)
    assert codes(machine, 1)[0][0] == "memory"


def test_rows_that_wait_for_values() -> None:
    machine = supervisor()
    give(machine, 1)
    remote: list[m.Dependency] = [(77, m.REMOTE, [9, [[2, "ipc://there"]]])]
    give(machine, 2, deps=[(0, remote)])
    give(machine, 3, deps=[(0, [(1, m.LOCAL, 9), (2, m.LOCAL, 9)])])
    (moving, here) = codes(machine, 2, 3)
    assert moving[0] == "transfer" and "4d" in moving[1]
    assert here[0] == "inputs" and "2 values" in here[1]


def test_rows_that_are_not_there() -> None:
    assert codes(supervisor(), 4)[0][0] == "passing"
