"""Sessions and keys: which role a key may have, whose a session is, what revoking ends."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.test_broker_machine import SETTINGS, House, Peer
from zfabric import messages as m
from zfabric.core.admission import Admission, user_text

ADA, BOB, WORKER = (
    user_text("client", "ada", "1"),
    user_text("client", "bob", "2"),
    user_text("worker", "w", "3"),
)
KEYS = (b"a" * 32, b"b" * 32, b"w" * 32)


class KeyedHouse(House):
    """A broker with keys; `users` says who sits behind which connection."""

    def __init__(self) -> None:
        self.users: dict[bytes, str] = {}
        super().__init__(admission=Admission(lambda link: self.users.get(link, ""), 2))
        self.admit(ADA, BOB, WORKER)

    def admit(self, *users: str) -> None:
        self.machine.admit(frozenset(users), KEYS[: len(users)], self.now)

    def as_user(self, user: str, token: int, role: str = m.CLIENT, **hello: Any) -> Peer:
        peer = self.peer(token, role, **hello)
        self.users[peer.link] = user
        return peer.greet()

    def refusals(self) -> list[str]:
        return [message.code for _, message in self.strangers if isinstance(message, m.Refuse)]


@pytest.fixture
def house() -> KeyedHouse:
    return KeyedHouse()


def codes(peer: Peer) -> list[str]:
    return [message.code for message in peer.heard if isinstance(message, m.Refuse)]


def test_roles(house: KeyedHouse) -> None:
    assert house.as_user(ADA, 1).welcome
    assert house.as_user(WORKER, 2, m.WORKER, slots=1).welcome
    assert house.as_user(WORKER, 3).welcome  # tasks submit tasks
    liar = house.as_user(ADA, 4, m.WORKER, slots=1)
    assert liar.welcome is None
    assert codes(liar) == ["role"]
    stranger = house.as_user("", 5)
    assert codes(stranger) == ["key"]
    assert len(house.machine.sessions) == 3


def test_workers_are_told_whom_to_admit(house: KeyedHouse) -> None:
    worker = house.as_user(WORKER, 1, m.WORKER, slots=1)
    client = house.as_user(ADA, 2)
    assert m.Admit(KEYS) in worker.heard
    house.admit(ADA, WORKER)
    house.deliver()
    assert worker.heard[-1] == m.Admit(KEYS[:2])
    assert not any(isinstance(message, m.Admit) for message in client.heard)
    before = len(worker.heard)
    house.admit(ADA, WORKER)  # no change, no word
    assert house.deliver(worker) == []
    assert len(worker.heard) == before


def test_revoking_ends_the_sessions_of_that_key_alone(house: KeyedHouse) -> None:
    ada, bob = house.as_user(ADA, 1), house.as_user(BOB, 2)
    house.admit(BOB, WORKER)
    house.deliver()
    assert codes(ada) == ["key"]
    assert codes(bob) == []
    assert list(house.machine.sessions) == [2]
    again = house.as_user(ADA, 3)
    assert codes(again) == ["key"]


def test_a_token_is_worth_nothing_to_another_key(house: KeyedHouse) -> None:
    ada = house.as_user(ADA, 1)
    thief = house.peer(1, m.CLIENT)  # the same token
    thief.link = b"elsewhere"
    house.users[thief.link] = BOB
    thief.greet()
    assert thief.welcome is None
    record = house.machine.sessions[1]
    assert record.peer == ada.link
    assert house.machine.counts["bad:other-key"] == 1


def test_a_key_has_so_many_sessions_and_no_more(house: KeyedHouse) -> None:
    first, _ = house.as_user(ADA, 1), house.as_user(ADA, 2)
    assert codes(house.as_user(ADA, 3)) == ["sessions"]
    assert house.as_user(BOB, 4).welcome
    first.say(m.Bye())
    assert house.as_user(ADA, 5).welcome


def test_settings_say_how_many() -> None:
    assert SETTINGS.sessions_per_key == 4096
