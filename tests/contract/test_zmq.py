"""What only the ZeroMQ transport has to get right: versions, ipc files, forks, threads, exits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zmq import AFFINITY, IO_THREADS

from zfabric.config import DEFAULTS
from zfabric.errors import AddressInUse, ChannelClosed, ConfigError, FrameTooLarge, InternalError
from zfabric.runtime.data_address import listen_for_data
from zfabric.runtime.dialling import dial_data
from zfabric.testing.chaos import ChaosProxy
from zfabric.testing.contract import Net, TransportMaker
from zfabric.transport import connect, listen, zmq, zmq_socket

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def net() -> Any:
    net = Net(TransportMaker(address=lambda: "tcp://127.0.0.1:0"))
    yield net
    net.close()


def run(code: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter; a hang is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


# --- versions, options, addresses ---


@pytest.mark.parametrize(
    ("pyzmq", "libzmq", "word"),
    [((27, 2, 0), (4, 3, 5), "pyzmq 27.3"), ((27, 3, 0), (4, 3, 4), "libzmq 4.3.5")],
)
def test_old_versions_are_refused(pyzmq: Any, libzmq: Any, word: str) -> None:
    with pytest.raises(ImportError, match=word):
        zmq_socket.check_versions(pyzmq, libzmq)


def test_new_versions_are_taken() -> None:
    zmq_socket.check_versions((27, 3, 0), (4, 3, 5))
    zmq_socket.check_versions((28, 0, 0, float("inf")), (4, 4, 0))


def test_an_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="max_frame"):
        listen("tcp://127.0.0.1:0", max_farme=3)


def test_an_address_that_cannot_be_bound() -> None:
    with pytest.raises(ConfigError, match="cannot listen at"):
        listen("tcp://no-such-host-at-all:1")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:99999", "tcp://127.0.0.1", "tcp://h:1x"])
def test_a_port_that_is_none(address: str) -> None:
    for function in (listen, connect):
        with pytest.raises(ConfigError, match="is no port"):
            function(address)


def test_security_sees_each_socket_before_it_is_used() -> None:
    seen: list[str] = []
    listener = listen("tcp://127.0.0.1:0", security=lambda socket, side: seen.append(side))
    channel = connect(listener.address, security=lambda socket, side: seen.append(side))
    channel.close()
    listener.close()
    assert seen == ["listen", "connect"]


# --- ipc ---


@pytest.mark.parametrize("broker", ["tcp://127.0.0.1:1", "ipc:///{path}/broker"])
def test_values_have_an_io_thread_of_their_own(broker: str, tmp_path: Path) -> None:
    listener = listen_for_data(broker.format(path=tmp_path), None, DEFAULTS)
    assert isinstance(listener, zmq.ZmqListener)
    channel: Any = dial_data(listener.address, None, DEFAULTS)
    other: Any = connect("tcp://127.0.0.1:1")
    try:
        served_by = [end._socket.get(AFFINITY) for end in (listener, channel, other)]
        assert served_by == [zmq_socket.BULK, zmq_socket.BULK, zmq_socket.CONTROL]
        assert zmq_socket.context().get(IO_THREADS) == 2
    finally:
        for end in (other, channel, listener):
            end.close()


def test_a_long_path_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="takes 107"):
        listen("ipc:///tmp/" + "x" * 120)
    with pytest.raises(ConfigError, match="takes 107"):
        connect("ipc:///tmp/" + "x" * 120)


def test_abstract_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="permissions"):
        listen("ipc://@zfabric")


def test_a_missing_directory_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="directory must exist"):
        listen("ipc:///no/such/directory/socket")


def test_another_process_cannot_take_a_path_over(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s"
    listener = listen(address)
    code = "import sys; from zfabric.transport import listen; listen(sys.argv[1])"
    assert "AddressInUse" in run(code, address).stderr
    listener.close()
    assert list(tmp_path.iterdir()) == []
    assert run(code, address).returncode == 0


def test_what_a_crash_left_is_in_nobodys_way(tmp_path: Path, net: Net) -> None:
    address = f"ipc://{tmp_path}/s"
    code = (
        "import os, sys; from zfabric.transport import listen; l = listen(sys.argv[1]); os._exit(1)"
    )
    run(code, address)
    assert {path.name for path in tmp_path.iterdir()} == {"s", "s.lock"}
    listener = net.listen(address)
    with pytest.raises(AddressInUse):
        listen(address)
    net.introduce(net.connect(listener), listener)


# --- strangers ---


def test_a_dealer_that_does_not_say_hello_is_dropped_and_counted(net: Net) -> None:
    listener, channel, peer = net.pair()
    assert isinstance(listener, zmq.ZmqListener)
    stranger = zmq_socket.context().socket(zmq_socket.zmq.DEALER)
    stranger.connect(listener.address)
    stranger.send_multipart([b"", b"hello"])
    stranger.send_multipart([b"hello"])
    net.pump(lambda: listener.garbage == 2)
    net.say(channel, [b"still here"])
    net.pump(lambda: net.inbox(listener))
    assert net.inbox(listener) == [(peer, [b"still here"])]
    stranger.close(0)


def test_a_message_of_too_many_frames_is_dropped_and_counted(net: Net) -> None:
    listener = net.listen(max_frames=10)
    channel = net.connect(listener)
    peer = net.introduce(channel, listener)
    assert isinstance(listener, zmq.ZmqListener)
    net.say(channel, [b"x"] * 12)
    net.say(channel, [b"x"] * 1000)
    net.say(channel, [b"y"] * 10)
    net.pump(lambda: net.inbox(listener))
    assert net.inbox(listener) == [(peer, [b"y"] * 10)]
    assert listener.garbage == 2
    with pytest.raises(FrameTooLarge, match="10 is too many"):
        listener.send(peer, [b"x"] * 11)


def test_a_frame_above_the_limit_costs_its_sender_the_connection(net: Net) -> None:
    listener = net.listen(max_frame=1000)
    channel = net.connect(listener, max_frame=1_000_000)
    peer = net.introduce(channel, listener)
    net.say(channel, [bytes(2000)])
    net.pump(lambda: (peer, []) in net.inbox(listener) and net.inbox(channel))
    assert net.inbox(listener) == [(peer, [])]
    assert net.inbox(channel) == [[]]


# --- a connection that breaks between two frames ---


class HalfWay:
    """A raw send as libzmq's would go when the connection breaks after the first frame."""

    def __init__(self) -> None:
        self.frames: list[tuple[bytes, bool]] = []

    def __call__(self, frame: bytes, flags: int, copy: bool = True) -> None:
        more = bool(flags & zmq_socket.zmq.SNDMORE)
        self.frames.append((frame, more))
        if len(self.frames) == 2:
            raise zmq_socket.zmq.Again()


