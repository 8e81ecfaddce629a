"""Messages on one plain TCP connection: greeting, lengths, frames; both directions, no blocking.

    connection = greeting message*          greeting: 8 bytes, the same from both ends
    message    = count size{count} frame{count}
    count      = uint32, 1 .. max_frames    size = uint64, 0 .. max_frame      little-endian

Every number is checked before memory is allocated for it. A stream that breaks a rule is closed:
after one wrong length there is no way to find the next message.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from zfabric.clock import now_s
from zfabric.config import DEFAULTS, MiB
from zfabric.errors import ConfigError, FrameTooLarge
from zfabric.transport.contract import LARGE, Buffer, Capabilities

GREETING = b"zfsock\x00\x01"
"""Name and version. It begins like no protocol that scanners speak."""

_COUNT = struct.Struct("<I")
_READ = 256 * 1024
_BURST = 4 * MiB  # bytes read from one connection before the others have their turn
_VECTOR = min(os.sysconf("SC_IOV_MAX"), 64)


class Options(NamedTuple):
    """What a caller may choose about an endpoint."""

    max_frame: int = DEFAULTS.max_frame
    max_frames: int = 65_536
    max_message: int = 256 * MiB
    """Bytes of all frames of a message."""
    hwm: int = 1000
    """Messages that may queue for a peer."""
    hwm_bytes: int = 32 * MiB
    """Bytes that may queue for a peer; the message that crosses this is still taken whole."""

    @classmethod
    def of(cls, given: dict[str, Any]) -> Options:
        """From keyword arguments. Raises ConfigError for one that is unknown or not above 0."""
        unknown = set(given) - set(cls._fields)
        if unknown:
            raise ConfigError(
                f"unknown option {', '.join(sorted(unknown))}; known: {', '.join(cls._fields)}"
            )
        return cls(**given).check()

    def capabilities(self, scheme: str) -> Capabilities:
        """What an endpoint of such a stream between processes promises."""
        return Capabilities(
            scheme=scheme,
            ordered=True,
            copies=True,
            same_host=False,
            max_frame=self.max_frame,
            detects_close=True,
        )

    def check(self) -> Options:
        """Itself. Raises ConfigError if a limit is not above 0."""
        for name, value in zip(self._fields, self, strict=True):
            if value <= 0:
                raise ConfigError(f"{name} must be above 0, not {value}")
        return self


class BrokenStream(Exception):
    """The other end broke a rule; the text says which."""


def packed(frames: Sequence[Buffer], options: Options) -> list[Buffer]:
    """The buffers of one message on the wire: small parts joined, large ones as they are.

    Raises ValueError without frames, FrameTooLarge beyond a limit.
    """
    if not frames:
        raise ValueError("a message has at least one frame")
    flat = [f if type(f) is bytes else memoryview(f).cast("B") for f in frames]
    sizes = [len(f) for f in flat]
    if max(sizes) > options.max_frame:
        raise FrameTooLarge(
            f"a frame of {max(sizes)} bytes does not fit: the limit is {options.max_frame};"
            " send it in parts"
        )
    if len(flat) > options.max_frames or sum(sizes) > options.max_message:
        raise FrameTooLarge(
            f"a message of {len(flat)} frames and {sum(sizes)} bytes does not fit: the limits are"
            f" {options.max_frames} and {options.max_message}"
        )
    parts: list[Buffer] = []
    small: list[Buffer] = [struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
    for frame, size in zip(flat, sizes, strict=True):
        if size < LARGE:
            small.append(frame)
        else:
            parts += (b"".join(small), frame if _never_changes(frame) else bytes(frame))
            small = []
    if small:
        parts.append(b"".join(small))
    return parts


def _never_changes(frame: Buffer) -> bool:
    return type(frame) is bytes or (type(frame) is memoryview and frame.readonly)


class Stream:
    """One connected socket and what is half done on it. Owns the socket."""

    def __init__(self, sock: socket.socket, options: Options) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Silent deaths are found in some 30 s instead of two hours, as for ZeroMQ.
        for name, value in (("KEEPIDLE", 10), ("KEEPINTVL", 5), ("KEEPCNT", 4)):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
        self.sock = sock
        self.fd = sock.fileno()
        self.greeted = False
        """The other end's greeting was read: it speaks our language."""
        self.wants_write = False
        """Bytes are waiting for the socket to become writable."""
        self._options = options
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._ends: deque[int] = deque()  # for each queued message, bytes ever queued at its end
        self._queued_ever = 0
        self._in = bytearray()
        self._sizes: tuple[int, ...] | None = None
        self._frames: list[bytes] = []
        self._large: memoryview | None = None  # the frame that is being received in place
        self._large_at = 0

    # --- out ---

    @property
    def full(self) -> bool:
        """Whether the queue is at one of its limits."""
        return len(self._ends) >= self._options.hwm or self._out_bytes >= self._options.hwm_bytes

    def put(self, parts: Sequence[Buffer]) -> None:
        """Queue the parts of one message and send what can be sent now. Raises OSError."""
        for part in parts:
            self._out.append(memoryview(part))
            self._out_bytes += len(part)
            self._queued_ever += len(part)
        self._ends.append(self._queued_ever)
        if not self.wants_write:
            self.flush()

    def flush(self) -> None:
        """Send what the socket takes. Raises OSError when the connection is broken."""
        out = self._out
        try:
            while out:
                sent = self.sock.sendmsg([out[i] for i in range(min(len(out), _VECTOR))])
                self._out_bytes -= sent
                while sent:
                    first = out[0]
                    if sent < len(first):
                        out[0] = first[sent:]
                        break
                    sent -= len(first)
                    out.popleft()
        except BlockingIOError:
            pass
        gone = self._queued_ever - self._out_bytes
        while self._ends and self._ends[0] <= gone:
            self._ends.popleft()
        self.wants_write = bool(out)

    # --- in ---

    def fill(self, inbox: list[list[bytes]]) -> bool:
        """Read what is there, up to a fair share, and append whole messages to `inbox`.

        False: the other end closed. Raises BrokenStream, OSError.
        """
        budget = _BURST
        try:
            while budget > 0:
                if self._large is not None:
                    count = self.sock.recv_into(self._large[self._large_at :])
                    self._large_at += count
                    if self._large_at == len(self._large):
                        self._finish_large(inbox)
                    wanted = budget  # as much as there is
                else:
                    data = self.sock.recv(_READ)
                    count, wanted = len(data), _READ
                    self._in += data
                    self._parse(inbox)
                if count == 0:
                    return False
                budget -= count
                if count < wanted and self._large is None:
                    break  # most likely drained; epoll tells if not
        except BlockingIOError:
            pass
        return True

    def _finish_large(self, inbox: list[list[bytes]]) -> None:
        assert self._large is not None
        assert self._sizes is not None
        self._frames.append(self._large.toreadonly())  # type: ignore[arg-type]
        self._large = None
        if len(self._frames) == len(self._sizes):
            self._deliver(inbox)

    def _deliver(self, inbox: list[list[bytes]]) -> None:
        inbox.append(self._frames)
        self._frames, self._sizes = [], None

    def _parse(self, inbox: list[list[bytes]]) -> None:
        data = self._in
        at = 0
        if not self.greeted:
            if data[: len(GREETING)] != GREETING[: len(data)]:
                raise BrokenStream("it did not greet")
            if len(data) < len(GREETING):
                return
            self.greeted = True
            at = len(GREETING)
        with memoryview(data) as view:
            while True:
                if self._sizes is None:
                    at = self._head(view, at)
                    if self._sizes is None:
                        break
                at = self._take_frames(view, at)
                if len(self._frames) < len(self._sizes):
                    break
                self._deliver(inbox)
        del data[:at]

    def _head(self, view: memoryview, at: int) -> int:
        """Read count and sizes if they are all there; the place after them, or `at`."""
        if len(view) - at < 4:
            return at
        count: int = _COUNT.unpack_from(view, at)[0]
        if not 0 < count <= self._options.max_frames:
            raise BrokenStream(f"a message of {count} frames")
        end = at + 4 + 8 * count
        if len(view) < end:
            return at
        sizes = struct.unpack_from(f"<{count}Q", view, at + 4)
        if max(sizes) > self._options.max_frame or sum(sizes) > self._options.max_message:
            raise BrokenStream(f"a frame of {max(sizes)}, a message of {sum(sizes)} bytes")
        self._sizes = sizes
        return end

    def _take_frames(self, view: memoryview, at: int) -> int:
        """Move whole frames out of the buffer; begin a large one in its own memory."""
        assert self._sizes is not None
        for size in self._sizes[len(self._frames) :]:
            if len(view) - at < size:
                if size >= LARGE:
                    self._large = memoryview(bytearray(size))
                    self._large_at = len(view) - at
                    self._large[: self._large_at] = view[at:]
                    return len(view)
                return at
            self._frames.append(bytes(view[at : at + size]))
            at += size
        return at

    # --- end ---

    def close(self, linger_s: float = 0.0) -> None:
        """Close the socket; with a linger, wait up to that long for what is queued to arrive."""
        if linger_s > 0.0:
            with suppress(OSError):
                self._drain(now_s() + linger_s)
        self.sock.close()

    def _drain(self, deadline: float) -> None:
        """Send all, then read until the other end closes: closing a socket that has unread bytes
        resets the connection, and the reset destroys what the other end has not read yet."""
        while self._out:
            self.sock.settimeout(max(0.001, deadline - now_s()))
            self._out[0] = self._out[0][self.sock.send(self._out[0]) :]
            if not self._out[0]:
                self._out.popleft()
        self.sock.shutdown(socket.SHUT_WR)
        while (left_s := deadline - now_s()) > 0.0:
            self.sock.settimeout(left_s)
            if not self.sock.recv(_READ):
                return
