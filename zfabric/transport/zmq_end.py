"""What both ends on ZeroMQ do alike: their socket, their monitor, the frames of a message."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from zfabric.errors import ChannelClosed, ConfigError, FrameTooLarge, InternalError, TransportError
from zfabric.transport import zmq_socket
from zfabric.transport.contract import LARGE, Buffer, Capabilities
from zfabric.transport.ipc_path import check_path

log = logging.getLogger(__name__)

# Plain ints: going through the enum costs a microsecond per use.
NOBLOCK = int(zmq.NOBLOCK)
MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

# The C functions below pyzmq's Python layer: 0.9 instead of 4.9 us for a message of two frames
# out, 2.2 instead of 4.9 us in (recv_multipart asks a socket option after each frame).
_raw_send: Any = zmq.backend.Socket.send
_raw_recv: Any = zmq.backend.Socket.recv


class ZmqEnd:
    """A socket with its monitor."""

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
            share = len(frame) >= LARGE and never_changes(frame)
            send(frame, MORE if index < last else NOBLOCK, not share)

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
        while self._recv(NOBLOCK, False).more:
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


def names_of(descriptor: int) -> tuple[Any, Any] | None:
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


def never_changes(frame: Buffer) -> bool:
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
