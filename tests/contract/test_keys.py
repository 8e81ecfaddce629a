"""Keys on real sockets: who comes in, who does not, and that nobody does when nobody looks."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from zfabric.keys import KeyPair
from zfabric.testing.chaos import CALM, ChaosProxy, Weather
from zfabric.transport import Channel, Listener, Poller, connect, listen, zap
from zfabric.transport.contract import OTHER_KEYS, REFUSED_KEY
from zfabric.transport.curve import ClientKeys, ServerKeys

WaitUntil = Callable[..., Any]


class Door:
    """A listener with keys, the users that it admits, and its dialling ends."""

    def __init__(self) -> None:
        self.pair = KeyPair.new()
        self.users: dict[bytes, str] = {}
        self.keys = ServerKeys(
            self.pair.public, self.pair.secret, self.admit, lambda u: u in self.users.values()
        )
        self.listener: Listener = listen("tcp://127.0.0.1:0", security=self.keys)
        self.channels: list[Channel] = []
        self.heard: list[tuple[str, list[bytes]]] = []
        self.peers: list[bytes] = []

    def admit(self, key: bytes) -> str:
        return self.users.get(key, "")

    def dial(self, own: KeyPair | None, server: bytes | None = None) -> Channel:
        return self.dial_at(self.listener.address, own, server)

    def dial_at(self, address: str, own: KeyPair | None, server: bytes | None = None) -> Channel:
        security = own and ClientKeys(server or self.pair.public, own.public, own.secret)
        channel = connect(address, security=security)
        self.channels.append(channel)
        return channel

    def turn(self, channel: Channel, text: bytes = b"hello") -> str:
        """One exchange; the user when the message came, or the channel's trouble."""
        channel.send([text])
        poller = Poller()
        poller.add(channel)
        poller.add(self.listener)
        poller.wait(0.05)
        channel.recv()
        while (item := self.listener.recv()) is not None:
            if item[1]:
                self.peers.append(item[0])
                self.heard.append((self.listener.user_of(item[0]), item[1]))
        return self.heard[-1][0] if self.heard else channel.trouble

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        self.listener.close()
        self.keys.close()


@pytest.fixture
def door(leaves_nothing: None) -> Iterator[Door]:
    door = Door()
    yield door
    door.close()


def test_an_admitted_key_comes_in_with_its_name(door: Door, wait_until: WaitUntil) -> None:
    own = KeyPair.new()
    door.users[own.public] = "client:ada"
    channel = door.dial(own)
    assert wait_until(lambda: door.turn(channel)) == "client:ada"
    assert door.heard[-1] == ("client:ada", [b"hello"])
    assert channel.trouble == ""


def test_an_unknown_key_is_told_so(door: Door, wait_until: WaitUntil) -> None:
    channel = door.dial(KeyPair.new())
    assert wait_until(lambda: door.turn(channel)) == REFUSED_KEY
    assert not door.heard


def test_another_brokers_key_and_no_key_come_to_nothing(door: Door, wait_until: WaitUntil) -> None:
    own = KeyPair.new()
    door.users[own.public] = "client:ada"
    for channel in (door.dial(own, server=KeyPair.new().public), door.dial(None)):
        assert wait_until(lambda channel=channel: door.turn(channel)) == OTHER_KEYS
    assert not door.heard


def test_a_key_does_not_talk_to_a_listener_without(wait_until: WaitUntil) -> None:
    listener = listen("tcp://127.0.0.1:0")
    own = KeyPair.new()
    keys = ClientKeys(KeyPair.new().public, own.public, own.secret)
    channel = connect(listener.address, security=keys)
    try:
        wait_until(lambda: not channel.send([b"secret"]) and channel.recv() or channel.trouble)
        assert channel.trouble == OTHER_KEYS
        assert listener.recv() is None
    finally:
        channel.close()
        listener.close()


