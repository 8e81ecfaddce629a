"""`sock+tcp://host:port`: the same contract on plain sockets, to compare ZeroMQ with.

No thread works behind our back: bytes move only while somebody sends, receives or waits in a
`Poller`. Each endpoint's `pollable` is one epoll descriptor, which also becomes readable when a
message that was half sent can go on; `recv` then sends it. We read from sockets only when all
messages read before have been taken, so that a slow reader slows its peers down and its memory
stays bounded.
"""

from __future__ import annotations

import errno
import os
import random
import select
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

from zfabric.clock import now_s
from zfabric.errors import AddressInUse, ChannelClosed, ConfigError
from zfabric.transport.contract import Buffer, Channel, Listener, PeerId
from zfabric.transport.plain_stream import GREETING, BrokenStream, Options, Stream, packed

SCHEME = "sock+tcp"
HANDSHAKE_S = 10.0
CONNECT_S = 5.0
REDIAL_S = 0.05
REDIAL_MAX_S = 10.0

_READ = select.EPOLLIN
_BOTH = select.EPOLLIN | select.EPOLLOUT
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


def listen(address: str, **options: Any) -> Listener:
    """See registry.listen. Options: fields of plain_stream.Options."""
    return PlainListener(address, Options.of(options))


def connect(address: str, **options: Any) -> Channel:
    """See registry.connect. Options: fields of plain_stream.Options."""
    return PlainChannel(address, Options.of(options))


def _host_and_port(address: str) -> tuple[str, int]:
    rest = address.partition("://")[2]
    host, colon, port = rest.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535 or not host:
        raise ConfigError(f"{address!r} is not an address; write {SCHEME}://127.0.0.1:8786")
    host = host.removeprefix("[").removesuffix("]")
    return ("0.0.0.0" if host == "*" else host), int(port)


def _resolved(address: str) -> tuple[int, Any]:
    """The family and socket address behind an address. Raises ConfigError, OSError."""
    host, port = _host_and_port(address)
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, place


