"""Checksums of messages on tcp, and connections that end because a byte came wrong."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.conftest import wait_until
from zfabric.errors import ChannelClosed
from zfabric.testing.chaos import CALM, ChaosProxy, Weather
from zfabric.testing.contract import Net, TransportMaker
from zfabric.transport import Channel, Poller, connect, listen, zmq, zmq_socket
from zfabric.transport.seal import seal_of, take_seal

pytestmark = pytest.mark.timeout(60)

LONG_S = 40.0


@pytest.fixture
def net() -> Any:
    net = Net(TransportMaker(address=lambda: "tcp://127.0.0.1:0", options={"seal": True}))
    yield net
    net.close()


def test_a_seal_fits_its_frames_and_no_others() -> None:
    frames = [b"head", b"", b"body" * 100]
    sealed = [*frames, seal_of(frames)]
    assert take_seal(copy := list(sealed)) and copy == frames
    for wrong in (
        [b"heac", *sealed[1:]],
        [b"head", b"body" * 100, sealed[-1]],
        [b"headbody" + b"body" * 99, b"", sealed[-1]],
        [b"hea", b"d", b"body" * 100, sealed[-1]],
        frames,
        [sealed[-1]],
        [*sealed, b""],
    ):
        assert not take_seal(list(wrong))


def test_every_flip_of_a_bit_is_found() -> None:
    frames = [b"head", random.Random(1).randbytes(300)]
    whole = [*frames, seal_of(frames)]
    for which, frame in enumerate(whole):
        for bit in range(8 * len(frame)):
            changed = bytearray(frame)
            changed[bit // 8] ^= 1 << bit % 8
            assert not take_seal([*whole[:which], bytes(changed), *whole[which + 1 :]])


class Echo:
    """A listener behind a proxy that gives every message back, and a channel to it."""

    def __init__(self, weather: Weather, **options: Any) -> None:
        self.listener = listen("tcp://127.0.0.1:0", dead_s=2.0, **options)
        self.proxy = ChaosProxy(self.listener.address, seed=3, weather=weather)
        self.channel: Channel = connect(self.proxy.address, dead_s=2.0, **options)
        self.poller = Poller()
        self.poller.add(self.listener)
        self.poller.add(self.channel)

    def turn(self) -> list[list[bytes]]:
        """What came back now."""
        self.poller.wait(0.05)
        while (item := self.listener.recv()) is not None:
            peer, frames = item
            if frames:
                try:
                    self.listener.send(peer, [bytes(frame) for frame in frames])
                except ChannelClosed:
                    continue
        back = []
        while (frames := self.channel.recv()) is not None:
            back.append([bytes(frame) for frame in frames])
        return back

    def close(self) -> None:
        self.channel.close()
        self.listener.close()
        self.proxy.close()


@pytest.mark.parametrize(
    "large", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_what_arrives_is_right_however_many_bits_flip(large: bool) -> None:
    """Also where the length of a frame, a flag or the greeting is hit."""
    echo = Echo(Weather(flip_every=60_000 if large else 2_000), seal=True)
    rng = random.Random(5)
    due = {b"%d" % n: rng.randbytes(rng.randrange(200_000 if large else 300)) for n in range(30)}
    try:
        left = dict(due)
        want = iter(())
        rounds = 0

        def go_on() -> bool:
            nonlocal want, rounds
            rounds += 1
            if rounds == 400:  # what is still to come comes for certain
                echo.proxy.weather = CALM
            name = next(want, None)
            if name is None:
                want = iter(list(left))
            elif name in left:
                echo.channel.send([name, left[name]])
            for frames in echo.turn():
                if frames:
                    assert due[frames[0]] == frames[1]
                    left.pop(frames[0], None)
            if not left and not getattr(echo.channel, "damaged", 0) + echo.listener.damaged:
                left.update(due)  # no byte of a message was hit yet
            return not left

        wait_until(go_on, LONG_S, "all came back")
        assert echo.proxy.counts["flips"]
    finally:
        echo.close()


def test_a_channel_dials_again_where_libzmq_would_not() -> None:
    """A frame beyond the limit breaks ZMTP's rules, and so does much of what a flip makes."""
    listener = listen("tcp://127.0.0.1:0")
    channel = connect(listener.address, max_frame=1000)
    poller = Poller()
    poller.add(listener)
    poller.add(channel)
    heard: list[Any] = []
    lost: list[Any] = []

    def go_on() -> bool:
        poller.wait(0.05)
        channel.send([b"here"])
        while (item := listener.recv()) is not None:
            heard.append(item)
        while (frames := channel.recv()) is not None:
            lost.append(frames)
        return bool(heard)

    try:
        wait_until(go_on, LONG_S)
        listener.send(heard[0][0], [bytes(2000)])
        wait_until(lambda: go_on() and [] in lost, LONG_S)
        first = heard[0][0]
        wait_until(lambda: go_on() and heard[-1][0] != first and heard[-1][1], LONG_S)
    finally:
        channel.close()
        listener.close()


def test_who_sends_no_checksum_is_shut_out(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    listener, channel, peer = net.pair()
    assert isinstance(listener, zmq.ZmqListener)
    stranger = zmq_socket.context().socket(zmq_socket.zmq.DEALER)
    try:
        stranger.connect(listener.address)
        stranger.send_multipart([b"hello", b"there"])
        net.pump(lambda: listener.damaged)
    finally:
        stranger.close(0)
    assert "sends no checksums" in caplog.text
    net.say(channel, [b"still here"])
    net.pump(lambda: (peer, [b"still here"]) in net.inbox(listener))
