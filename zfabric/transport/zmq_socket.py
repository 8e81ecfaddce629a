"""ZeroMQ sockets as zfabric wants them: one context, two profiles, each choice with its reason.

No other module makes a ZeroMQ socket, because options set after bind or connect are ignored
without a word, and the defaults lose messages without a word.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakSet

import zmq
import zmq.utils.garbage

from zfabric.config import DEFAULTS
from zfabric.errors import ConfigError, TransportError

Security = Callable[["zmq.Socket[bytes]", str], None]
"""Puts keys on a fresh socket; called with the socket and "listen" or "connect"."""

MIN_PYZMQ = (27, 3)
MIN_LIBZMQ = (4, 3, 5)


def check_versions(pyzmq: tuple[Any, ...], libzmq: tuple[int, ...]) -> None:
    """Raise ImportError unless both are recent enough.

    libzmq before 4.3.5 lacks fixes for crashes on bad input; pyzmq wheels before 27.3 carry a
    libsodium that encrypts at a twelfth of the speed.
    """
    for name, have, need in (("pyzmq", pyzmq, MIN_PYZMQ), ("libzmq", libzmq, MIN_LIBZMQ)):
        if tuple(have[: len(need)]) < need:
            raise ImportError(
                f"zfabric needs {name} {'.'.join(map(str, need))} or newer, and found"
                f" {'.'.join(map(str, have))}; run: pip install --upgrade 'pyzmq>=27.3'"
            )


check_versions(zmq.pyzmq_version_info(), zmq.zmq_version_info())


# --- the context ------------------------------------------------------------------------------

_context: zmq.Context[zmq.Socket[bytes]] | None = None
_context_lock = threading.Lock()
_abandoned: list[Any] = []  # contexts of a parent process: never touched, never freed
_longest_linger_s = 0.0
_ender: threading.Thread | None = None
_may_end = threading.Event()

live: WeakSet[Any] = WeakSet()
"""Endpoints that were not closed; each has `_orphan()`, called in a forked child."""


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """The one context of this process, made when first asked for. A forked child gets its own."""
    global _context
    with _context_lock:
        if _context is None:
            # One I/O thread moves more than one Python thread can make or eat. Bulk has one of its
            # own: while it copies 2 MiB from the kernel, for a millisecond where their pages are
            # fresh, no message about tasks waits behind that.
            fresh: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
            fresh.set(zmq.BLOCKY, 0)  # so that a forgotten socket's LINGER is 0, not for ever
            # Default 1023 is less than a broker's peers may need; this costs 8 bytes each.
            fresh.set(zmq.MAX_SOCKETS, min(65535, fresh.get(zmq.SOCKET_LIMIT)))
            _context = fresh
            _start_ender()
        return _context


def allow_linger(linger_s: float) -> None:
    """Remember at exit to wait this long for what was closed with a linger."""
    global _longest_linger_s
    _longest_linger_s = max(_longest_linger_s, linger_s)


def _at_exit() -> None:
    """End the context, so that messages with a linger still leave; never hang for it."""
    if _context is not None:
        _abandoned.append(_context)  # whatever happens below, no destructor waits for open sockets
        # While endpoints are open, another thread may be inside one: closing it from here would
        # abort the process, and the context would wait for ever. The kernel closes them soon.
        ended = not len(live) and _ends_in_time()
        if not ended:
            _keep_for_good(_collector)
            return
    if _stop_collector is not None:
        _stop_collector()


def _start_ender() -> None:
    """The thread in which the context ends at exit. It is there from the beginning, as Python 3.12
    starts no thread any more once the interpreter is on its way out."""
    global _ender, _may_end
    _may_end = threading.Event()
    _ender = threading.Thread(
        target=_end_when_told, args=(_may_end,), daemon=True, name="zfabric-zmq-term"
    )
    _ender.start()


def _end_when_told(may_end: threading.Event) -> None:
    may_end.wait()
    if _context is not None:
        _context.term()


def _ends_in_time() -> bool:
    assert _ender is not None
    _may_end.set()
    _ender.join(_longest_linger_s + 1.0)
    return not _ender.is_alive()


def _keep_for_good(thing: object) -> None:
    """Never free it, not even when the interpreter clears its modules."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _after_fork() -> None:
    """In a child: I/O threads did not come along and descriptors are shared, so touch nothing."""
    global _context, _context_lock
    _context_lock = threading.Lock()
    if _context is not None:
        _abandoned.append(_context)
        _context = None
    for endpoint in list(live):
        endpoint._orphan()
    live.clear()


