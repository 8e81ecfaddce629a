"""The promises of `zfabric.transport.contract`, as tests that any transport can run.

    class TestPigeons(TransportContract):
        @pytest.fixture
        def maker(self) -> TransportMaker:
            return TransportMaker(address=lambda: "pigeon://roof")

The scheme has to be registered. Everything runs in one thread unless said otherwise, without a
sleep: `Net.pump` waits for a condition, up to a deadline.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from zfabric.errors import AddressInUse, ChannelClosed, FrameTooLarge
from zfabric.transport import Channel, Listener, PeerId, Poller, connect, listen

MiB = 1024 * 1024
DEADLINE_S = 20.0


@dataclass
class TransportMaker:
    """What the suite has to know about a transport."""

    address: Callable[[], str]
    """An address to listen at that nobody else uses (or one where the transport picks it)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Passed to each listen and connect."""
    raw: Callable[[str], socket.socket] | None = None
    """A bare connection to a listener's address, to throw garbage at; None where there is none."""
    crosses_processes: bool = True


class Net:
    """Some endpoints, what they received, and a loop that serves them until something holds."""

    def __init__(self, maker: TransportMaker) -> None:
        self.maker = maker
        self.endpoints: list[Any] = []
        self.got: dict[int, list[Any]] = {}

    def _kept(self, endpoint: Any) -> Any:
        self.endpoints.append(endpoint)
        self.got[id(endpoint)] = []
        return endpoint

    def listen(self, address: str | None = None, **options: Any) -> Listener:
        """A listener, closed at the end."""
        where = self.maker.address() if address is None else address
        listener: Listener = self._kept(listen(where, **{**self.maker.options, **options}))
        return listener

    def connect(self, where: Listener | str, **options: Any) -> Channel:
        """A channel, closed at the end."""
        address = where if isinstance(where, str) else where.address
        channel: Channel = self._kept(connect(address, **{**self.maker.options, **options}))
        return channel

    def inbox(self, endpoint: Any) -> list[Any]:
        """What `pump` received there: frames, or (peer, frames)."""
        return self.got[id(endpoint)]

    def pump(self, until: Callable[[], object], *only: Any, timeout_s: float = DEADLINE_S) -> None:
        """Serve all endpoints (or only these) until `until()` holds.

        Raises AssertionError after `timeout_s`, with what was received last.
        """
        poller = Poller()
        for endpoint in only or self.endpoints:
            poller.add(endpoint)
        deadline = time.monotonic() + timeout_s
        while not until():
            left_s = deadline - time.monotonic()
            if left_s <= 0.0:
                raise AssertionError(f"not within {timeout_s} s; last: {self._last()}")
            # Some conditions change without a message (a queue has room again): look often.
            for endpoint in poller.wait(min(left_s, 0.05)):
                self.drain(endpoint)

    def drain(self, endpoint: Any) -> None:
        """Receive what is there now, within reason."""
        inbox = self.inbox(endpoint)
        for _ in range(1000):
            message = endpoint.recv()
            if message is None:
                return
            inbox.append(message)

    def _last(self) -> str:
        lines = []
        for endpoint in self.endpoints:
            inbox = self.inbox(endpoint)
            lines.append(f"{type(endpoint).__name__}: {len(inbox)} messages, {inbox[-1:]!r:.200}")
        return "; ".join(lines)

    def say(self, channel: Channel, frames: list[Any], *also: Any) -> None:
        """Send, serving the channel (and `also`) until it is taken."""
        self.pump(lambda: channel.send(frames), channel, *also)

    def introduce(self, channel: Channel, listener: Listener) -> PeerId:
        """Make the channel known to the listener, which then knows it as the returned id."""
        word = [b"introduce", os.urandom(8)]
        self.say(channel, word, listener)
        inbox = self.inbox(listener)
        peer: list[PeerId] = []

        def heard() -> bool:
            peer.extend(p for p, frames in inbox if frames == word)
            return bool(peer)

        self.pump(heard, channel, listener)
        inbox[:] = [(p, frames) for p, frames in inbox if frames != word]
        return peer[0]

    def pair(self, **options: Any) -> tuple[Listener, Channel, PeerId]:
        """A listener and a channel that know each other."""
        listener = self.listen(**options)
        channel = self.connect(listener, **options)
        return listener, channel, self.introduce(channel, listener)

    def close(self) -> None:
        """Close all endpoints; channels first."""
        for endpoint in reversed(self.endpoints):
            endpoint.close()


