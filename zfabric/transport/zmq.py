"""`tcp://`, `ipc://` and `inproc://` on ZeroMQ: a ROUTER that is bound, DEALERs that dial it.

ZeroMQ's C++ I/O threads move the bytes, so the network goes on while Python holds the GIL.

**Who is there.** A DEALER's first message on each connection is empty (PROBE_ROUTER); a connection
that begins otherwise is a stranger's, and what it says is dropped without keeping state for it.
As an empty message means that to the transport, a message of the user's which is empty (all of
its frames are) travels with one more empty frame, which the receiver takes off again.

**Who is gone.** libzmq's DISCONNECT_MSG would tell in band, but its release builds lack it
(setting it fails with EINVAL in the 4.3.5 of pyzmq 27.3; so does ROUTER_NOTIFY). Monitor events
know descriptors instead of peers, and each frame knows the descriptor it came by (SRCFD); so the
probe tells which peer sits behind which descriptor. A monitor event may overtake messages that
still wait in the socket, hence a peer is reported gone only when the socket was found empty
*after* its event was read: then everything from it came before. It is a hint that speeds things
up; heartbeats above remain the truth. Monitors do not see inproc, where both ends are in one
process and close in order: they say goodbye with a second empty message.

**What is damaged.** With the option `seal`, each message over tcp has a checksum. Where one does
not fit, that message and its connection are dropped, as after wrong bytes nobody knows where the
next message begins; the channel dials again. It does so by itself, too, where libzmq would not:
after a frame that breaks ZMTP's rules a DEALER of libzmq stays without a connection for ever.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf
from typing import Any

import zmq

from zfabric.clock import now_s
from zfabric.errors import (
    AddressInUse,
    ChannelClosed,
    ConfigError,
    FrameTooLarge,
    InternalError,
    TransportError,
)
from zfabric.transport import zmq_socket
from zfabric.transport.contract import (
    LARGE,
    OTHER_KEYS,
    REFUSED_KEY,
    Buffer,
    Capabilities,
    Channel,
    Listener,
    PeerId,
)
from zfabric.transport.curve import user_of
from zfabric.transport.descriptors import Strangers
from zfabric.transport.endless import EndlessMessages
from zfabric.transport.ipc_path import PathLock, check_path
from zfabric.transport.zmq_socket import (
    ACCEPTED,
    BOUND,
    CONNECTED,
    DIALLING,
    DOWN,
    MISMATCHED,
    REFUSED,
    RELEASED,
    RETRIED,
    UP,
)

log = logging.getLogger(__name__)

# Plain ints: going through the enum costs a microsecond per use.
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_SRCFD = int(zmq.SRCFD)

# The C functions below pyzmq's Python layer: 0.9 instead of 4.9 us for a message of two frames
# out, 2.2 instead of 4.9 us in (recv_multipart asks a socket option after each frame).
_raw_send: Any = zmq.backend.Socket.send
_raw_recv: Any = zmq.backend.Socket.recv

_EMPTY = [b""]

_DIAL_AGAIN_S = 0.02  # inproc: nothing tells a channel that its listener is back

_GIVEN_UP_S = 0.5
"""After a connection has ended, until libzmq has said that it dials again, if it does."""

_listening: dict[str, ZmqListener] = {}  # inproc listeners of this process, by address


def listen(address: str, **options: Any) -> Listener:
    """See registry.listen. Options: fields of zmq_socket.Options."""
    return ZmqListener(address, _options(options))


def connect(address: str, **options: Any) -> Channel:
    """See registry.connect. Options: fields of zmq_socket.Options."""
    return ZmqChannel(address, _options(options))


def _options(given: dict[str, Any]) -> zmq_socket.Options:
    unknown = set(given) - set(zmq_socket.Options._fields)
    if unknown:
        raise ConfigError(
            f"unknown option {', '.join(sorted(unknown))};"
            f" known: {', '.join(zmq_socket.Options._fields)}"
        )
    return zmq_socket.Options(**given)


def _capabilities(address: str, max_frame: int) -> Capabilities:
    scheme = address.partition("://")[0]
    return Capabilities(
        scheme=scheme,
        ordered=True,
        copies=True,
        same_host=scheme != "tcp",
        max_frame=max_frame,
        detects_close=True,
    )


def _check_port(address: str) -> None:
    """Raise ConfigError unless a port follows the last colon: libzmq takes 99999 for 34463."""
    port = address.rpartition(":")[2]
    if port != "*" and not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(
            f"{address}: {port!r} is no port; write tcp://HOST:PORT with 1 to 65535, or 0 for a"
            " free one"
        )


class _Base:
    """What both ends do alike: their socket, their monitor, the frames of one message."""

    address: str
    capabilities: Capabilities

    def __init__(
        self, address: str, profile: zmq_socket.Profile, options: zmq_socket.Options, events: int
    ) -> None:
        if address.startswith("ipc://"):
            check_path(address)
        elif address.startswith("tcp://"):
            _check_port(address)
        self.address = address
        self.capabilities = _capabilities(address, options.max_frame)
        self._inproc = address.startswith("inproc://")
        self._max_frame = options.max_frame
        self._max_frames = options.max_frames
        self.garbage = 0
        """Messages that were dropped: of strangers, or with too many frames."""
        self.damaged = 0
        """Messages that were dropped because their checksum did not fit."""
        self._seals: Callable[[Sequence[Buffer]], bytes] | None = None
        self._take_seal: Callable[[list[bytes]], bool] | None = None
        if options.seal and options.security is None and address.startswith("tcp://"):
            from zfabric.transport import seal  # needs a library that others do not

            self._seals, self._take_seal = seal.seal_of, seal.take_seal
        self._closed = False
        self._stirred = False
        self._dry = 0  # times that recv found nothing
        self._socket = zmq_socket.make_socket(profile, options, address)
        self.pollable: Any = self._socket
        self._send: Any = _raw_send.__get__(self._socket)
        self._recv: Any = _raw_recv.__get__(self._socket)
        self._monitor: zmq_socket.Monitor | None = None
        if not self._inproc:
            self._monitor = zmq_socket.Monitor(self._socket, events)
        # Its descriptor rather than the socket: zmq_poll asks each socket twice per wait, at four
        # system calls. A descriptor tells of news once, and _read_monitor always reads all of it.
        self.side_pollable: Any = (
            None if self._monitor is None else self._monitor.socket.get(zmq.FD)
        )
        zmq_socket.live.add(self)
        if os.environ.get("ZFABRIC_DEBUG") == "1":
            _watch_thread(self)

    def stir(self) -> None:
        self._stirred = True

    def _is_time_to_look(self) -> bool:
        """Whether to read the monitor unasked: those who wait without a Poller hear late, but do
        hear. Not each time, since finding nothing there costs 4 us."""
        self._dry += 1
        return not self._dry % 64

    def _rest(self, frames: Sequence[Buffer]) -> None:
        """Send frames after the first part of a message, sharing large unchanging ones."""
        send = self._send
        last = len(frames) - 1
        for index, frame in enumerate(frames):
            share = len(frame) >= LARGE and _never_changes(frame)
            send(frame, _MORE if index < last else _NOBLOCK, not share)

    def _checked(self, frames: Sequence[Buffer]) -> Sequence[Buffer]:
        """The frames as flat buffers, escaped if all are empty. Raises before anything is sent."""
        if not frames:
            raise ValueError("a message has at least one frame")
        # An n-dimensional view's len() counts its first axis; flat ones count bytes.
        flat = [f if type(f) is bytes else memoryview(f).cast("B") for f in frames]
        largest = max(map(len, flat))
        if largest > self._max_frame:
            raise FrameTooLarge(
                f"a frame of {largest} bytes does not fit: {self.address} takes up to"
                f" {self._max_frame}; send it in parts"
            )
        if len(flat) > self._max_frames:
            raise FrameTooLarge(
                f"{len(flat)} frames in a message: more than {self._max_frames} is too many"
            )
        return flat if largest else [*flat, b""]

    def _drop_damaged(self, descriptor: int) -> None:
        """A message came wrong. No byte behind it can be relied on: the connection has to end."""
        from zfabric.transport.seal import shut_down

        self.damaged += 1
        if self.damaged == 1:
            log.warning(
                "%s: a message came damaged, or from a zfabric that sends no checksums; its"
                " connection is made anew, and further ones are only counted",
                self.address,
            )
        if descriptor >= 0:
            shut_down(descriptor)

    def _skip(self) -> None:
        """Drop the rest of a message that has too many frames, without collecting it."""
        self.garbage += 1
        while self._recv(_NOBLOCK, False).more:
            continue

    def _failed(self, exc: zmq.ZMQError) -> TransportError:
        if self._closed or exc.errno in (zmq.ENOTSOCK, zmq.ETERM):
            return ChannelClosed(f"{self.address} was closed here")
        return TransportError(f"{self.address}: {exc}")

    def _shut(self, linger_s: float) -> None:
        self._closed = True
        zmq_socket.live.discard(self)
        if self._monitor is not None:
            self._monitor.close()
        zmq_socket.allow_linger(linger_s)
        self._socket.close(linger=int(linger_s * 1000))

    def _orphan(self) -> None:
        """We are in a forked child: every use fails with a sentence, nothing is touched."""
        self._closed = True
        self._send = self._recv = zmq_socket.forked


class ZmqListener(_Base, Listener):
    """A ROUTER: who is there, who is gone, and what goes to whom."""

    def __init__(self, address: str, options: zmq_socket.Options) -> None:
        super().__init__(address, BOUND, options, ACCEPTED | DOWN | RELEASED)
        self._peers: dict[PeerId, int] = {}  # -> descriptor, -1 where there is none
        self._by_descriptor: dict[int, PeerId] = {}
        self._open: set[int] = set()  # descriptors of connections, as the monitor tells
        self._leaving: deque[PeerId] = deque()  # gone, once the socket is found empty again
        self._users: dict[PeerId, str] = {}  # those that came in with a key
        self._admits: Callable[[str], bool] | None = getattr(options.security, "admits", None)
        self._endless = EndlessMessages()
        self._strangers = Strangers()
        self._lock: PathLock | None = None
        try:
            if address.startswith("ipc://"):
                self._lock = PathLock(address)
            self._bind(address)
        except BaseException:
            self._shut(0.0)
            if self._lock is not None:
                self._lock.release()
            raise

    def _bind(self, address: str) -> None:
        try:
            self._socket.bind(address)
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EADDRINUSE:
                raise AddressInUse(address) from exc
            raise ConfigError(f"cannot listen at {address}: {exc.strerror}") from exc
        if self._inproc:
            _listening[address] = self
        else:
            endpoint = self._socket.get(zmq.LAST_ENDPOINT)
            assert isinstance(endpoint, bytes)
            self.address = endpoint.rstrip(b"\0").decode()

    def send(self, peer: PeerId, frames: Sequence[Buffer]) -> bool:
        simple = True
        for frame in frames:
            if type(frame) is not bytes or len(frame) >= LARGE:
                simple = False
        if not simple or not frames or not frames[0] or len(frames) > self._max_frames:
            frames, simple = self._checked(frames), False
        if peer not in self._peers:
            raise self._gone()
        send = self._send
        try:
            # Only this first part can be refused: from here on the rest is taken as well.
            send(peer, _MORE)
            if self._seals is not None:
                frames = [*frames, self._seals(frames)]
            if simple:
                last = len(frames) - 1
                if last:
                    for frame in frames[:-1]:
                        send(frame, _MORE)
                send(frames[last], _NOBLOCK)
            else:
                self._rest(frames)
        except zmq.Again:
            return False
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EHOSTUNREACH:
                raise self._gone() from None
            raise self._failed(exc) from exc
        return True

    def names_of(self, peer: PeerId) -> tuple[Any, Any] | None:
        """What `getsockname` and `getpeername` say of a peer's connection.

        None where there is no such connection (any more), and on inproc and ipc.
        """
        return _names(self._peers.get(peer, -1))

    def _gone(self) -> ChannelClosed:
        if self._closed:
            return ChannelClosed(f"{self.address} was closed here")
        return ChannelClosed(f"this peer of {self.address} is gone")

    def recv(self) -> tuple[PeerId, list[bytes]] | None:
        recv = self._recv
        take_seal = self._take_seal
        limit = self._max_frames if take_seal is None else self._max_frames + 1
        while True:
            # Those that were known to leave before the socket was empty have nothing in it now.
            leaving = len(self._leaving)
            try:
                peer = recv(_NOBLOCK)
                frames = []
                while True:
                    frame = recv(_NOBLOCK, False)
                    frames.append(frame.bytes if len(frame) < LARGE else frame.buffer)
                    if not frame.more:
                        break
                    if len(frames) > limit:  # one more than a sender may: it escapes empty ones
                        self._skip()
                        break
            except zmq.Again:
                while leaving:
                    leaving -= 1
                    peer = self._leaving.popleft()
                    self._users.pop(peer, None)
                    if self._peers.pop(peer, None) is not None:
                        return peer, []
                if self._stirred or self._is_time_to_look():
                    self._read_monitor()
                if self._leaving:
                    continue
                return None
            except zmq.ZMQError as exc:
                raise self._failed(exc) from exc
            if frame.more:
                continue
            if self._endless.watched:
                self._endless.watched.discard(peer)
            if (
                take_seal is not None
                and frames != _EMPTY
                and (peer not in self._peers or not take_seal(frames))
            ):
                self._drop_damaged(self._descriptor_of(peer, frame))
                continue
            if frames[0] and peer in self._peers:
                return peer, frames
            message = self._odd(peer, frames, frame)
            if message is not None:
                return peer, message

    def _descriptor_of(self, peer: PeerId, frame: zmq.Frame) -> int:
        """The connection of a peer, known or not, whose frame this is; -1: it is gone already."""
        self._read_monitor()
        if peer in self._peers:
            descriptor = self._peers[peer]
            return descriptor if self._by_descriptor.get(descriptor) == peer else -1
        try:
            # It did not say who it is: its first message, which says so, came damaged.
            descriptor = int(frame.get(_SRCFD))
        except zmq.ZMQError:
            return -1
        return descriptor if descriptor not in self._by_descriptor else -1

    def _odd(self, peer: PeerId, frames: list[bytes], last: zmq.Frame) -> list[bytes] | None:
        """A message that begins with an empty frame, or comes from somebody unknown."""
        if peer not in self._peers:
            if frames == _EMPTY:
                self._welcome(peer, last)
            else:
                self.garbage += 1
            return None
        if any(len(frame) for frame in frames):
            return frames
        if len(frames) > 1:
            return frames[1:]
        if self._inproc:
            del self._peers[peer]
            return []
        self.garbage += 1
        return None

    def shut_endless(self) -> int:
        self._read_monitor()
        return self._endless.look(self._open, self._by_descriptor)

    def user_of(self, peer: PeerId) -> str:
        return self._users.get(peer, "")

    def evict(self, admits: Callable[[str], bool]) -> None:
        # libzmq cannot be told to close one connection of a ROUTER. A peer that is not known here
        # is not read, not answered, and has no state; its user is asked for if it says hello again.
        for peer, user in list(self._users.items()):
            if not admits(user):
                del self._users[peer]
                descriptor = self._peers.pop(peer, -1)
                if self._by_descriptor.get(descriptor) == peer:
                    del self._by_descriptor[descriptor]

    def _welcome(self, peer: PeerId, probe: zmq.Frame) -> None:
        if self._admits is not None:
            user = user_of(probe)
            if not user or not self._admits(user):
                self.garbage += 1
                return
            self._users[peer] = user
        if self._monitor is None:
            self._peers[peer] = -1
            return
        try:
            descriptor = int(probe.get(_SRCFD))
        except zmq.ZMQError:
            # Without any metadata: a stranger that was taken for ZMTP 1.0 and sent two zeros.
            self._users.pop(peer, None)
            self.garbage += 1
            return
        self._peers[peer] = descriptor
        self._read_monitor()
        # Its descriptor may be closed already, or even serve somebody else by now; that one will
        # say hello as well, and then it becomes clear that the former is gone.
        former = self._by_descriptor.get(descriptor)
        if former is not None:
            self._leaving.append(former)
        if descriptor in self._open:
            self._by_descriptor[descriptor] = peer
            self._strangers.known(descriptor)
        else:
            self._leaving.append(peer)

    def _read_monitor(self) -> None:
        self._stirred = False
        if self._monitor is None:
            return
        for event, descriptor in self._monitor.read():
            if event == ACCEPTED:
                self._open.add(descriptor)
                self._strangers.came(descriptor)
            elif event == DOWN:
                self._open.discard(descriptor)
                self._strangers.left(descriptor)
                peer = self._by_descriptor.pop(descriptor, None)
                if peer is not None:
                    self._leaving.append(peer)
        self.refused += self._strangers.thin_out()

    def idle_s(self) -> float | None:
        return 0.0 if self._leaving else None

    def close(self, linger_s: float = 0.0) -> None:
        if self._closed:
            return
        if self._inproc:
            if _listening.get(self.address) is self:
                del _listening[self.address]
            self._farewell()
        self._unbind()
        self._shut(linger_s)
        if self._lock is not None:
            self._lock.release()

    def _farewell(self) -> None:
        for peer in self._peers:
            try:
                self._send(peer, _MORE)
                self._send(b"", _NOBLOCK)
            except zmq.ZMQError:  # gone or full; the latter finds out by being unable to send
                continue

    def _unbind(self) -> None:
        """Free the address before we return; by itself libzmq would do so at its leisure, and
        the next bind would find the port in use."""
        try:
            self._socket.unbind(self.address)
        except zmq.ZMQError:
            return
        if self._monitor is not None:
            self._monitor.wait_released(1.0)


class ZmqChannel(_Base, Channel):
    """A DEALER with one connection, or none at the moment."""

    def __init__(self, address: str, options: zmq_socket.Options) -> None:
        events = CONNECTED | RETRIED | UP | DOWN | REFUSED | MISMATCHED
        super().__init__(address, DIALLING, options, events)
        self._up = False
        self._descriptor = -1  # of the latest connection
        self._lost = False
        self._clear = False  # up, and nobody has yet to hear that it was not
        self._redial_at = inf  # unless libzmq says before that it dials again
        self._dialled = address  # `address` may come to be told with a key
        try:
            if self._inproc:
                self._dial()
            else:
                self._socket.connect(address)
        except BaseException as exc:
            self._shut(0.0)
            if isinstance(exc, zmq.ZMQError):
                raise ConfigError(f"cannot connect to {address}: {exc.strerror}") from exc
            raise

    def _dial(self) -> bool:
        """inproc only: link up with the listener, if there is one. A link to none would take
        messages now and give them to whoever listens there next."""
        if not self._up and self.address in _listening and not self._closed:
            self._socket.connect(self.address)
            self._up = True
        return self._up

    def send(self, frames: Sequence[Buffer]) -> bool:
        simple = True
        for frame in frames:
            if type(frame) is not bytes or len(frame) >= LARGE:
                simple = False
        if not simple or not frames or not frames[0] or len(frames) > self._max_frames:
            frames, simple = self._checked(frames), False
        if not self._clear and not self._is_clear():
            return False
        seals = self._seals
        if seals is not None:
            frames = [*frames, b""]  # its place: what is refused at its first part needs none
        send = self._send
        last = len(frames) - 1
        index = 0
        try:
            if simple:
                for frame in frames[:-1] if last else ():
                    send(frame, _MORE)
                    index += 1
                send(frames[last] if seals is None else seals(frames[:last]), _NOBLOCK)
            else:
                for frame in frames:
                    if index == last and seals is not None:
                        frame = seals(frames[:last])
                    share = len(frame) >= LARGE and _never_changes(frame)
                    send(frame, _MORE if index < last else _NOBLOCK, not share)
                    index += 1
        except zmq.Again:
            if 0 < index < last:
                self._swallow(frames[index + 1 :])
            return False
        except zmq.ZMQError as exc:
            raise self._failed(exc) from exc
        return True

    def _is_clear(self) -> bool:
        """Whether what is sent now goes over a connection that the caller knows of.

        libzmq tells of a broken connection before it takes down the pipe to it, and what is sent
        in between is lost after the caller was told `[]`. So after that we wait for the next
        connection's handshake; and when that was quick, for the caller to take the `[]` first.
        """
        if self._closed:
            return True  # and let the socket say so
        if self._inproc:
            self._clear = self._dial()
        else:
            self._read_monitor()
        return self._clear

    def _swallow(self, frames: Sequence[Buffer]) -> None:
        """The connection broke between two frames: libzmq took back what it had of the message
        and now drops up to its end. Give it the end, or it eats the next message instead."""
        try:
            self._rest(frames)
        except zmq.Again:
            return

    def recv(self) -> list[bytes] | None:
        recv = self._recv
        take_seal = self._take_seal
        limit = self._max_frames if take_seal is None else self._max_frames + 1
        while True:
            lost = self._lost
            try:
                frames = []
                while True:
                    frame = recv(_NOBLOCK, False)
                    frames.append(frame.bytes if len(frame) < LARGE else frame.buffer)
                    if not frame.more:
                        break
                    if len(frames) > limit:  # one more than a sender may: it escapes empty ones
                        self._skip()
                        break
            except zmq.Again:
                if lost:
                    self._lost = False
                    self._clear = self._up
                    return []
                if self._stirred or self._is_time_to_look():
                    self._read_monitor()
                if self._lost:
                    continue
                return None
            except zmq.ZMQError as exc:
                raise self._failed(exc) from exc
            if frame.more:
                continue
            if take_seal is not None and not take_seal(frames):
                self._read_monitor()
                self._drop_damaged(self._descriptor if self._up else -1)
                continue
            if frames[0] or any(len(frame) for frame in frames):
                return frames
            if len(frames) > 1:
                return frames[1:]
            if self._inproc:
                self._socket.disconnect(self.address)
                self._up = self._clear = False
                return []

    def _read_monitor(self) -> None:
        self._stirred = False
        if self._monitor is None:
            return
        for event, descriptor in self._monitor.read():
            if event == CONNECTED:
                self._descriptor = descriptor  # UP does not say it
                self._redial_at = inf
            elif event == RETRIED:
                self._redial_at = inf
            elif event == UP:
                self._up = True
                self.trouble = ""
            elif event != DOWN:
                self.trouble = REFUSED_KEY if event == REFUSED else OTHER_KEYS
            else:
                self._redial_at = now_s() + _GIVEN_UP_S
                if self._up:  # a dial that failed in its handshake was never up
                    self._up = False
                    self._lost = True
        self._clear = self._up and not self._lost

    def _redial(self) -> None:
        """libzmq has given up: after a breach of ZMTP's rules it lets go of the other end."""
        self._redial_at = inf
        with suppress(zmq.ZMQError):
            self._socket.disconnect(self._dialled)
        with suppress(zmq.ZMQError):
            self._socket.connect(self._dialled)

    def names(self) -> tuple[Any, Any] | None:
        """What `getsockname` and `getpeername` say of the latest connection; None without one."""
        return _names(self._descriptor)

    def idle_s(self) -> float | None:
        if self._lost:
            return 0.0
        if self._inproc and not self._up:
            return 0.0 if self._dial() else _DIAL_AGAIN_S
        if self._redial_at < inf:
            self._read_monitor()
            left_s = self._redial_at - now_s()
            if left_s > 0.0:
                return left_s if left_s < inf else None
            self._redial()
        return None

    def close(self, linger_s: float = 0.0) -> None:
        if self._closed:
            return
        if self._inproc and self._up:
            with suppress(zmq.ZMQError):  # full: the listener finds out when it sends
                self._send(b"", _NOBLOCK)
        self._shut(linger_s)


def _names(descriptor: int) -> tuple[Any, Any] | None:
    """The two addresses of a connection that libzmq's I/O thread owns and may close meanwhile.

    A descriptor that was closed and serves another connection by now gives the addresses of that
    one: good for showing to people, no proof of anything.
    """
    if descriptor < 0:
        return None
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            return connection.getsockname(), connection.getpeername()
    except OSError:
        return None


def _never_changes(frame: Buffer) -> bool:
    return type(frame) is bytes or (type(frame) is memoryview and frame.readonly)


def _watch_thread(endpoint: Any) -> None:
    """ZFABRIC_DEBUG=1: a second thread at an endpoint gets an error here instead of, at some
    later moment, an abort of the process by libzmq."""
    owner: list[int] = []

    def watched(name: str) -> Any:
        method = getattr(endpoint, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not owner:
                owner.append(threading.get_ident())
            if owner[0] != threading.get_ident():
                raise InternalError(
                    f"{name} on {endpoint.address} from thread {threading.get_ident()}, but it"
                    f" belongs to thread {owner[0]}: one thread owns an endpoint for life"
                )
            return method(*args, **kwargs)

        return call

    for name in ("send", "recv", "close"):
        setattr(endpoint, name, watched(name))