# pyzmq's collector holds the frames that are sent without a copy; libzmq's I/O thread reports to it
# when it is done with one. At exit pyzmq stops it, and when that comes before the last frame has
# left, the I/O thread reports to a closed socket and the process dies by SIGSEGV or SIGABRT. So we
# stop it ourselves, after our context ended; or never, with the frames it holds, if that did not.
_collector = zmq.utils.garbage.gc
_stop_collector = getattr(_collector, "_atexit", None)
if _stop_collector is not None:
    atexit.unregister(_stop_collector)
atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)


def forked(*_args: Any, **_kwargs: Any) -> Any:
    """Stands in for send and recv of an endpoint that was made before a fork."""
    raise TransportError(
        "this endpoint was made before a fork and only works in the parent process; make a new"
        " one in the child, or start children by spawn instead of fork"
    )


# --- sockets ----------------------------------------------------------------------------------

CONTROL, BULK = 0b01, 0b10
"""The I/O thread that serves a socket, as ZeroMQ's AFFINITY wants it."""


class Profile(NamedTuple):
    """A socket type and its options, in the order in which they are set."""

    kind: int
    options: dict[int, int]


_COMMON: dict[int, int] = {
    # Nobody waits for a peer that is gone; close(linger_s) says otherwise where it matters.
    zmq.LINGER: 0,
    # Finite, as a fuse: credit keeps traffic far below (settings.window is 256 messages).
    zmq.SNDHWM: 1000,
    zmq.RCVHWM: 1000,
    # A peer that goes silent in the handshake holds a descriptor for 10 s, no longer.
    zmq.HANDSHAKE_IVL: 10_000,
}

BOUND = Profile(
    zmq.ROUTER,
    {
        **_COMMON,
        # Without it a ROUTER drops messages for a gone or full peer and calls that success.
        zmq.ROUTER_MANDATORY: 1,
        # The default 100 refuses peers when a thousand workers come at once.
        zmq.BACKLOG: 4096,
    },
)

DIALLING = Profile(
    zmq.DEALER,
    {
        # ROUTING_ID is never set: a second connection with the same id is mute for ever.
        **_COMMON,
        # Messages queued for a connection that is not up would meet another incarnation of the
        # listener; refuse them instead, the session keeps them.
        zmq.IMMEDIATE: 1,
        # An empty message on each new connection tells the listener of us before all else. What
        # does not begin with one is a stranger (a port scanner taken for ZMTP 1.0, say), and is
        # dropped there without state.
        zmq.PROBE_ROUTER: 1,
        # Quick at first, then backing off (with jitter, by libzmq) lest a thousand peers storm
        # a broker that restarts.
        zmq.RECONNECT_IVL: 200,
        zmq.RECONNECT_IVL_MAX: 2_000,
        zmq.CONNECT_TIMEOUT: 5_000,
    },
)


class Options(NamedTuple):
    """What a caller may choose about an endpoint."""

    max_frame: int = DEFAULTS.max_frame
    """Bytes. A peer that announces a longer frame is disconnected before memory is allocated."""
    max_frames: int = 65_536
    """Frames per message; a message with more is dropped and counted."""
    hwm: int = 1000
    """Messages per peer and direction that may queue."""
    security: Security | None = None
    bulk: bool = False
    """Whether it carries large values: an I/O thread that others need not wait for serves it."""
    dead_s: float = DEFAULTS.dead_s
    """Seconds without a sign of life after which a connection is broken, at both ends."""
    seal: bool = False
    """Whether messages travel with a checksum (see transport.seal), at both ends or at neither.
    Only over tcp, and not beside security, which is stronger."""


def probes(dead_s: float) -> dict[int, int]:
    """Options with which the kernel ends a dead connection after that many seconds, where it would
    take 15 minutes by itself. It asks a silent peer in whole seconds, so a second is the least."""
    every_s = max(1, round(min(dead_s / 6.0, 20.0)))
    return {
        zmq.TCP_KEEPALIVE: 1,
        zmq.TCP_KEEPALIVE_IDLE: every_s,
        zmq.TCP_KEEPALIVE_INTVL: every_s,
        # What ends it is the time below; this many without an answer fit into it.
        zmq.TCP_KEEPALIVE_CNT: max(1, min(127, round(dead_s / every_s) - 1)),
        # In ms, for what is sent and for these questions alike.
        zmq.TCP_MAXRT: max(1, round(dead_s * 1000)),
    }


