"""Connections of a listener over which nothing comes are shut; others are left alone."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from zfabric.transport import silence

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's TCP_INFO")


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Connections, as (who dialled, who listens)."""
    with ExitStack() as stack:
        door = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        found = []
        for _ in range(3):
            here = stack.enter_context(socket.create_connection(door.getsockname()))
            found.append((here, stack.enter_context(door.accept()[0])))
        yield found


def is_shut(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(100, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False


def test_only_those_that_are_silent(
    pairs: list[tuple[socket.socket, socket.socket]], wait_until: Callable[..., Any]
) -> None:
    looks = silence.SilentConnections(0.4)
    there = [there.fileno() for _, there in pairs]

    def look() -> bool:
        pairs[0][0].send(b"I live")
        looks.look(there, 0.0)
        return is_shut(pairs[1][0]) and is_shut(pairs[2][0])

    wait_until(look, 10.0)
    assert not is_shut(pairs[0][0])


def test_one_look_asks_a_few_and_the_next_goes_on(
    pairs: list[tuple[socket.socket, socket.socket]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "AT_ONCE", 2)
    monkeypatch.setattr(silence, "_silent_ms", lambda connection: 1e9)
    looks = silence.SilentConnections(60.0)
    there = [there.fileno() for _, there in pairs]
    looks.look(there, 100.0)
    assert [is_shut(here) for here, _ in pairs] == [False, True, True]
    assert looks.look_at == 100.0 + silence.PAUSE_S
    looks.look(there, looks.look_at)
    assert is_shut(pairs[0][0])
    assert looks.look_at == pytest.approx(100.0 + silence.PAUSE_S + 10.0)


def test_what_is_no_connection_is_left_alone() -> None:
    looks = silence.SilentConnections(1e-9)
    one, other = socket.socketpair()
    with one, other:
        looks.look([one.fileno(), 10**6], 0.0)
        one.send(b"still open")
        assert other.recv(100) == b"still open"
