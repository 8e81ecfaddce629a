"""Values between processes of one host: their memory is handed over, not copied.

A worker listens on a Unix socket of the abstract namespace, whose name is random and which leaves
nothing behind in any directory. What crosses it are questions, and descriptors of memfds: who asks
for a value maps the holder's memory, who puts one hands over memory of its own. Processes of
another user are turned away; another host, or a container with a network of its own, finds nobody
under that name, and takes the next way.

A memfd is sealed once it is written, so that nobody can change or shorten what others have mapped;
or it is one of `segments`, which is written again only when nobody has it any more.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from msgpack import packb, unpackb

from zfabric.errors import CodecError
from zfabric.messages import MAX_BUFFERS
from zfabric.runtime.segments import is_settled
from zfabric.runtime.slot_values import sealed
from zfabric.runtime.store import Store
from zfabric.runtime.value import Value

SCHEME = "shm:"
GET, PUT = 0, 1
MAX_PACKET = 160 * 1024
"""Below the usual 208 KiB of a socket's buffer."""
MAX_CALLERS = 1024
DRAIN = 64
_ANCILLARY = socket.CMSG_SPACE(4)
_CREDENTIALS = struct.Struct("iII")


class Reply(NamedTuple):
    """What a door said of a value.

    value: for a question, None where it is not there.  error: for a Put, "" when it is kept.
    """

    id: int
    is_put: bool
    value: Value | None
    error: str