class PlainListener(Listener):
    """One epoll for the listening socket and all peers. `garbage` counts connections that were
    closed because they broke a rule, `refused` those for which there was no descriptor left."""

    def __init__(self, address: str, options: Options) -> None:
        self.capabilities = options.capabilities(SCHEME)
        self.garbage = 0
        self._options = options
        self._closed = False
        self._next_peer = 0
        self._peers: dict[PeerId, Stream] = {}
        self._by_fd: dict[int, tuple[PeerId, Stream]] = {}
        self._ungreeted: dict[int, float] = {}  # descriptor -> when our patience ends; in order
        self._inbox: deque[tuple[PeerId, list[bytes]]] = deque()
        self._socket = self._bound(address)
        host, port = self._socket.getsockname()[:2]
        self.address = f"{SCHEME}://[{host}]:{port}" if ":" in host else f"{SCHEME}://{host}:{port}"
        self._epoll = select.epoll()
        self._epoll.register(self._socket, _READ)
        self.pollable = self._epoll.fileno()
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    @staticmethod
    def _bound(address: str) -> socket.socket:
        try:
            family, place = _resolved(address)
        except OSError as exc:
            raise ConfigError(f"cannot listen at {address}: {exc.strerror}") from exc
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            # A restart must not wait for connections of the last run to fade.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(place)
            sock.listen(4096)
        except OSError as exc:
            sock.close()
            if exc.errno == errno.EADDRINUSE:
                raise AddressInUse(address) from exc
            raise ConfigError(f"cannot listen at {address}: {exc.strerror}") from exc
        return sock

    def send(self, peer: PeerId, frames: Sequence[Buffer]) -> bool:
        stream = self._peers.get(peer)
        if stream is None:
            raise self._gone()
        parts = packed(frames, self._options)
        if stream.full:
            return False
        try:
            stream.put(parts)
        except OSError:
            self._read(peer, stream)  # what came before the end is still there
            self._drop(peer, stream)
            raise self._gone() from None
        if stream.wants_write:
            self._epoll.modify(stream.fd, _BOTH)
        return True

    def _gone(self) -> ChannelClosed:
        if self._closed:
            return ChannelClosed(f"{self.address} was closed here")
        return ChannelClosed(f"this peer of {self.address} is gone")

    def recv(self) -> tuple[PeerId, list[bytes]] | None:
        if self._inbox:
            return self._inbox.popleft()
        if self._closed:
            raise self._gone()
        for fd, event in self._epoll.poll(0):
            known = self._by_fd.get(fd)
            if known is None:
                self._accept()
                continue
            if event & select.EPOLLOUT:
                self._flush(*known)
            if event & ~select.EPOLLOUT:
                self._read(*known)
        return self._inbox.popleft() if self._inbox else None

    def _accept(self) -> None:
        for _ in range(64):  # then those who are connected have their turn
            try:
                sock, _place = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in _OUT_OF_DESCRIPTORS:
                    self._refuse()
                return
            self._next_peer += 1
            peer = self._next_peer.to_bytes(8, "little")
            stream = Stream(sock, self._options)
            self._peers[peer] = stream
            self._by_fd[stream.fd] = (peer, stream)
            self._ungreeted[stream.fd] = now_s() + HANDSHAKE_S
            self._epoll.register(stream.fd, _READ)
            try:
                stream.put([GREETING])
            except OSError:
                self._drop(peer, stream)

    def _refuse(self) -> None:
        """No descriptor is left. Take the connection with the spare one and close it: left in
        the queue it would keep epoll awake, and its peer waiting."""
        os.close(self._spare_fd)
        try:
            self._socket.accept()[0].close()
            self.refused += 1
        except OSError:
            pass
        finally:
            self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _flush(self, peer: PeerId, stream: Stream) -> None:
        try:
            stream.flush()
        except OSError:
            self._read(peer, stream)
            self._drop(peer, stream)
            return
        if not stream.wants_write:
            self._epoll.modify(stream.fd, _READ)

    def _read(self, peer: PeerId, stream: Stream) -> None:
        if peer not in self._peers:
            return
        messages: list[list[bytes]] = []
        try:
            alive = stream.fill(messages)
        except BrokenStream:
            self.garbage += 1
            alive = False
        except OSError:
            alive = False
        if stream.greeted:
            self._ungreeted.pop(stream.fd, None)
        for frames in messages:
            self._inbox.append((peer, frames))
        if not alive:
            self._drop(peer, stream)

    def _drop(self, peer: PeerId, stream: Stream) -> None:
        if self._peers.pop(peer, None) is None:
            return
        del self._by_fd[stream.fd]
        self._ungreeted.pop(stream.fd, None)
        self._epoll.unregister(stream.fd)
        stream.close()
        if stream.greeted:  # of strangers nobody ever heard
            self._inbox.append((peer, []))

    def idle_s(self) -> float | None:
        now = now_s()
        while self._ungreeted:
            fd, patience_ends = next(iter(self._ungreeted.items()))
            if patience_ends > now:
                return 0.0 if self._inbox else patience_ends - now
            self.garbage += 1
            self._drop(*self._by_fd[fd])
        return 0.0 if self._inbox else None

    def close(self, linger_s: float = 0.0) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.clear()
        deadline = now_s() + linger_s
        self._epoll.close()
        self._socket.close()
        os.close(self._spare_fd)
        for stream in self._peers.values():
            stream.close(max(0.0, deadline - now_s()))
        self._peers.clear()
        self._by_fd.clear()