def heartbeats(dead_s: float) -> dict[int, int]:
    """Options with which an end that dials finds a link dead in that many seconds, also one whose
    other end is up and does nothing.

    A listener has none, and its peers ask for none by a TTL: each would be a timer, and libzmq
    searches all timers of an I/O thread to end one. From about 7,000 connections on that takes all
    of the thread. Who listens asks the kernel instead (see silence).

    Most of the time is the timeout's, as the timer only stops for whole frames (2 MiB over
    1 Mbit/s take 17 s) and a peer that does not read for a while is not dead.
    """
    every_s = min(dead_s / 6.0, 20.0)
    return {
        zmq.HEARTBEAT_IVL: max(1, round(every_s * 1000)),
        zmq.HEARTBEAT_TIMEOUT: max(1, round((dead_s - every_s) * 1000)),
        zmq.HEARTBEAT_TTL: 0,
    }


def make_socket(profile: Profile, options: Options, address: str) -> zmq.Socket[bytes]:
    """A fresh socket of this profile, neither bound nor connected. Raises ConfigError."""
    if not 0 < options.hwm < 1 << 20 or not 0 < options.max_frame < 1 << 40:
        raise ConfigError("hwm must be 1 to a million messages, max_frame above 0 bytes")
    if not 0.0 < options.dead_s < 1e6:
        raise ConfigError("dead_s must be above 0 seconds, and less than a million")
    socket: zmq.Socket[bytes] = context().socket(profile.kind)
    try:
        socket.set(zmq.AFFINITY, BULK if options.bulk else CONTROL)
        for option, value in (profile.options | probes(options.dead_s)).items():
            socket.set(option, value)
        if profile is DIALLING:
            for option, value in heartbeats(options.dead_s).items():
                socket.set(option, value)
        socket.set(zmq.SNDHWM, options.hwm)
        socket.set(zmq.RCVHWM, options.hwm)
        # Checked from the header, before memory is allocated.
        socket.set(zmq.MAXMSGSIZE, options.max_frame)
        if "[" in address:
            socket.set(zmq.IPV6, 1)
        if options.security is not None:
            options.security(socket, "listen" if profile is BOUND else "connect")
    except BaseException:
        socket.close(0)
        raise
    return socket


# --- what happens to connections --------------------------------------------------------------

_EVENT = struct.Struct("=HI")
_names = itertools.count(1)

UP = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
ACCEPTED = int(zmq.EVENT_ACCEPTED)
CONNECTED = int(zmq.EVENT_CONNECTED)
DOWN = int(zmq.EVENT_DISCONNECTED)
REFUSED = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
# Not EVENT_HANDSHAKE_FAILED_PROTOCOL: libzmq also sends it for a damaged message of an encrypted
# connection, which leaves EAGAIN in errno, so that it takes the breach for a full pipe, waits, and
# aborts the process at the next heartbeat after the connection has ended (4.3.5, decode_and_push).
MISMATCHED = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
RETRIED = int(zmq.EVENT_CONNECT_RETRIED)
RELEASED = int(zmq.EVENT_CLOSED | zmq.EVENT_CLOSE_FAILED)


class Monitor:
    """The connections of one socket coming and going, as (event, descriptor) in order."""

    def __init__(self, socket: zmq.Socket[bytes], events: int) -> None:
        address = f"inproc://zfabric.monitor.{next(_names)}"
        self._watched = socket
        socket.monitor(address, events)
        self.socket: zmq.Socket[bytes] = context().socket(zmq.PAIR)
        # Unlimited: at a finite mark libzmq's I/O thread would block in here, and with it every
        # connection of the process. An event takes some 60 bytes.
        self.socket.set(zmq.RCVHWM, 0)
        self.socket.set(zmq.LINGER, 0)
        self.socket.connect(address)

    def read(self) -> list[tuple[int, int]]:
        """All events since the last call, oldest first."""
        events = []
        try:
            while True:
                event, value = _EVENT.unpack(self.socket.recv(zmq.NOBLOCK))
                self.socket.recv(zmq.NOBLOCK)  # the address; always there with the first frame
                events.append((event, value))
        except zmq.Again:
            return events

    def wait_released(self, timeout_s: float) -> None:
        """Return when the listening descriptor is closed, or the time is over."""
        while self.socket.poll(int(timeout_s * 1000)):
            if any(event & RELEASED for event, _ in self.read()):
                return

    def close(self) -> None:
        """End the events; call it before the watched socket is closed."""
        with contextlib.suppress(zmq.ZMQError):  # the context may have ended before us
            self._watched.disable_monitor()
        self.socket.close(0)
