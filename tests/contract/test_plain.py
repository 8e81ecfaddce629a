"""What only plain sockets have to get right: half messages, patience, descriptors."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from typing import Any

import pytest

from zfabric.errors import ConfigError, FrameTooLarge
from zfabric.testing.contract import Net, TransportMaker
from zfabric.transport import connect, listen, plain
from zfabric.transport.plain_stream import GREETING

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def net() -> Any:
    net = Net(TransportMaker(address=lambda: "sock+tcp://127.0.0.1:0"))
    yield net
    net.close()


def dial(listener: Any) -> socket.socket:
    host, _, port = listener.address.partition("://")[2].rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5.0)


def message(*frames: bytes) -> bytes:
    sizes = [len(frame) for frame in frames]
    return struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes) + b"".join(frames)


def test_a_message_cut_at_every_byte_comes_out_whole(net: Net) -> None:
    listener = net.listen()
    stream = GREETING + message(b"head", b"", b"body") + message(b"next")
    with dial(listener) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(stream)):
            peer.send(stream[at : at + 1])
            net.drain(listener)
        net.pump(lambda: len(net.inbox(listener)) == 2)
    assert [frames for _, frames in net.inbox(listener)] == [[b"head", b"", b"body"], [b"next"]]


def test_half_a_message_is_never_handed_out(net: Net) -> None:
    listener = net.listen()
    with dial(listener) as peer:
        peer.sendall(GREETING + message(b"whole") + message(b"half", bytes(100_000))[:-1])
    net.pump(lambda: net.inbox(listener) and net.inbox(listener)[-1][1] == [])
    assert [frames for _, frames in net.inbox(listener)] == [[b"whole"], []]


def test_who_does_not_greet_is_closed_after_a_while(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "HANDSHAKE_S", 0.05)
    listener = net.listen()
    assert isinstance(listener, plain.PlainListener)
    with dial(listener) as stranger:
        stranger.send(GREETING[:3])
        net.pump(lambda: listener.garbage == 1)
        assert stranger.recv(100) == GREETING
        assert stranger.recv(100) == b""
    assert net.inbox(listener) == []


def test_a_broken_rule_is_counted(net: Net) -> None:
    listener = net.listen(max_frame=1000)
    assert isinstance(listener, plain.PlainListener)
    for number, bad in enumerate((b"GET / HTTP/1.1", GREETING + message(bytes(1001))), 1):
        with dial(listener) as stranger:
            stranger.sendall(bad)
            net.pump(lambda number=number: listener.garbage == number)  # type: ignore[misc]


def test_the_size_of_a_message_has_a_limit(net: Net) -> None:
    _listener, channel, _peer = net.pair(max_message=10_000)
    with pytest.raises(FrameTooLarge, match="10000"):
        channel.send([bytes(6000)] * 2)


@pytest.mark.parametrize("address", ["sock+tcp://127.0.0.1", "sock+tcp://:1", "sock+tcp://h:x"])
def test_an_address_that_makes_no_sense(address: str) -> None:
    with pytest.raises(ConfigError, match="127.0.0.1:8786"):
        connect(address)
    with pytest.raises(ConfigError, match="127.0.0.1:8786"):
        listen(address)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="known: max_frame"):
        listen("sock+tcp://127.0.0.1:0", hwn=1)
    with pytest.raises(ConfigError, match="hwm must be above 0"):
        listen("sock+tcp://127.0.0.1:0", hwm=0)


def test_without_descriptors_peers_are_refused_and_the_others_served() -> None:
    code = """
import os, resource, socket
from zfabric.transport import Poller, connect, listen
listener = listen("sock+tcp://127.0.0.1:0")
channel = connect(listener.address)
poller = Poller(); poller.add(listener); poller.add(channel)
while not channel.send([b"first"]):
    poller.wait(1.0); listener.recv(); channel.recv()
place = listener._socket.getsockname()
strangers = [socket.socket() for _ in range(20)]
spare = os.open("/dev/null", os.O_RDONLY)
resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 5, 4096))
for stranger in strangers:
    stranger.setblocking(False)
    stranger.connect_ex(place)
while listener.refused < 10:
    poller.wait(1.0); listener.recv()
assert channel.send([b"second"])
while True:
    poller.wait(1.0)
    message = listener.recv()
    if message and message[1] == [b"second"]: break
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
