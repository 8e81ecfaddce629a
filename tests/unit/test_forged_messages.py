"""Peers who speak of the tasks of others, within a session of their own: that changes none."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from tests.unit.broker_house import House, Peer
from zfabric import messages as m
from zfabric.core.invariants import check
from zfabric.core.tasks import DONE
from zfabric.ids import COUNTER_BITS

N_TASKS = 12


class Scene:
    """A client whose tasks run, wait and have ended at its worker, and two others who forge."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.house = House()
        self._token = 10
        self.victim = self.join(m.CLIENT)
        self.worker = self.join(m.WORKER, name="good", slots=2)
        self.worker.say(m.Done([], [], b"", [], 8))
        first = self.victim.number << COUNTER_BITS
        self.ids = list(range(first, first + N_TASKS))
        n = N_TASKS
        needs = [(n - 1, [self.ids[n - 2]])]
        only_there = [(row, m.TaskOptions(workers=("good",))) for row in range(n)]
        self.victim.say(
            m.Submit([(1, "f", b"blob")], self.ids, [1] * n, [b""] * n, needs, only_there)
        )
        self.house.deliver()
        self.rows = {
            id_: attempt
            for run in self.worker.heard
            if isinstance(run, m.Run)
            for id_, attempt in zip(run.ids, run.attempts, strict=True)
        }
        self.end(self.ids[0], m.VALUE, b"right")
        self.end(self.ids[1], m.STORED, (1000).to_bytes(8, "little"))
        self.forgers = {m.CLIENT: self.join(m.CLIENT), m.WORKER: self.join(m.WORKER, name="bad")}

    def join(self, role: str, **hello: object) -> Peer:
        self._token += 1
        peer = self.house.peer(self._token, role, **hello).greet()
        peer.say()
        return peer

    def end(self, id_: int, status: int, payload: bytes) -> None:
        row = [id_], [self.rows[id_]], bytes([status]), [payload]
        self.worker.say(m.Done(*row, credit=8))
        self.house.deliver()

    def forge(self, role: str) -> None:
        """Say something about anybody's tasks. Who is turned out for it comes again."""
        if self.forgers[role].number not in self.house.machine.by_number:
            self.forgers[role] = self.join(role, name="bad" if role == m.WORKER else "")
        peer, pick = self.forgers[role], self.random.choice
        own = [peer.number << COUNTER_BITS | n for n in range(3)]
        ids = [pick([*self.ids, *own, 0, (1 << 64) - 1]) for _ in range(pick([1, 2, 4]))]
        n = len(ids)
        attempts = [pick([0, 1, 2, 1 << 32, *self.rows.values()]) for _ in ids]
        somebody = pick([self.victim, self.worker, peer]).number
        options = [(0, m.TaskOptions(priority=1 << 31, workers=("good",)))]
        by_client: list[Callable[[], m.Message]] = [
            lambda: m.Release(ids),
            lambda: m.Cancel(ids),
            lambda: m.Retry(ids),
            lambda: m.Register(ids, [pick([0, 1 << 46])] * n, [[somebody]] * n),
            lambda: m.Submit([(5, "g", b"")], ids, [pick([1, 5])] * n, [b""] * n, (), options),
            lambda: m.Ask(1, pick(["cancel_waiting", "locate", "why", "end run"]), ids, "good"),
            lambda: m.Relay(somebody, (b"not", b"ours")),
        ]
        by_worker: list[Callable[[], m.Message]] = [
            lambda: m.Done(
                ids, attempts, bytes(pick(range(m.N_STATUSES)) for _ in ids), [b"forged!!"] * n, 99
            ),
            lambda: m.Returned(ids, attempts, pick([0, 1 << 40])),
            lambda: m.Output(ids, attempts, [0] * n, [b"forged"] * n),
            lambda: m.Relay(somebody, (b"not", b"ours")),
        ]
        # Now and then what only the other role may say.
        usual, others = (by_client, by_worker) if role == m.CLIENT else (by_worker, by_client)
        peer.say(pick(others if self.random.random() < 0.1 else usual)())


@pytest.mark.parametrize("seed", range(150))
def test_who_speaks_of_the_tasks_of_others_changes_none(seed: int) -> None:
    scene = Scene(seed)
    for _ in range(scene.random.randrange(1, 25)):
        scene.forge(scene.random.choice([m.CLIENT, m.WORKER]))
        scene.house.now += 0.01
        check(scene.house.machine.scheduler)
    for id_ in scene.ids[2:]:
        scene.house.deliver()
        for run in scene.worker.heard:
            if isinstance(run, m.Run):
                scene.rows.update(zip(run.ids, run.attempts, strict=True))
        scene.end(id_, m.VALUE, b"right")
    results = {
        id_: (status, payload)
        for message in scene.victim.heard
        if isinstance(message, m.Results)
        for id_, status, payload in zip(
            message.ids, message.statuses, message.payloads, strict=True
        )
    }
    assert results.pop(scene.ids[1])[0] == m.STORED
    assert results == {id_: (m.VALUE, b"right") for id_ in scene.ids if id_ != scene.ids[1]}
    assert len(set(scene.rows.values())) == 1, "one of them ran again"


def test_whoever_cannot_find_the_value_of_another_does_not_have_it_made_again() -> None:
    scene = Scene(0)
    stored = scene.ids[1]
    forger = scene.forgers[m.CLIENT]
    for request in range(20):
        forger.say(m.Ask(request, "locate", [stored]))
    task = scene.house.machine.scheduler.tasks[stored]
    assert task.state == DONE and task.holders
    told = [said for said in forger.heard if isinstance(said, m.Results)]
    assert [said.statuses for said in told] == [bytes([m.LOST])] * 20