def _receive(sock: socket.socket) -> tuple[bytes, int]:
    """(packet, descriptor or -1); an empty packet is the end. Raises OSError."""
    data, ancillary, flags, _ = sock.recvmsg(MAX_PACKET, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, body in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.extend(array("i", body[: len(body) // 4 * 4]))
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or len(fds) > 1:
        for fd in fds:
            os.close(fd)
        raise OSError(errno.EMFILE, "a packet or its descriptor was cut off")
    return data, fds[0] if fds else -1


def _send(sock: socket.socket, packet: Any, fd: int) -> None:
    """Raises OSError when the packet is too large, or the socket is full or gone."""
    data = packb(packet)
    if len(data) > MAX_PACKET:
        raise OSError(errno.EMSGSIZE, "the sizes of a value are too many for one packet")
    if fd >= 0:
        socket.send_fds(sock, [data], [fd])
    else:
        sock.send(data)


def _value(sizes: Any, data: Any, fd: int) -> Value:
    """Raises CodecError for what is no value, or could change. Takes over the descriptor."""
    try:
        if type(sizes) is not list or len(sizes) > MAX_BUFFERS:
            raise CodecError("a value without proper sizes")
        if any(type(size) is not int for size in sizes):
            raise CodecError("a value whose sizes are no numbers")
        if fd < 0:
            if type(data) is not bytes:
                raise CodecError("a value without its bytes")
            return Value.from_bytes(sizes, data)
        if not is_settled(fd):
            raise CodecError("a value in memory that may change")
        if data is not None and type(data) is not int:
            raise CodecError("a value whose place in a slab is no number")
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise
    if data is None:
        return Value.from_file(sizes, fd)
    return Value.from_slab(sizes, fd, data, is_whole=True)


class MemoryDoor:
    """Serves a store to processes of this user on this host.

    address: tells others of it; who dials before anybody serves waits.
    on_put: called with (id, nbytes) when somebody has put a value into the store.
    """

    def __init__(
        self,
        store: Store,
        on_put: Callable[[int, int], None],
        name: str,
    ) -> None:
        """Raises OSError where there are no such sockets."""
        self.address = SCHEME + name
        self._store = store
        self._on_put = on_put
        self._callers: dict[int, socket.socket] = {}
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self._sock.bind("\0" + name)
            self._sock.listen(128)
        except BaseException:
            self._sock.close()
            raise

    def watch(self, watch: Callable[[int], None], discard: Callable[[int], None]) -> None:
        """Begin to serve, in the thread that calls this and then on_ready()."""
        self._watch = watch
        self._discard = discard
        watch(self._sock.fileno())

    def owns(self, fd: int) -> bool:
        """Whether a descriptor that is readable is one of this door's."""
        return fd in self._callers or fd == self._sock.fileno()

    def on_ready(self, fd: int) -> None:
        """A caller has something, or there is a new one."""
        caller = self._callers.get(fd)
        if caller is None:
            self._accept()
            return
        try:
            for _ in range(DRAIN):
                packet, got = _receive(caller)
                if not packet:
                    raise OSError(errno.EPIPE, "closed")
                self._answer(caller, packet, got)
        except BlockingIOError:
            pass
        except (OSError, ValueError, TypeError):
            self._drop(fd)

    def _accept(self) -> None:
        try:
            caller, _ = self._sock.accept()
        except OSError:
            return
        size = _CREDENTIALS.size
        who = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        if _CREDENTIALS.unpack(who)[1] != os.geteuid() or len(self._callers) >= MAX_CALLERS:
            caller.close()
            return
        caller.setblocking(False)
        self._callers[caller.fileno()] = caller
        self._watch(caller.fileno())

    def _answer(self, caller: socket.socket, packet: bytes, fd: int) -> None:
        kind, id_, sizes, data = unpackb(packet)
        if kind == PUT:
            error = ""
            try:
                value = _value(sizes, data, fd)
                if not self._store.make_room(value.nbytes):
                    raise OSError(errno.ENOMEM, self._store.why_no_room(value.nbytes))
            except OSError as exc:
                error = exc.strerror or str(exc)
            except CodecError as exc:
                error = str(exc)
            else:
                if id_ not in self._store:
                    self._store.put(id_, value)
                    self._on_put(id_, value.nbytes)
            _send(caller, (PUT, id_, None, error), -1)
            return
        if fd >= 0:
            os.close(fd)
        with self._store.holding(id_) as value:
            if value is None:
                _send(caller, (GET, id_, None, None), -1)
            elif value.fd < 0:
                _send(caller, (GET, id_, value.sizes, bytes(value.area)), -1)
            else:
                seal(value.fd)
                offset = None if value.slab is None else value.offset
                _send(caller, (GET, id_, value.sizes, offset), value.fd)

    def _drop(self, fd: int) -> None:
        caller = self._callers.pop(fd)
        self._discard(fd)
        caller.close()

    def close(self) -> None:
        """Free the name and all connections."""
        for fd in list(self._callers):
            self._drop(fd)
        self._discard(self._sock.fileno())
        self._sock.close()


class MemoryLink:
    """The caller's side of a door."""

    def __init__(self, address: str) -> None:
        """Raises OSError when there is nobody: on another host, for example."""
        self.address = address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self._sock.connect("\0" + address.removeprefix(SCHEME))
        except BaseException:
            self._sock.close()
            raise
        self.fd = self._sock.fileno()

    def get(self, id_: int) -> None:
        """Ask for a value. Raises OSError."""
        _send(self._sock, (GET, id_, None, None), -1)

    def put(self, id_: int, sizes: Sequence[int], fd: int) -> None:
        """Offer a value that lies in a sealed memfd. Raises OSError."""
        _send(self._sock, (PUT, id_, list(sizes), None), fd)

    def put_bytes(self, id_: int, sizes: Sequence[int], data: bytes) -> None:
        """Offer a small value. Raises OSError."""
        _send(self._sock, (PUT, id_, list(sizes), data), -1)

    def replies(self) -> list[Reply]:
        """What has come. Raises OSError when the other end is gone, or makes no sense."""
        found: list[Reply] = []
        try:
            while True:
                packet, fd = _receive(self._sock)
                if not packet:
                    if not found:
                        raise OSError(errno.EPIPE, "closed")
                    return found
                kind, id_, sizes, data = unpackb(packet)
                value = None
                if kind == GET and sizes is not None:
                    value = _value(sizes, data, fd)
                found.append(Reply(id_, kind == PUT, value, data if kind == PUT else ""))
        except BlockingIOError:
            return found
        except (ValueError, TypeError, CodecError) as exc:
            raise OSError(errno.EPROTO, str(exc)) from exc

    def close(self) -> None:
        self._sock.close()


def seal(fd: int) -> None:
    """See to it that a memfd changes no more. Raises OSError where that cannot be."""
    if not is_settled(fd):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, sealed())