@pytest.mark.parametrize("failure", ["stopped", "raising", "odd"])
def test_nobody_comes_in_while_nobody_looks(
    door: Door, wait_until: WaitUntil, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = KeyPair.new()
    door.users[own.public] = "client:ada"
    if failure == "stopped":
        assert zap._service is not None
        zap._service.stop()
    elif failure == "raising":
        door.users.clear()  # what follows raises KeyError
        zap._service.doors = {d: lambda key: door.users[key] for d in zap._service.doors}  # type: ignore[union-attr]
    else:
        zap._service.doors = dict.fromkeys(zap._service.doors, lambda key: "é")  # type: ignore[union-attr]
    channel = door.dial(own)
    assert wait_until(lambda: door.turn(channel)) in (OTHER_KEYS, REFUSED_KEY)
    assert not door.heard
    door.users[own.public] = "client:ada"
    if failure == "stopped":
        assert zap.supervise()
        assert not zap.supervise()
        assert wait_until(lambda: door.turn(channel) == "client:ada" or door.heard)
    assert own.public.hex() not in caplog.text


def test_two_listeners_keep_their_users_apart(door: Door, wait_until: WaitUntil) -> None:
    other = Door()
    own = KeyPair.new()
    other.users[own.public] = "worker:w"
    try:
        channel = door.dial(own)
        assert wait_until(lambda: door.turn(channel)) == REFUSED_KEY
        there = other.dial(own)
        assert wait_until(lambda: other.turn(there)) == "worker:w"
    finally:
        other.close()


def test_an_evicted_user_is_heard_no_more(door: Door, wait_until: WaitUntil) -> None:
    ada, bob = KeyPair.new(), KeyPair.new()
    door.users.update({ada.public: "client:ada", bob.public: "client:bob"})
    first, second = door.dial(ada), door.dial(bob)
    wait_until(lambda: door.turn(first) == "client:ada")
    wait_until(lambda: door.turn(second) == "client:bob")
    del door.users[ada.public]
    door.listener.evict(lambda user: user in door.users.values())
    door.heard.clear()
    first.send([b"still here"])
    first.send([b""])  # nor does saying hello again help
    first.send([b"still here"])
    wait_until(lambda: door.turn(second) == "client:bob" and door.listener.garbage >= 2)  # type: ignore[attr-defined]
    assert {user for user, _ in door.heard} == {"client:bob"}


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0" * 99,
    ]
    + [b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + b"\0" * 48, b"\xff\0\0\0\0\0\0\0\1\x7f\1", b"\1\0"],
    ids=["http", "tls", "zeros", "null", "zmtp2", "zmtp1"],
)
def test_strangers_bytes_reach_nobody(door: Door, wait_until: WaitUntil, garbage: bytes) -> None:
    host, _, port = door.listener.address.removeprefix("tcp://").rpartition(":")
    own = KeyPair.new()
    door.users[own.public] = "client:ada"
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(garbage * 3)
        channel = door.dial(own)
        wait_until(lambda: door.turn(channel) == "client:ada")
    assert {user for user, _ in door.heard} == {"client:ada"}


def test_a_damaged_message_ends_an_encrypted_connection_at_once(
    door: Door, wait_until: WaitUntil
) -> None:
    """libzmq waited for its heartbeat's end, and aborted the process if the link broke first."""
    own = KeyPair.new()
    door.users[own.public] = "client:ada"
    with ChaosProxy(door.listener.address, seed=1) as proxy:
        channel = door.dial_at(proxy.address, own)
        wait_until(lambda: door.turn(channel) == "client:ada")
        proxy.weather = Weather(flip_every=2000)
        door.listener.send(door.peers[-1], [b"x" * 50_000])
        wait_until(lambda: channel.recv() == [], 4.0)
        proxy.weather = CALM
        door.heard.clear()
        wait_until(lambda: door.turn(channel) == "client:ada")


def test_the_last_door_closes_and_the_next_one_opens_at_once() -> None:
    """ZeroMQ lets go of a closed socket's address some time after the call."""
    for _ in range(2000):
        zap.close_door(zap.open_door(lambda key: ""))