def test_the_rest_of_a_broken_message_is_given_away(net: Net) -> None:
    _listener, channel, _peer = net.pair()
    assert isinstance(channel, zmq.ZmqChannel)
    genuine, channel._send = channel._send, HalfWay()
    assert channel.send([b"1", b"2", b"3", b"4"]) is False
    assert channel._send.frames == [(b"1", True), (b"2", True), (b"3", True), (b"4", False)]
    channel._send = genuine


# --- who waits without a Poller ---


def test_a_lost_peer_is_heard_of_without_a_poller_too(net: Net) -> None:
    listener, channel, peer = net.pair()
    channel.close()
    net.endpoints.remove(channel)
    for _ in range(1_000_000):
        message = listener.recv()
        if message is not None:
            break
    assert message == (peer, [])


# --- half-open connections ---


@pytest.mark.parametrize("dead_s", [0.6, 30.0, 60.0, 3600.0])
def test_heartbeats_find_a_dead_link_in_the_time_that_is_asked_for(dead_s: float) -> None:
    options = zmq_socket.heartbeats(dead_s)
    every, timeout, ttl = (
        options[getattr(zmq_socket.zmq, f"HEARTBEAT_{name}")] for name in ("IVL", "TIMEOUT", "TTL")
    )
    assert every + timeout == pytest.approx(dead_s * 1000)
    assert every <= 20_000
    assert ttl == 0  # it would be a timer for each of the listener's peers


@pytest.mark.parametrize("dead_s", [0.6, 30.0, 60.0, 3600.0])
def test_the_kernel_finds_it_in_that_time_too(dead_s: float) -> None:
    options = zmq_socket.probes(dead_s)
    idle, every, count = (
        options[getattr(zmq_socket.zmq, f"TCP_KEEPALIVE_{name}")]
        for name in ("IDLE", "INTVL", "CNT")
    )
    assert options[zmq_socket.zmq.TCP_MAXRT] == dead_s * 1000
    assert idle + every * count <= max(2.0, dead_s * 1.01)
    assert 1 <= count <= 127


def test_both_ends_of_a_half_open_connection_notice(net: Net) -> None:
    """Sooner than by default, as they were asked to: this would fail with that."""
    listener = net.listen(dead_s=0.6)
    with ChaosProxy(listener.address) as proxy:
        channel = net.connect(proxy.address, dead_s=0.6)
        peer = net.introduce(channel, listener)
        proxy.abandon()
        net.pump(
            lambda: (peer, []) in net.inbox(listener) and [] in net.inbox(channel), timeout_s=25.0
        )


# --- descriptors ---


