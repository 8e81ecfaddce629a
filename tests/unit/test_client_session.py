"""The client's link: reconnection, a broker that forgot it, closing, garbage."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import zfabric
from tests.unit.client_broker import FakeBroker
from zfabric import messages as m
from zfabric import wire
from zfabric.client import Client
from zfabric.errors import TaskLost


def add(a: Any, b: Any = 1) -> Any:
    return a + b


def test_a_broker_that_forgot_the_client(
    client: Client, broker: FakeBroker, wait_until: Callable[..., Any]
) -> None:
    done = client.submit(add, 1)
    assert done.result(10) == 2
    broker.hold = True
    pending = client.submit(add, 1)
    client.info()
    number = client._submitter.number
    broker.forget_clients()
    with pytest.raises(TaskLost, match="no longer knows this client"):
        pending.result(10)
    assert pending.status == "lost" and done.result() == 2
    broker.hold = False
    wait_until(lambda: client._submitter.number != number)
    assert client.submit(add, 5).result(10) == 6
    with pytest.raises(TypeError, match="that the broker has lost"):
        client.submit(add, done)


def test_a_hello_that_came_after_the_lease_began_another_session(
    client: Client, broker: FakeBroker, wait_until: Callable[..., Any]
) -> None:
    broker.hold = True
    pending = client.submit(add, 1)
    client.info()
    number = client._submitter.number

    def welcome() -> None:
        for session in broker.sessions.values():
            session.post(m.Welcome(number, "c", "0", 4096, 1.0, 30.0))  # the Hello was said twice
            session.post(m.Welcome(number + 1000, "c", "0", 4096, 1.0, 30.0))

    broker.stir(welcome)
    with pytest.raises(TaskLost, match="took the client for dead"):
        pending.result(10)
    broker.hold = False
    wait_until(lambda: client._submitter.number not in (number, number + 1000))
    assert client.submit(add, 5).result(10) == 6


def test_a_broker_that_gave_the_client_up_before_it_was_welcomed(
    broker: FakeBroker, wait_until: Callable[..., Any]
) -> None:
    """Its Hello had come, the Welcome was lost, and its token begins no session any more."""
    broker.refuse = ("unknown", "it was given up")
    opened: list[Client] = []
    opener = threading.Thread(target=lambda: opened.append(Client(broker.address)))
    opener.start()
    wait_until(lambda: len(broker._peers) > 1)
    broker.refuse = None
    opener.join(30)
    with opened[0] as client:
        assert client.submit(add, 1).result(10) == 2


def test_a_broker_that_says_good_bye(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    pending = client.submit(add, 1)
    client.info()

    def shut_down() -> None:
        for session in broker.sessions.values():
            session.post(m.Bye("stopped by SIGTERM"))

    broker.stir(shut_down)
    with pytest.raises(TaskLost, match="shut down"):
        pending.result(10)


def test_a_lock_that_nobody_waits_for_is_given_back(
    client: Client, broker: FakeBroker, wait_until: Callable[..., Any]
) -> None:
    """A restarted broker gets an Acquire once more whose waiter has asked anew meanwhile."""

    def grant() -> None:
        for session in broker.sessions.values():
            session.post(m.Locked(4321, True))
            session.post(m.Locked(4322, False))

    broker.stir(grant)
    wait_until(lambda: broker.seen.get("Unlock"))
    assert client.submit(add, 1).result(10) == 2
    assert broker.seen["Unlock"] == [m.Unlock(4321)]


def test_garbage_from_the_broker_is_dropped(
    client: Client, broker: FakeBroker, wait_until: Callable[..., Any]
) -> None:
    def garbage() -> None:
        for peer in broker._peers.values():
            broker._listener.send(peer, [b"GET / HTTP/1.1", b"", b"x"])

    broker.stir(garbage)
    wait_until(lambda: client._io.link.n_garbage == 1)
    assert client.submit(add, 1).result(10) == 2


def test_a_session_ends_when_its_broker_cannot_be_understood(
    client: Client, broker: FakeBroker, wait_until: Callable[..., Any]
) -> None:
    done = client.submit(add, 1)
    assert done.result(10) == 2
    broker.hold = True
    pending = client.submit(add, 1)
    client.info()
    number = client._submitter.number

    def babble() -> None:
        for token, peer in broker._peers.items():
            session = broker.sessions[token]
            frames = wire.encode(m.Results([1], b"\0", [b""]), token, 7, session.posted + 1, 0)
            broker._listener.send(peer, [frames[0], b"\xc1", *frames[2:]])

    broker.stir(babble)
    with pytest.raises(TaskLost) as caught:
        pending.result(10)
    assert f"{broker.address} sends what this client cannot read" in str(caught.value)
    assert f"zfabric is {zfabric.__version__} here and 0 at the broker" in str(caught.value)
    wait_until(lambda: client._submitter.number != number)
    assert broker.seen["Bye"] == [m.Bye("unreadable: body-garbage")]
    broker.hold = False
    assert done.result() == 2 and client.submit(add, 5).result(10) == 6


def test_a_worker_that_cannot_be_understood_ends_no_session(
    client: Client, broker: FakeBroker, wait_until: Callable[..., Any]
) -> None:
    def babble() -> None:
        for session in broker.sessions.values():
            session.post(m.Relay(3, (b"x", b"y")))

    broker.stir(babble)
    wait_until(lambda: client._io.link.n_garbage == 1)
    assert client.submit(add, 1).result(10) == 2 and "Bye" not in broker.seen


def test_close_says_good_bye_and_leaves_nothing(
    broker: FakeBroker, wait_until: Callable[..., Any], leaves_nothing: None
) -> None:
    for _ in range(30):
        with Client(broker.address) as client:
            assert client.submit(add, 1).result(10) == 2
    wait_until(lambda: len(broker.seen.get("Bye", [])) == 30)


def test_a_client_that_nobody_holds_is_closed(
    broker: FakeBroker, wait_until: Callable[..., Any]
) -> None:
    client = Client(broker.address)
    assert client.submit(add, 1).result(10) == 2
    gone, thread = weakref.ref(client), client._io._thread
    del client
    gc.collect()
    assert gone() is None
    wait_until(lambda: not thread.is_alive())


def test_a_future_keeps_its_client(broker: FakeBroker) -> None:
    assert Client(broker.address).submit(add, 1).result(10) == 2


def test_rows_queued_before_close_are_forgotten(broker: FakeBroker) -> None:
    broker.hold = True
    client = Client(broker.address)
    futures = client.map(add, range(1000))
    client.close()
    assert all(future.cancelled() for future in futures)


def test_submitting_while_another_thread_closes(broker: FakeBroker) -> None:
    client = Client(broker.address)
    ends: list[str] = []

    def work() -> None:
        try:
            while True:
                client.submit(add, 1).result(10)
        except Exception as exc:
            ends.append(type(exc).__name__)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    client.close()
    for thread in threads:
        thread.join(10)
    assert len(ends) == 4 and set(ends) <= {"ClientClosed", "TaskCancelled"}


def test_repr_and_info(client: Client) -> None:
    assert "workers=1 slots=2" in repr(client)
    assert client.info()["address"] == client.address
    assert client.workers() == ["w1"]
    assert client.run(add, 1) == {"w1": 2}
