"""Keys on ZeroMQ sockets: CURVE, with a decision about each connection before it says a word.

libzmq's I/O threads encrypt, and ask by ZAP (one service per process, `zap.py`) whether a key may
come in. Without a service CURVE would take everybody's key; ZAP_ENFORCE_DOMAIN makes it nobody's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq

from zfabric.errors import ConfigError
from zfabric.transport import zap

Admit = Callable[[bytes], str]
"""A client's public key (32 bytes) -> who that is, in printable ASCII; "" refuses."""


class ServerKeys:
    """Guards one listener: pass it as `security`, and close it after the listener.

    `admits(user)` is asked again for what is connected, so that a key can lose its right.
    """

    def __init__(
        self, public: bytes, secret: bytes, admit: Admit, admits: Callable[[str], bool]
    ) -> None:
        self.public = public
        self._secret = secret
        self._admit = admit
        self.admits = admits
        self._domain = b""

    def __call__(self, socket: zmq.Socket[bytes], side: str) -> None:
        _only(side, "listen")
        self.close()
        self._domain = zap.open_door(self._admit)
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, self._secret)
        socket.set(zmq.ZAP_DOMAIN, self._domain)
        # Without it, a service that is gone means that every key may come in.
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def close(self) -> None:
        """Admit nobody any more. Closing twice is fine."""
        if self._domain:
            zap.close_door(self._domain)
            self._domain = b""


class ClientKeys:
    """For dialling a listener whose public key is known: pass it as `security`."""

    def __init__(self, server: bytes, public: bytes, secret: bytes) -> None:
        self._server = server
        self._public = public
        self._secret = secret

    def __call__(self, socket: zmq.Socket[bytes], side: str) -> None:
        _only(side, "connect")
        socket.set(zmq.CURVE_SERVERKEY, self._server)
        socket.set(zmq.CURVE_PUBLICKEY, self._public)
        socket.set(zmq.CURVE_SECRETKEY, self._secret)


def _only(side: str, wanted: str) -> None:
    if side != wanted:
        raise ConfigError(f"these keys are for those who {wanted}, not for those who {side}")


def user_of(frame: Any) -> str:
    """Who sent a frame, as `admit` named them; "" on a connection without keys."""
    try:
        return str(frame.get("User-Id"))
    except (zmq.ZMQError, UnicodeDecodeError):
        return ""
