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
up; the session's beats remain the truth. A host that vanishes says nothing: a listener finds that
out by `silence`, who dialled by ZeroMQ's heartbeats. Monitors do not see inproc, where both ends
are in one process and close in order: they say goodbye with a second empty message.

**What is damaged.** With the option `seal`, each message over tcp has a checksum. Where one does
not fit, that message and its connection are dropped, as after wrong bytes nobody knows where the
next message begins; the channel dials again. It does so by itself, too, where libzmq would not:
after a frame that breaks ZMTP's rules a DEALER of libzmq stays without a connection for ever.
"""

from __future__ import annotations

from typing import Any, TypeVar

from zmq import ZMQError

from zfabric.errors import ConfigError, TransportError
from zfabric.transport import zmq_socket
from zfabric.transport.contract import Channel, Listener
from zfabric.transport.zmq_channel import ZmqChannel
from zfabric.transport.zmq_listener import ZmqListener

T = TypeVar("T")


def listen(address: str, **options: Any) -> Listener:
    """See registry.listen. Options: fields of zmq_socket.Options."""
    return _made(ZmqListener, address, _options(options))


def connect(address: str, **options: Any) -> Channel:
    """See registry.connect. Options: fields of zmq_socket.Options."""
    return _made(ZmqChannel, address, _options(options))


def _made(kind: type[T], address: str, options: zmq_socket.Options) -> T:
    """Raises TransportError where the process has no descriptor left, too."""
    try:
        return kind(address, options)  # type: ignore[call-arg]
    except ZMQError as exc:
        raise TransportError(f"no socket can be made for {address}: {exc.strerror}") from exc


def _options(given: dict[str, Any]) -> zmq_socket.Options:
    unknown = set(given) - set(zmq_socket.Options._fields)
    if unknown:
        raise ConfigError(
            f"unknown option {', '.join(sorted(unknown))};"
            f" known: {', '.join(zmq_socket.Options._fields)}"
        )
    return zmq_socket.Options(**given)