def test_strangers_leave_some_descriptors_to_others() -> None:
    """Most of them are shut, the oldest first, and a peer that comes then finds room."""
    code = """
import os, resource, socket
from zfabric.transport import Poller, connect, listen
listener = listen("tcp://127.0.0.1:0")
place = ("127.0.0.1", int(listener.address.rpartition(":")[2]))
poller = Poller(); poller.add(listener)
here = connect(listener.address); poller.add(here)
while not here.send([b"hello"]):
    poller.wait(1.0); listener.recv(); here.recv()
while not (message := listener.recv()) or message[1] != [b"hello"]:
    poller.wait(1.0)  # until it is known it counts as a stranger itself
strangers = [socket.socket() for _ in range(60)]
most = strangers[-1].fileno() + 40
resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
for stranger in strangers:
    stranger.setblocking(False)
    stranger.connect_ex(place)
heard = []
def serve():
    poller.wait(1.0)
    while (message := listener.recv()) is not None:
        heard.append(message[1])
def has_room():
    try:
        return most - len(os.listdir("/proc/self/fd")) > 12
    except OSError:
        return False
while listener.refused < 20 or not has_room():
    serve()
late = connect(listener.address); poller.add(late)
while not late.send([b"late"]):
    serve(); late.recv()
while not here.send([b"here"]):
    serve(); here.recv()
while not {b"late", b"here"} <= {frame for frames in heard for frame in frames}:
    serve()
os._exit([] in heard)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


# --- threads, forks, exit ---


def test_a_second_thread_is_caught_in_debug_mode(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZFABRIC_DEBUG", "1")
    _listener, channel, _peer = net.pair()
    caught: list[BaseException] = []

    def other() -> None:
        try:
            channel.recv()
        except InternalError as exc:
            caught.append(exc)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "one thread owns an endpoint" in str(caught[0])


def test_a_forked_child_gets_a_sentence_and_may_start_afresh() -> None:
    code = """
import os
from zfabric.errors import TransportError
from zfabric.transport import connect, listen
listener = listen("tcp://127.0.0.1:0")
pid = os.fork()
if pid == 0:
    try:
        listener.recv()
    except TransportError as exc:
        assert "before a fork" in str(exc), exc
        listener.close()
        fresh = listen("tcp://127.0.0.1:0")
        assert fresh.recv() is None
        fresh.close()
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert listener.recv() is None
listener.close()
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("left_open", ["", "channel", "listener", "channel, listener"])
def test_the_exit_hangs_for_nothing_left_open(left_open: str) -> None:
    code = f"""
import threading
from zfabric.transport import Poller, connect, listen
listener = listen("tcp://127.0.0.1:0")
channel = connect(listener.address)
poller = Poller(); poller.add(channel)
while not channel.send([b"x"]):
    poller.wait(1.0); channel.recv()
for _ in range(50):  # sent without a copy, and most of it still here at the end
    channel.send([bytes(1_000_000)])
del poller
kept = [{left_open}]
for endpoint in (channel, listener):
    if endpoint not in kept:
        endpoint.close()
def wait_for_ever():
    poller = Poller()
    for endpoint in kept: poller.add(endpoint)
    while kept:
        poller.wait(None)
        for endpoint in kept: endpoint.recv()
threading.Thread(target=wait_for_ever, daemon=True).start()
"""
    done = run(code, ZFABRIC_DEBUG="0")  # endpoints change hands here, once
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_linger_outlives_the_last_line_of_a_program(net: Net) -> None:
    listener = net.listen()
    code = """
import sys
from zfabric.transport import Poller, connect
channel = connect(sys.argv[1])
poller = Poller(); poller.add(channel)
while not channel.send([b"0", bytes(100_000)]):
    poller.wait(1.0); channel.recv()
for n in range(1, 50):
    assert channel.send([b"%d" % n, bytes(100_000)])
channel.close(linger_s=10.0)
"""
    child = subprocess.Popen([sys.executable, "-W", "error", "-c", code, listener.address])
    net.pump(lambda: net.inbox(listener) and net.inbox(listener)[-1][1] == [])
    assert child.wait(10) == 0
    assert [int(frames[0]) for _, frames in net.inbox(listener)[:-1]] == list(range(50))


def test_a_context_that_ended_closes_the_channel() -> None:
    channel = connect("tcp://127.0.0.1:1")
    assert isinstance(channel, zmq.ZmqChannel)
    channel._socket.close(0)
    with pytest.raises(ChannelClosed):
        channel.recv()
    channel.close()


@pytest.mark.parametrize("stream", [b"\1\0" * 4, b"\1\0\1\0\2\0x", b"\0" * 64], ids=repr)
def test_a_stranger_taken_for_zmtp_1_is_dropped(
    stream: bytes, wait_until: Callable[..., Any]
) -> None:
    """Its empty message looks like a hello, but nothing tells by which connection it came."""
    listener = listen("tcp://127.0.0.1:0")
    host, _, port = listener.address.removeprefix("tcp://").rpartition(":")
    channel = connect(listener.address)
    try:
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(stream)

            def heard() -> Any:
                channel.send([b"hello"])
                item = listener.recv()
                return item and item[1]

            assert wait_until(heard) == [b"hello"]
            if stream.startswith(b"\1"):
                wait_until(lambda: (heard(), listener.garbage)[1])  # type: ignore[attr-defined]
    finally:
        channel.close()
        listener.close()
