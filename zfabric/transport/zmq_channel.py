"""The end that dials: a DEALER with one connection, or none at the moment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import inf
from typing import Any

import zmq

from zfabric.clock import now_s
from zfabric.errors import ConfigError
from zfabric.transport import zmq_socket
from zfabric.transport.contract import LARGE, OTHER_KEYS, REFUSED_KEY, Buffer, Channel
from zfabric.transport.zmq_end import MORE, NOBLOCK, ZmqEnd, names_of, never_changes
from zfabric.transport.zmq_listener import listening
from zfabric.transport.zmq_socket import (
    CONNECTED,
    DIALLING,
    DOWN,
    MISMATCHED,
    REFUSED,
    RETRIED,
    UP,
)

_DIAL_AGAIN_S = 0.02  # inproc: nothing tells a channel that its listener is back

_GIVEN_UP_S = 0.5
"""After a connection has ended, until libzmq has said that it dials again, if it does."""


class ZmqChannel(ZmqEnd, Channel):
    """A DEALER with one connection, or none at the moment."""

    def __init__(self, address: str, options: zmq_socket.Options) -> None:
        events = CONNECTED | RETRIED | UP | DOWN | REFUSED | MISMATCHED
        super().__init__(address, DIALLING, options, events)
        self._up = False
        self._shaking = False  # connected, and nothing is known of the handshake so far
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
        if not self._up and self.address in listening and not self._closed:
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
                    send(frame, MORE)
                    index += 1
                send(frames[last] if seals is None else seals(frames[:last]), NOBLOCK)
            else:
                for frame in frames:
                    if index == last and seals is not None:
                        frame = seals(frames[:last])
                    share = len(frame) >= LARGE and never_changes(frame)
                    send(frame, MORE if index < last else NOBLOCK, not share)
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
                    frame = recv(NOBLOCK, False)
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
                self._shaking = True
                self._redial_at = inf
            elif event == RETRIED:
                self._redial_at = inf
            elif event == UP:
                self._up, self._shaking = True, False
                self.trouble = ""
            elif event != DOWN:
                self._shaking = False
                self.trouble = REFUSED_KEY if event == REFUSED else OTHER_KEYS
            else:
                self._redial_at = now_s() + _GIVEN_UP_S
                if self._shaking:
                    self._shaking, self.trouble = False, OTHER_KEYS
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
        return names_of(self._descriptor)

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
                self._send(b"", NOBLOCK)
        self._shut(linger_s)