class PlainChannel(Channel):
    """One connection that is dialled again when it is lost, or refused."""

    def __init__(self, address: str, options: Options) -> None:
        _host_and_port(address)
        self.address = address
        self.capabilities = options.capabilities(SCHEME)
        self._options = options
        self._closed = False
        self._stream: Stream | None = None
        self._dialled = False  # the TCP connection of the present stream stands
        self._inbox: deque[list[bytes]] = deque()
        self._pause_s = REDIAL_S
        self._due_s = 0.0  # when to dial next, or to give the present attempt up
        self._epoll = select.epoll()
        self.pollable = self._epoll.fileno()
        self._act()

    @property
    def _up(self) -> bool:
        return self._stream is not None and self._stream.greeted

    def _act(self) -> None:
        """Dial if it is time to, and give up an attempt that takes too long."""
        if self._up or self._closed or now_s() < self._due_s:
            return
        if self._stream is not None:
            self._lose()
        else:
            self._dial()

    def _dial(self) -> None:
        self._due_s = now_s() + CONNECT_S
        try:
            family, place = _resolved(self.address)
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError:  # no such name at the moment, or no descriptor: later, perhaps
            self._lose()
            return
        self._stream = Stream(sock, self._options)
        self._dialled = False
        self._epoll.register(self._stream.fd, select.EPOLLOUT)
        if sock.connect_ex(place) not in (0, errno.EINPROGRESS):
            self._lose()

    def _lose(self) -> None:
        """The connection, or the attempt at one, is over. Dial again after a pause."""
        stream, self._stream = self._stream, None
        if stream is not None:
            self._epoll.unregister(stream.fd)
            stream.close()
            if stream.greeted:
                self._inbox.append([])
                self._pause_s = REDIAL_S
        # Jitter, lest everybody who lost a listener comes back in the same moment.
        self._due_s = now_s() + self._pause_s * random.uniform(0.5, 1.5)
        self._pause_s = min(self._pause_s * 2.0, REDIAL_MAX_S)

    def send(self, frames: Sequence[Buffer]) -> bool:
        if self._closed:
            raise ChannelClosed(f"{self.address} was closed here")
        parts = packed(frames, self._options)
        stream = self._stream
        if stream is None or not stream.greeted:
            self._act()
            return False
        if stream.full:
            return False
        try:
            stream.put(parts)
        except OSError:
            self._read(stream)
            if self._stream is stream:
                self._lose()
            return False
        if stream.wants_write:
            self._epoll.modify(stream.fd, _BOTH)
        return True

    def recv(self) -> list[bytes] | None:
        if self._inbox:
            return self._inbox.popleft()
        if self._closed:
            raise ChannelClosed(f"{self.address} was closed here")
        self._act()
        for _fd, event in self._epoll.poll(0):
            stream = self._stream
            if stream is not None:
                self._serve(stream, event)
        return self._inbox.popleft() if self._inbox else None

    def _serve(self, stream: Stream, event: int) -> None:
        if not self._dialled:
            self._greet(stream)
            return
        if event & select.EPOLLOUT:
            try:
                stream.flush()
            except OSError:
                event |= _READ
            if not stream.wants_write:
                self._epoll.modify(stream.fd, _READ)
        if event & ~select.EPOLLOUT:
            self._read(stream)

    def _greet(self, stream: Stream) -> None:
        try:
            if stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise ConnectionError
            # Dialling a free port on this host, TCP may pick that very port for our side and
            # connect us to ourselves.
            if stream.sock.getsockname() == stream.sock.getpeername():
                raise ConnectionError
            stream.put([GREETING])
        except OSError:
            self._lose()
            return
        self._dialled = True
        self._epoll.modify(stream.fd, _READ)

    def _read(self, stream: Stream) -> None:
        messages: list[list[bytes]] = []
        try:
            alive = stream.fill(messages)
        except (BrokenStream, OSError):
            alive = False
        self._inbox.extend(messages)
        if not alive:
            self._lose()

    def idle_s(self) -> float | None:
        if self._inbox:
            return 0.0
        if self._up or self._closed:
            return None
        self._act()
        return max(0.001, self._due_s - now_s())

    def close(self, linger_s: float = 0.0) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.clear()
        self._epoll.close()
        if self._stream is not None:
            self._stream.close(linger_s if self._stream.greeted else 0.0)
            self._stream = None