def descriptors() -> int:
    """How many file descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


GARBAGE = {
    "nothing": b"",
    "random": random.Random(7).randbytes(4096),
    "zeros": bytes(4096),
    "http": b"GET / HTTP/1.1\r\nHost: zfabric\r\n\r\n",
    "tls": bytes.fromhex("1603010200010001fc0303") + random.Random(8).randbytes(500),
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n",
    "zmtp1": b"\x01\x00" + b"\x05\x01head" + b"\x05\x00body",
    "zmtp1-named": b"\x05\x00name" + b"\x06\x00hello",
    "zmtp3-cut": b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00NULL",
    "zmtp3-huge": b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00NULL".ljust(64, b"\0")
    + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x02\x7f"
    + b"\xff" * 7,
    "zmtp3-rude": b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00NULL".ljust(64, b"\0")
    + b"\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x00\x05hello",
    "plain-huge-count": b"zfsock\0\x01" + b"\xff" * 4096,
    "plain-huge-size": b"zfsock\0\x01" + b"\x01\0\0\0" + b"\xff" * 8,
    "plain-no-frames": b"zfsock\0\x01" + bytes(64),
}


class TransportContract:
    """Derive a Test class from this and give it a fixture `maker`."""

    @pytest.fixture
    def net(self, maker: TransportMaker) -> Iterator[Net]:
        net = Net(maker)
        yield net
        net.close()

    # --- addresses, capabilities, waiting ---

    def test_the_listeners_address_can_be_dialled_as_it_stands(self, net: Net) -> None:
        listener, channel, _peer = net.pair()
        assert listener.address.partition("://")[0] == listener.capabilities.scheme
        assert not listener.address.endswith((":0", ":*"))
        assert channel.capabilities.scheme == listener.capabilities.scheme
        assert listener.capabilities.ordered
        assert listener.capabilities.max_frame > 0

    def test_a_used_address_is_refused(self, net: Net) -> None:
        listener, channel, _peer = net.pair()
        with pytest.raises(AddressInUse):
            listen(listener.address, **net.maker.options)
        net.say(channel, [b"still here"])
        net.pump(lambda: net.inbox(listener))

    def test_recv_of_nothing_is_none_and_wait_ends(self, net: Net) -> None:
        listener, channel, _peer = net.pair()
        assert listener.recv() is None
        assert channel.recv() is None
        poller = Poller()
        poller.add(listener)
        before = time.monotonic()
        assert poller.wait(0.01) == []
        assert time.monotonic() - before < 5.0
        net.say(channel, [b"x"])
        assert poller.wait(DEADLINE_S) == [listener]
        assert poller.wait(0.0) == [listener], "what was not taken stays ready"
        poller.discard(listener)
        assert poller.wait(0.0) == []

    def test_one_poller_waits_for_endpoints_and_descriptors(self, net: Net) -> None:
        listener, channel, peer = net.pair()
        left, right = socket.socketpair()
        with left, right:
            poller = Poller()
            for thing in (listener, channel, left.fileno()):
                poller.add(thing)
            right.send(b"x")
            assert poller.wait(DEADLINE_S) == [left.fileno()]
            left.recv(1)
            assert listener.send(peer, [b"x"])
            assert poller.wait(DEADLINE_S) == [channel]

    # --- what arrives ---

    def test_messages_stay_in_order_both_ways(self, net: Net) -> None:
        listener, channel, peer = net.pair()
        count = 3000
        sent = [0, 0]

        def go_on() -> bool:
            while sent[0] < count and channel.send([b"up", sent[0].to_bytes(4, "big")]):
                sent[0] += 1
            while sent[1] < count and listener.send(peer, [b"down", sent[1].to_bytes(4, "big")]):
                sent[1] += 1
            return len(net.inbox(listener)) == count and len(net.inbox(channel)) == count

        net.pump(go_on)
        numbers = [int.from_bytes(frames[1], "big") for _, frames in net.inbox(listener)]
        assert numbers == list(range(count))
        assert [int.from_bytes(f[1], "big") for f in net.inbox(channel)] == list(range(count))

    @pytest.mark.parametrize(
        "frames",
        [
            [b""],
            [b"", b""],
            [b""] * 7,
            [b"", b"after an empty one"],
            [b"before an empty one", b""],
            [b"a", b"", b"b"],
            [b"%d" % i for i in range(1000)],
            [bytearray(b"array"), memoryview(b"view"), memoryview(b"xslicex")[1:-1]],
            [memoryview(bytes(range(24))).cast("B", (2, 3, 4))],
            [memoryview(bytes(200_000)), bytearray(b"b" * 70_000), b"c" * 65_536],
        ],
        ids=lambda frames: f"{len(frames)}x{type(frames[0]).__name__}",
    )
    def test_frames_come_out_as_they_went_in(self, net: Net, frames: list[Any]) -> None:
        listener, channel, peer = net.pair()
        net.say(channel, frames)
        assert listener.send(peer, frames)
        net.pump(lambda: net.inbox(listener) and net.inbox(channel))
        wanted = [bytes(frame) for frame in frames]
        assert [bytes(frame) for frame in net.inbox(listener)[0][1]] == wanted
        assert [bytes(frame) for frame in net.inbox(channel)[0]] == wanted

    def test_small_frames_come_as_bytes(self, net: Net) -> None:
        listener, channel, peer = net.pair()
        net.say(channel, [b"head", bytes(1000)])
        assert listener.send(peer, [b"head", bytes(1000)])
        net.pump(lambda: net.inbox(listener) and net.inbox(channel))
        assert {type(f) for f in net.inbox(listener)[0][1] + net.inbox(channel)[0]} == {bytes}

    def test_a_buffer_that_may_change_is_copied(self, net: Net) -> None:
        listener, channel, _peer = net.pair()
        buffers = [bytearray(b"1" * 1000), bytearray(b"1" * MiB)]
        net.say(channel, [memoryview(buffers[0]), buffers[1]])
        for buffer in buffers:
            buffer[:] = b"2" * len(buffer)
        net.pump(lambda: net.inbox(listener))
        assert all(bytes(frame).count(b"1") == len(frame) for frame in net.inbox(listener)[0][1])

    def test_64_mib_in_frames_of_4_mib(self, net: Net) -> None:
        listener, channel, peer = net.pair()
        chunk = random.Random(1).randbytes(4 * MiB)
        sent = [0, 0]

        def go_on() -> bool:
            while sent[0] < 8 and channel.send([b"up", chunk]):
                sent[0] += 1
            while sent[1] < 2 and listener.send(peer, [b"down", *[chunk] * 4]):
                sent[1] += 1
            return len(net.inbox(listener)) == 8 and len(net.inbox(channel)) == 2

        net.pump(go_on)
        assert all(frames[1] == chunk for _, frames in net.inbox(listener))
        assert all(part == chunk for frames in net.inbox(channel) for part in frames[1:])

    def test_the_largest_frame_fits_and_one_byte_more_does_not(self, net: Net) -> None:
        listener, channel, peer = net.pair()
        limit = listener.capabilities.max_frame
        with pytest.raises(FrameTooLarge):
            channel.send([b"head", bytes(limit + 1)])
        with pytest.raises(FrameTooLarge):
            listener.send(peer, [b"head", bytes(limit + 1)])
        net.say(channel, [b"head", bytes(limit)])
        assert listener.send(peer, [b"head", bytes(limit)])
        net.pump(lambda: net.inbox(listener) and net.inbox(channel))
        assert [len(frame) for frame in net.inbox(listener)[0][1]] == [4, limit]
        assert [len(frame) for frame in net.inbox(channel)[0]] == [4, limit]

    def test_a_message_without_frames_is_a_mistake(self, net: Net) -> None:
        listener, channel, peer = net.pair()
        with pytest.raises(ValueError, match="at least one frame"):
            channel.send([])
        with pytest.raises(ValueError, match="at least one frame"):
            listener.send(peer, [])

    def test_many_peers_each_get_their_own(self, net: Net) -> None:
        listener = net.listen()
        channels = [net.connect(listener) for _ in range(40)]
        peers = [net.introduce(channel, listener) for channel in channels]
        assert len(set(peers)) == len(peers)
        for number in range(20):
            for index, channel in enumerate(channels):
                net.say(channel, [b"%d" % index, b"%d" % number])
        net.pump(lambda: len(net.inbox(listener)) == 800)
        for peer, frames in net.inbox(listener):
            assert peers[int(frames[0])] == peer
            assert listener.send(peer, frames)
        net.pump(lambda: sum(len(net.inbox(channel)) for channel in channels) == 800)
        for index, channel in enumerate(channels):
            assert net.inbox(channel) == [[b"%d" % index, b"%d" % n] for n in range(20)]

    # --- full ---

    def test_a_full_peer_loses_nothing_and_holds_up_nobody(self, net: Net) -> None:
        listener = net.listen()
        slow, quick = net.connect(listener), net.connect(listener)
        to_slow, to_quick = net.introduce(slow, listener), net.introduce(quick, listener)
        payload = bytes(32 * 1024)
        taken = 0
        before = time.monotonic()
        # Taken until full; then full for good, since nobody reads.
        refusals = 0
        while refusals < 3:
            if listener.send(to_slow, [b"%d" % taken, payload]):
                taken += 1
                refusals = 0
                assert taken < 100_000, "this queue has no end"
            else:
                refusals += 1
                net.pump(lambda: True)
                listener_turn = listener.recv()
                assert listener_turn is None
        assert time.monotonic() - before < DEADLINE_S
        assert listener.send(to_quick, [b"you are not held up"])
        net.pump(lambda: net.inbox(quick), quick, listener)
        net.say(quick, [b"nor is the other way"], listener)
        net.pump(lambda: net.inbox(listener), quick, listener)
        net.pump(lambda: len(net.inbox(slow)) == taken, slow, listener)
        assert [int(frames[0]) for frames in net.inbox(slow)] == list(range(taken))
        net.pump(lambda: listener.send(to_slow, [b"there is room again"]))
        net.pump(lambda: len(net.inbox(slow)) == taken + 1)

    def test_a_listener_that_does_not_read_makes_channels_wait(self, net: Net) -> None:
        listener, channel, _peer = net.pair()
        payload = bytes(32 * 1024)
        taken = refusals = 0
        while refusals < 3:
            if channel.send([b"%d" % taken, payload]):
                taken += 1
                refusals = 0
                assert taken < 100_000, "this queue has no end"
            else:
                refusals += 1
                assert channel.recv() is None
        net.pump(lambda: len(net.inbox(listener)) == taken)
        assert [int(frames[0]) for _, frames in net.inbox(listener)] == list(range(taken))
        net.say(channel, [b"there is room again"], listener)
        net.pump(lambda: len(net.inbox(listener)) == taken + 1)

    # --- gone ---

    def test_a_closed_channel_is_told_after_its_last_message(self, net: Net) -> None:
        listener, channel, peer = net.pair()
        if not listener.capabilities.detects_close:
            pytest.skip("cannot tell")
        for number in range(100):
            net.say(channel, [b"%d" % number])
        # All are there before the close, so that none can go with it.
        net.pump(lambda: len(net.inbox(listener)) >= 50)
        net.say(channel, [b"last"], listener)
        net.pump(lambda: net.inbox(listener)[-1] == (peer, [b"last"]))
        channel.close()
        net.endpoints.remove(channel)
        net.pump(lambda: net.inbox(listener)[-1] == (peer, []))
        assert len(net.inbox(listener)) == 102
        with pytest.raises(ChannelClosed):
            listener.send(peer, [b"are you there?"])
        assert listener.recv() is None, "told once"

    def test_a_channel_that_closes_at_once_is_told_after_its_messages(self, net: Net) -> None:
        listener = net.listen()
        if not listener.capabilities.detects_close:
            pytest.skip("cannot tell")
        for _ in range(30):
            channel = net.connect(listener)
            peer = net.introduce(channel, listener)
            for number in range(10):
                net.say(channel, [b"%d" % number])
            channel.close()
            net.endpoints.remove(channel)
            inbox = net.inbox(listener)
            net.pump(lambda inbox=inbox, peer=peer: (peer, []) in inbox)  # type: ignore[misc]
            assert [frames for p, frames in inbox if p == peer][-1] == []
            heard = [frames[0] for p, frames in inbox if p == peer and frames]
            assert heard == [b"%d" % number for number in range(len(heard))]
            inbox.clear()

    def test_a_closed_listener_is_told(self, net: Net) -> None:
        listener, channel, _peer = net.pair()
        if not listener.capabilities.detects_close:
            pytest.skip("cannot tell")
        listener.close()
        net.endpoints.remove(listener)
        net.pump(lambda: net.inbox(channel))
        assert net.inbox(channel) == [[]]
        assert channel.send([b"x"]) is False

    def test_an_unknown_peer_is_gone(self, net: Net) -> None:
        listener = net.listen()
        with pytest.raises(ChannelClosed):
            listener.send(b"12345", [b"x"])

    def test_a_killed_process_is_told(self, net: Net) -> None:
        listener = net.listen()
        if not net.maker.crosses_processes or not listener.capabilities.detects_close:
            pytest.skip("cannot tell")
        code = (
            "import sys; from zfabric.transport import connect, Poller\n"
            "c = connect(sys.argv[1]); p = Poller(); p.add(c)\n"
            "while not c.send([b'alive']): p.wait(1.0); c.recv()\n"
            "while True: p.wait(None); c.recv()\n"
        )
        child = subprocess.Popen([sys.executable, "-c", code, listener.address])
        try:
            net.pump(lambda: net.inbox(listener))
            child.send_signal(signal.SIGKILL)
            net.pump(lambda: net.inbox(listener)[-1][1] == [], timeout_s=5.0)
        finally:
            child.kill()
            child.wait()

    def test_a_lingering_close_delivers_what_was_taken(self, net: Net) -> None:
        received: list[list[bytes]] = []
        failures: list[BaseException] = []
        where: list[str] = []
        listening = threading.Event()

        def serve() -> None:  # a thread of its own: this close may wait for the other end
            try:
                own = Net(net.maker)
                listener = own.listen()
                where.append(listener.address)
                listening.set()
                own.pump(lambda: own.inbox(listener) and own.inbox(listener)[-1][1] == [])
                received.extend(frames for _, frames in own.inbox(listener))
                own.close()
            except BaseException as exc:
                failures.append(exc)
                listening.set()

        thread = threading.Thread(target=serve)
        thread.start()
        listening.wait(DEADLINE_S)
        channel = net.connect(where[0])
        for number in range(200):
            net.say(channel, [b"%d" % number, bytes(10_000)])
        net.endpoints.remove(channel)
        channel.close(linger_s=10.0)
        thread.join(DEADLINE_S)
        assert not failures
        assert [int(frames[0]) for frames in received[:-1]] == list(range(200))

    # --- closing ---

    def test_use_after_close_is_refused(self, net: Net) -> None:
        listener, channel, peer = net.pair()
        channel.close()
        channel.close()
        listener.close()
        listener.close()
        net.endpoints.clear()
        with pytest.raises(ChannelClosed, match="closed here"):
            channel.send([b"x"])
        with pytest.raises(ChannelClosed, match="closed here"):
            channel.recv()
        with pytest.raises(ChannelClosed):
            listener.send(peer, [b"x"])
        with pytest.raises(ChannelClosed, match="closed here"):
            listener.recv()

    def test_close_while_sending_hurts_nobody_else(self, net: Net) -> None:
        listener = net.listen()
        channels = [net.connect(listener) for _ in range(10)]
        peers = [net.introduce(channel, listener) for channel in channels]
        payload = bytes(100_000)
        for channel, peer in zip(channels, peers, strict=True):
            for _ in range(20):
                channel.send([b"up", payload])
                listener.send(peer, [b"down", payload])
        for channel in channels[1:]:  # in the middle of all that
            channel.close()
            net.endpoints.remove(channel)
        net.say(channels[0], [b"the last one"], listener)
        net.pump(lambda: (peers[0], [b"the last one"]) in net.inbox(listener))
        net.pump(lambda: len(net.inbox(channels[0])) == 20)
        for peer in peers[1:]:

            def gone(peer: PeerId = peer) -> bool:
                try:
                    listener.send(peer, [b"x"])
                except ChannelClosed:
                    return True
                return False

            net.pump(gone)
        for frames in net.inbox(channels[0]):
            assert frames == [b"down", payload], "parts of messages were mixed"
        listener.close()
        net.endpoints.remove(listener)

    def test_a_channel_finds_its_listener_again(self, net: Net) -> None:
        listener, channel, _peer = net.pair()
        address = listener.address
        for round_number in range(3):
            listener.close()
            net.endpoints.remove(listener)
            # At the very moment when the loss is known, nothing may be taken that then is lost.
            net.pump(lambda: net.inbox(channel), channel)
            assert channel.send([b"lost?"]) is False
            assert net.inbox(channel) == [[]]
            net.inbox(channel).clear()
            listener = net.listen(address)
            peer = net.introduce(channel, listener)
            assert listener.send(peer, [b"%d" % round_number])
            net.pump(lambda: net.inbox(channel))
            assert net.inbox(channel) == [[b"%d" % round_number]]
            net.inbox(channel).clear()

    def test_dial_first_listen_later(self, net: Net) -> None:
        before = net.listen()
        address = before.address
        before.close()
        net.endpoints.clear()
        channel = net.connect(address)
        assert channel.send([b"into the void"]) is False
        listener = net.listen(address)
        net.introduce(channel, listener)
        assert net.inbox(listener) == []

    def test_a_thousand_connects_leave_nothing_behind(self, net: Net) -> None:
        listener = net.listen()
        net.introduce(net.connect(listener), listener)
        gc.collect()
        baseline = descriptors()
        told = 0
        for _ in range(20):
            channels = [connect(listener.address, **net.maker.options) for _ in range(50)]
            waiting = list(channels)

            def all_said_hello(waiting: list[Channel] = waiting) -> bool:
                waiting[:] = [c for c in waiting if c.recv() is None and not c.send([b"hello"])]
                return not waiting

            net.pump(all_said_hello)
            told += 50
            net.pump(lambda told=told: _hellos(net, listener) == told)  # type: ignore[misc]
            for channel in channels:
                channel.close()
        net.pump(lambda: descriptors() <= baseline)
        if listener.capabilities.detects_close:
            net.pump(lambda: sum(not frames for _, frames in net.inbox(listener)) == 1000)

    # --- strangers ---

    @pytest.mark.parametrize("name", GARBAGE)
    def test_garbage_on_the_port_reaches_nobody(self, net: Net, name: str) -> None:
        if net.maker.raw is None:
            pytest.skip("no port")
        listener, channel, peer = net.pair()
        strangers = [net.maker.raw(listener.address) for _ in range(3)]
        for stranger in strangers:
            # Resets and early closes are what a stranger deserves.
            try:
                stranger.sendall(GARBAGE[name])
            except OSError:
                continue
        net.say(channel, [b"still served"])
        net.pump(lambda: net.inbox(listener))
        newcomer = net.connect(listener)
        second = net.introduce(newcomer, listener)
        strangers[0].close()
        assert listener.send(peer, [b"x"])
        assert listener.send(second, [b"y"])
        net.pump(lambda: net.inbox(channel) and net.inbox(newcomer))
        for stranger in strangers:
            stranger.close()
        third = net.introduce(net.connect(listener), listener)
        # A stranger that got as far as being a peer may be told gone, but never heard.
        heard = [(p, frames) for p, frames in net.inbox(listener) if frames]
        assert heard == [(peer, [b"still served"])]
        assert len({peer, second, third}) == 3


def _hellos(net: Net, listener: Listener) -> int:
    return sum(frames == [b"hello"] for _, frames in net.inbox(listener))
