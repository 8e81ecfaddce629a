"""Named runs at the broker's machine: who may hold one, and what stays of it."""

from __future__ import annotations

from typing import Any

import pytest
from msgpack import unpackb

from tests.unit.broker_house import SETTINGS, House, Peer
from zfabric import messages as m
from zfabric.core.runs import MARGIN
from zfabric.ids import MAX_COUNTER, task_id
from zfabric.testing.bench import FN, FUNCTION


@pytest.fixture
def house() -> House:
    return House()


def submit(peer: Peer, counter: int, key: str = "") -> int:
    id_ = task_id(peer.number, counter)
    options = [(0, m.TaskOptions(key=key, must_fit=False))] if key else []
    peer.say(m.Submit([FUNCTION], [id_], [FN], [b""], (), options))
    return id_


def ask(peer: Peer, what: str, text: str = "") -> Any:
    (answer,) = (x for x in peer.say(m.Ask(7, what, (), text)) if isinstance(x, m.Answer))
    return unpackb(answer.payload)


def test_a_run_goes_from_hand_to_hand(house: House) -> None:
    first = house.peer(1, run="night").greet()
    assert first.welcome is not None and not first.welcome.resumed
    named = submit(first, 0, "a")
    submit(first, 1)
    needed = submit(first, 2)
    taker = task_id(first.number, 3)
    options = [(0, m.TaskOptions(key="b", must_fit=False))]
    first.say(m.Submit([], [taker], [FN], [b""], [(0, [needed])], options))
    first.say(m.Bye("closed"))
    assert sorted(house.machine.scheduler.tasks) == [named, needed, taker]
    assert house.machine.runs.listed("", house.now)[0]["holder"] == ""
    second = house.peer(2, run="night", name="two").greet()
    assert second.welcome is not None and second.welcome.resumed
    assert second.number == first.number and second.welcome.counter == 4 + MARGIN
    assert ask(second, "run") == [[named, "a", FN], [taker, "b", FN]]
    assert ask(second, "run", str(named)) == [[taker, "b", FN]]
    second.say(m.Release([named, taker]))
    assert not house.machine.scheduler.tasks
    second.say(m.Bye("closed"))
    third = house.peer(3, run="night").greet()
    assert third.welcome is not None and third.welcome.counter > second.welcome.counter


def test_a_run_is_not_taken_while_its_holder_may_come_back(house: House) -> None:
    first = house.peer(1, run="night", name="one").greet()
    submit(first, 0, "a")
    house.machine.gone(first.link, house.now)
    late = house.peer(2, run="night", name="two")
    assert late.say(late.hello) == [], "neither yes nor no: it says Hello again"
    house.pass_time(SETTINGS.grace_s + 0.1)
    late.greet()
    assert late.welcome is not None and late.number == first.number


def test_a_held_run_is_refused_and_a_silent_holder_taken_over(house: House) -> None:
    first = house.peer(1, run="night", name="one").greet()
    named = submit(first, 0, "a")
    late = house.peer(2, run="night")
    (refusal,) = late.say(late.hello)
    assert isinstance(refusal, m.Refuse) and refusal.code == "run" and "'one'" in refusal.text
    house.pass_time(SETTINGS.suspect_s + 1)
    second = house.peer(3, run="night", name="two").greet()
    assert second.number == first.number
    first.session.tick(house.now)
    first.push()
    house.deliver()
    before = len(house.machine.scheduler.tasks)
    first.session.post(m.Release([named]))
    first.push()
    house.deliver(first)
    assert len(house.machine.scheduler.tasks) == before, "a fenced holder was heard"
    assert any(isinstance(x, m.Refuse) and x.code == "unknown" for x in first.heard)


def test_a_holder_comes_back_after_its_lease(house: House) -> None:
    first = house.peer(1, run="night").greet()
    submit(first, 0, "a")
    house.machine.gone(first.link, house.now)
    house.pass_time(SETTINGS.lease_s + SETTINGS.dead_s + 1)
    assert list(house.machine.runs.parked) == [1]
    first.redial()
    first.push()
    house.deliver()
    assert any(isinstance(x, m.Refuse) and x.code == "epoch" for x in first.heard)
    first.session.pause()
    hello = first.hello._replace(previous=1, acked=first.session.acked)
    first.session.post(hello)
    first.push()
    first.session.go_on()
    house.deliver(first)
    assert not house.machine.runs.parked
    assert first.welcome is not None and first.welcome.resumed
    assert [key for _, key, _ in ask(first, "run")] == ["a"]


def test_a_run_ends_when_asked_to(house: House) -> None:
    first = house.peer(1, run="night", name="one").greet()
    submit(first, 0, "a")
    other = house.peer(2).greet()
    assert "held by client 'one'" in ask(other, "end run", "night")
    assert "no run 'day'" in ask(other, "end run", "day")
    first.say(m.Bye("closed"))
    assert ask(other, "end run", "night") == ""
    assert not house.machine.scheduler.tasks and not house.machine.runs.by_name
    assert ask(other, "runs") == []
    again = house.peer(3, run="night").greet()
    submit(again, 0, "a")
    assert ask(again, "end run", "night") == ""
    again.say(m.Bye("closed"))
    assert not house.machine.scheduler.tasks and not house.machine.runs.by_name
    assert MARGIN < MAX_COUNTER >> 16, "so many holders a run may have"


def test_a_run_that_nobody_holds_has_no_locks_after_a_restart_either() -> None:
    house = House(saved=[])
    holder = house.peer(1, run="nightly").greet()
    other = house.peer(2).greet()
    holder.say(m.Acquire(1, "a", True))
    other.say(m.Acquire(1, "a", True))
    house.deliver()
    holder.say(m.Bye(""))
    assert other.heard[-1] == m.Locked(1, True)
    assert house.machine.journal is not None
    for entries in (house.machine.journal.take(), list(house.machine.snapshot())):
        again = House(saved=entries)
        assert again.machine.locks.requests() == [("a", other.number, 1)]


def test_an_answer_to_the_holder_before_is_not_for_the_next_one(house: House) -> None:
    first = house.peer(1, run="night").greet()
    worker = house.peer(9, m.WORKER, slots=1).greet()
    worker.say(m.Done([], [], b"", [], 1))
    named = submit(first, 0, "a")
    assert not [x for x in first.say(m.Ask(7, "why", [named], "")) if isinstance(x, m.Answer)]
    (explain,) = (x for x in worker.heard if isinstance(x, m.Explain))
    first.say(m.Bye("closed"))
    second = house.peer(2, run="night").greet()
    worker.say(m.Explained(explain.ticket, [named], ["running"], ["it runs"]))
    house.deliver()
    assert not [x for x in second.heard if isinstance(x, m.Answer)]


def test_a_run_that_its_holder_ended_is_over_for_the_next_broker_too() -> None:
    """Though the holder's Bye was lost with this one."""
    house = House(saved=[])
    holder = house.peer(1, run="night").greet()
    submit(holder, 0, "a")
    assert ask(holder, "end run", "night") == ""
    assert house.machine.journal is not None
    for entries in (house.machine.journal.take(), list(house.machine.snapshot())):
        again = House(saved=entries)
        assert not again.machine.runs.by_name
        assert [record.hello.run for record in again.machine.sessions.values()] == [""]
