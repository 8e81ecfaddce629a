"""The end that listens: a ROUTER that knows who is there and who is gone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from zfabric.clock import now_s
from zfabric.errors import AddressInUse, ChannelClosed, ConfigError
from zfabric.transport import zmq_socket
from zfabric.transport.contract import LARGE, Buffer, Listener, PeerId
from zfabric.transport.curve import user_of
from zfabric.transport.descriptors import Strangers
from zfabric.transport.endless import EndlessMessages
from zfabric.transport.ipc_path import PathLock
from zfabric.transport.silence import SilentConnections
from zfabric.transport.zmq_end import MORE, NOBLOCK, ZmqEnd, names_of
from zfabric.transport.zmq_socket import ACCEPTED, BOUND, DOWN, RELEASED

_SRCFD = int(zmq.SRCFD)

_EMPTY = [b""]

listening: dict[str, ZmqListener] = {}
"""Listeners at inproc addresses of this process."""


class ZmqListener(ZmqEnd, Listener):
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
        self._silent = SilentConnections(options.dead_s)
        self._looks = address.startswith("tcp://")  # on one host none is half open
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
            listening[address] = self
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
            send(peer, MORE)
            if self._seals is not None:
                frames = [*frames, self._seals(frames)]
            if simple:
                last = len(frames) - 1
                if last:
                    for frame in frames[:-1]:
                        send(frame, MORE)
                send(frames[last], NOBLOCK)
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
        return names_of(self._peers.get(peer, -1))

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
                peer = recv(NOBLOCK)
                frames = []
                while True:
                    frame = recv(NOBLOCK, False)
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
        if self._leaving:
            return 0.0
        if not self._looks:
            return None
        now = now_s()
        if now >= self._silent.look_at:
            self._read_monitor()
            self._silent.look(self._open, now)
        return self._silent.look_at - now

    def close(self, linger_s: float = 0.0) -> None:
        if self._closed:
            return
        if self._inproc:
            if listening.get(self.address) is self:
                del listening[self.address]
            self._farewell()
        self._unbind()
        self._shut(linger_s)
        if self._lock is not None:
            self._lock.release()

    def _farewell(self) -> None:
        for peer in self._peers:
            try:
                self._send(peer, MORE)
                self._send(b"", NOBLOCK)
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
