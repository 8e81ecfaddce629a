"""Fetching values from workers' stores and putting them there, from a thread that has a Poller.

Used by workers and by clients' I/O threads. Each value goes the direct way first, over a data
channel that is dialled when first needed; when nobody answers there, through the broker, as
Relay messages in the control channel.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

from zfabric import wire
from zfabric.clock import now_s
from zfabric.codec.layout import Laid
from zfabric.config import DEFAULTS, Settings
from zfabric.core.transfer import (
    RELAY_PART,
    RELAY_PARTS,
    Destination,
    Download,
    Source,
    Upload,
)
from zfabric.errors import ChannelClosed, ConfigError, RemoteProtocolError, TransportError
from zfabric.keys import KeyPair
from zfabric.messages import Chunk, Fetch, Message, NotHere, PutDone
from zfabric.runtime.chunk_memory import keep_chunks
from zfabric.runtime.dialling import dial_data
from zfabric.runtime.link_book import LinkBook
from zfabric.runtime.memory_door import SCHEME, MemoryLink
from zfabric.runtime.segments import Segments
from zfabric.runtime.slot_values import InFile
from zfabric.runtime.value import Value
from zfabric.transport.contract import Channel, Poller
from zfabric.transport.locality import is_same_host

IN_PACKET = 4096
"""Bytes up to which a value is handed over in the message itself, without a file."""

MAX_ACTIVE = 16
"""Values on their way at a time: each has up to 8 MiB under way."""

MAX_CHANNELS = 64

KEPT_NBYTES = 512 * 2**20
"""Memory of values that were handed over, kept for the next ones while these follow soon."""

MAX_WAYS = 64
"""To one value; beyond that nobody is sent on."""

DRAIN = 64

RETRY_S = 0.005
"""When to try a channel again that took nothing."""

Way = tuple[int, str]
"""(worker number, data address); address "" is the way through the broker."""


class _Move:
    """One download or upload, the ways for it, and whom to tell.

    key: ("down", id, 0), or ("up", id, worker): a value may go to several stores at a time.
    """

    __slots__ = ("key", "machine", "on_end", "started", "value", "ways")

    def __init__(
        self, key: tuple[str, int, int], ways: list[Way], on_end: Callable[[Any], None]
    ) -> None:
        self.key = key
        self.ways = ways
        self.on_end = on_end
        self.value: Value | None = None
        self.machine: Download | Upload | None = None
        self.started = -1
        """The way to which the first message went; sources are counted from 0."""


class Fetcher:
    """All transfers that this end drives.

    poller: in which the data channels are watched; call on_ready() for what it reports and
    owns() knows.  relay: sends frames to a worker through the broker; None where that is closed.
    own: our key, in a fabric that has keys.
    allocate: gives the memory of a value that comes.
    Nothing here blocks. Callbacks run inside on_ready, on_relay and tick.
    """

    def __init__(
        self,
        poller: Poller,
        relay: Callable[[int, list[Any]], None] | None = None,
        *,
        own: KeyPair | None = None,
        settings: Settings = DEFAULTS,
        links: LinkBook | None = None,
        relay_is_local: bool = False,
        allocate: Callable[[Sequence[int]], Value] = Value.allocate,
    ) -> None:
        """relay_is_local: the broker is on this host, reached without a network."""
        self.links = links or LinkBook(settings)
        self._relay_is_local = relay_is_local
        self._allocate = allocate
        self._poller = poller
        self._relay = relay
        self._own = own
        self._settings = settings
        self.segments = Segments(KEPT_NBYTES)
        """Memory in which values are handed over."""
        self.place: Way | None = None
        """Where others get what was fetched here, once that is so."""
        self._gone: set[int] = set()
        """Workers that the broker no longer has; their numbers are never given again."""
        self._channels: OrderedDict[str, Channel] = OrderedDict()
        self._memory: dict[str, MemoryLink] = {}
        self._moves: dict[tuple[str, int, int], _Move] = {}
        self._queue: deque[tuple[_Move, Callable[[float], Download | Upload]]] = deque()
        self._blocked: deque[tuple[str, _Move, int, list[Any]]] = deque()
        """Messages that their channels could not take yet."""

    # --- what is wanted -----------------------------------------------------------------------

    def fetch(
        self,
        id_: int,
        nbytes: int,
        sources: Sequence[Way],
        on_end: Callable[[Value | None], None],
        now: float,
    ) -> None:
        """Fetch a value; `on_end` gets it, or None when no source could give it.

        nbytes: what it should have, 0 if unknown.  sources: (worker number, data address).
        A second fetch of a value that is on its way replaces the first one's callback.
        """
        move = _Move(("down", id_, 0), self._ways(sources), on_end)

        def begin(now: float) -> Download:
            def allocate(sizes: Sequence[int]) -> Destination:
                move.value = self._allocate(sizes)
                return move.value.destination

            return Download(
                id_, len(move.ways), allocate, nbytes=nbytes, settings=self._settings, now=now
            )

        self._enqueue(move, begin, now)

    def coming(self, id_: int) -> tuple[Value, int] | None:
        """A value on its way here, and how many bytes from its beginning have come. It is another
        object when the transfer has begun anew; None while nothing of it is here."""
        move = self._moves.get(("down", id_, 0))
        if move is None or move.value is None or not isinstance(move.machine, Download):
            return None
        here = move.machine.n_here
        return (move.value, here) if here else None

    def put(
        self,
        id_: int,
        sizes: Sequence[int],
        area: Source,
        target: Way,
        on_end: Callable[[str], None],
        now: float,
    ) -> None:
        """Put a value into a worker's store; `on_end` gets "" or why it did not work.

        area: its frames as `codec.layout` joins them; must not change until the end.
        """
        move = _Move(("up", id_, target[0]), self._ways([target]), on_end)

        def begin(now: float) -> Upload:
            return Upload(
                id_, sizes, area, n_targets=len(move.ways), settings=self._settings, now=now
            )

        self._enqueue(move, begin, now)

    def _ways(self, sources: Sequence[Way]) -> list[Way]:
        there = [way for way in sources if way[0] not in self._gone]
        direct = [(number, each) for number, address in there for each in address.split()]
        if self._settings.shared_memory == "off":
            direct = [way for way in direct if not way[1].startswith(SCHEME)]
        # Memory of any holder on this host before a socket of another.
        direct.sort(key=lambda way: not way[1].startswith(SCHEME))
        relayed = [(number, "") for number, _ in there] if self._relay else []
        return direct + relayed

    def _enqueue(
        self, move: _Move, begin: Callable[[float], Download | Upload], now: float
    ) -> None:
        self._queue.append((move, begin))
        self._start_more(now)

    def _start_more(self, now: float) -> None:
        while self._queue and len(self._moves) < MAX_ACTIVE:
            move, begin = self._queue.popleft()
            move.machine = begin(now)
            self._moves[move.key] = move
            self._advance(move, now)

    # --- what happens -------------------------------------------------------------------------

    def owns(self, thing: Any) -> bool:
        """Whether something that the Poller reported is a data channel of this one."""
        return any(thing is channel for channel in self._channels.values()) or any(
            thing == link.fd for link in self._memory.values()
        )

    def on_ready(self, channel: Channel | int, now: float) -> None:
        """A data channel, or the descriptor of a way to somebody's memory, has something."""
        if isinstance(channel, int):
            self._on_memory(channel, now)
            return
        self._send_blocked(now)
        for _ in range(DRAIN):
            try:
                frames = channel.recv()
            except ChannelClosed:
                return
            if frames is None:
                return
            if not frames:
                self._lost(channel.address, now)
                return
            try:
                _, message = wire.decode(frames)
            except RemoteProtocolError:
                self._lost(channel.address, now)
                return
            self._on_message(message, lambda way: way[1] == channel.address, now)

    def on_relay(self, peer: int, message: Message, now: float) -> None:
        """What came out of a Relay from a worker: an answer to one of ours."""
        self._on_message(message, lambda way: not way[1] and way[0] == peer, now)

    def on_gone(self, peer: int, now: float) -> None:
        """The broker says that there is no such worker: no way to it is worth another try."""
        self._gone.add(peer)
        for move in list(self._moves.values()):
            while self._moves.get(move.key) is move:
                machine = move.machine
                at = getattr(machine, "source", getattr(machine, "target", -1))
                if not 0 <= at < len(move.ways) or move.ways[at][0] not in self._gone:
                    break
                self._way_failed(move, at, now)
                self._advance(move, now)

    def _on_message(self, message: Any, is_way: Callable[[Way], bool], now: float) -> None:
        kind = type(message)
        id_ = getattr(message, "id", -1)
        if kind is Fetch or kind is PutDone:
            move = self._upload(id_, is_way)
        else:
            move = self._moves.get(("down", id_, 0))
        if move is None or move.machine is None:
            return
        machine = move.machine
        at = machine.source if isinstance(machine, Download) else machine.target
        if at >= len(move.ways) or not is_way(move.ways[at]):
            return
        if isinstance(machine, Download):
            if kind is Chunk:
                self._part_came(move, machine, at, message, now)
            elif kind is NotHere:
                self.links.silenced(_link_name(move.ways[at]))
                if not message.others or not self._send_on(move, machine, at, message.others, now):
                    machine.source_failed(at, now)
        elif kind is Fetch:
            part = machine.asked(at, message, now)
            if part is not None:
                way = move.ways[at]
                if not self._is_local(way):
                    part = self.links.packed(_link_name(way), message, part)
                self._send(move, at, part, now)
        else:
            machine.answered(at, message.error, now)
        self._advance(move, now)

    def _send_on(
        self, move: _Move, machine: Download, at: int, others: Sequence[Way], now: float
    ) -> bool:
        """Others have it: they are asked next, and then who said so once more."""
        if len(move.ways) > MAX_WAYS:
            return False
        fresh = [way for way in self._ways(others) if way[1]]
        if not machine.sent_on(at, len(fresh), now):
            return False
        move.ways[at + 1 : at + 1] = [*fresh, move.ways[at]]
        return True

    def _part_came(self, move: _Move, machine: Download, at: int, chunk: Chunk, now: float) -> None:
        began = now_s()
        machine.part_came(at, chunk.offset, chunk.sizes, chunk.data, now, chunk.packing)
        if machine.source == at and not machine.has_failed:
            spent_s = now_s() - began if chunk.packing else 0.0
            self.links.came(_link_name(move.ways[at]), chunk, began, spent_s)

    def _is_local(self, way: Way) -> bool:
        return is_same_host(way[1]) if way[1] else self._relay_is_local

    def _upload(self, id_: int, is_way: Callable[[Way], bool]) -> _Move | None:
        """The upload of this value that has the store behind that way as its target."""
        for (direction, id_of_move, _), move in self._moves.items():
            if direction == "up" and id_of_move == id_ and any(map(is_way, move.ways)):
                return move
        return None

    def tick(self, now: float) -> float | None:
        """Give up what is silent. Returns when to be called again, None when nothing is due."""
        self._send_blocked(now)
        for move in list(self._moves.values()):
            if move.machine is not None and now >= move.machine.wake_at:
                move.machine.tick(now)
                self._advance(move, now)
        if self._blocked:
            return now + RETRY_S
        return min((m.machine.wake_at for m in self._moves.values() if m.machine), default=None)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way or wanted."""
        return not (self._moves or self._queue)

    def _advance(self, move: _Move, now: float) -> None:
        """Say what the machine wants said, or tell that it ended."""
        while True:
            machine = move.machine
            assert machine is not None
            if machine.is_done or machine.has_failed:
                if self._moves.pop(move.key, None) is not None:
                    move.on_end(_outcome(move))
                    self._start_more(now)
                return
            if isinstance(machine, Download):
                at = machine.source
                requests = self._requests(move, machine)
                sent = all(self._ask(move, at, request, now) for request in requests)
            else:
                at = machine.target
                sent = True
                if move.started != at:
                    move.started = at
                    sent = self._send(move, at, machine.first(), now)
            if sent:
                return

    def _requests(self, move: _Move, machine: Download) -> list[Fetch]:
        """By way of the broker all moves share what one link should have to carry."""
        if move.ways[machine.source][1]:
            return machine.requests()
        n = sum(
            isinstance(other.machine, Download)
            and not other.machine.has_failed
            and not other.ways[other.machine.source][1]
            for other in self._moves.values()
        )
        return machine.requests(RELAY_PART, max(1, RELAY_PARTS // max(1, n)))

    # --- ways ---------------------------------------------------------------------------------

    def _ask(self, move: _Move, at: int, request: Fetch, now: float) -> bool:
        way = move.ways[at]
        if way[1].startswith(SCHEME):
            return self._by_memory(move, at, now)
        request = self.links.asks(_link_name(way), request, self._is_local(way), now)
        if self.place is not None and way[1]:
            request = request._replace(number=self.place[0], address=self.place[1])
        return self._send(move, at, request, now)

    def _send(self, move: _Move, at: int, message: Message, now: float) -> bool:
        """False: the way is closed for certain, and the machine knows."""
        number, address = move.ways[at]
        if address.startswith(SCHEME):
            return self._by_memory(move, at, now)
        frames = wire.encode(message)
        if not address:
            assert self._relay is not None
            self._relay(number, frames)
            return True
        try:
            if any(entry[0] == address for entry in self._blocked) or not self._channel(
                address
            ).send(frames):
                self._blocked.append((address, move, at, frames))
        except (ConfigError, TransportError):
            self._way_failed(move, at, now)
            return False
        return True

    def _by_memory(self, move: _Move, at: int, now: float) -> bool:
        """Ask for, or hand over, all of a value at once. False: this way is closed."""
        address = move.ways[at][1]
        machine = move.machine
        try:
            link = self._memory.get(address)
            if link is None:
                link = self._memory[address] = MemoryLink(address)
                self._poller.add(link.fd)
            if isinstance(machine, Upload):
                area = machine.area
                if isinstance(area, Laid) and area.nbytes <= IN_PACKET:
                    machine.progressed(now_s())
                    link.put_bytes(machine.id, area.sizes, bytes(area[: area.nbytes]))
                    return True
                sizes, fd = self._in_file(area)
                machine.progressed(now_s())
                link.put(machine.id, sizes, fd)
            else:
                assert machine is not None
                link.get(machine.id)
        except (OSError, ValueError):
            self._way_failed(move, at, now)
            return False
        return True

    def _in_file(self, area: Source) -> tuple[Sequence[int], int]:
        """A value in a memfd: written there once, however many stores get it."""
        if not isinstance(area, Laid):
            raise ValueError("only frames can be handed over")
        if not isinstance(area.file, InFile):
            area.file = InFile(area.frames, area.sizes, self.segments)
        return area.sizes, area.file.fd

    def _on_memory(self, fd: int, now: float) -> None:
        link = next((link for link in self._memory.values() if link.fd == fd), None)
        if link is None:
            return
        try:
            replies = link.replies()
        except OSError:
            self._memory_lost(link, now)
            return
        for reply in replies:
            key = ("down", reply.id, 0)
            move = self._moves.get(key)
            if reply.is_put:
                move = self._upload(reply.id, lambda way: way[1] == link.address)
            if move is None or move.machine is None:
                continue
            machine = move.machine
            at = machine.source if isinstance(machine, Download) else machine.target
            if at >= len(move.ways) or move.ways[at][1] != link.address:
                continue
            if isinstance(machine, Upload):
                machine.answered(at, reply.error, now)
            elif reply.value is not None and machine.came_whole(at, reply.value.sizes):
                move.value = reply.value
            else:
                machine.source_failed(at, now)
            self._advance(move, now)

    def _memory_lost(self, link: MemoryLink, now: float) -> None:
        self._memory.pop(link.address, None)
        self._poller.discard(link.fd)
        link.close()
        self._fail_ways(link.address, now)

    def _send_blocked(self, now: float) -> None:
        """Messages whose channel was not connected yet, or full."""
        stuck: set[str] = set()
        for _ in range(len(self._blocked)):
            address, move, at, frames = self._blocked.popleft()
            machine = move.machine
            current = getattr(machine, "source", getattr(machine, "target", -1))
            if self._moves.get(move.key) is not move or current != at:
                continue
            try:
                if address in stuck or not self._channel(address).send(frames):
                    stuck.add(address)
                    self._blocked.append((address, move, at, frames))
            except (ConfigError, TransportError):
                self._way_failed(move, at, now)
                self._advance(move, now)

    def _way_failed(self, move: _Move, at: int, now: float) -> None:
        machine = move.machine
        if 0 <= at < len(move.ways):
            self.links.silenced(_link_name(move.ways[at]))
        if isinstance(machine, Download):
            machine.source_failed(at, now)
        elif machine is not None:
            machine.target_failed(at, now)

    def _channel(self, address: str) -> Channel:
        channel = self._channels.get(address)
        if channel is None:
            while len(self._channels) >= MAX_CHANNELS:
                self._close_channel(next(iter(self._channels)))
            keep_chunks()
            channel = dial_data(address, self._own, self._settings)
            self._channels[address] = channel
            self._poller.add(channel)
        self._channels.move_to_end(address)
        return channel

    def _lost(self, address: str, now: float) -> None:
        """A connection broke: whatever went that way goes the next one."""
        self._close_channel(address)
        self._fail_ways(address, now)

    def _fail_ways(self, address: str, now: float) -> None:
        for move in list(self._moves.values()):
            machine = move.machine
            at = getattr(machine, "source", getattr(machine, "target", -1))
            if 0 <= at < len(move.ways) and move.ways[at][1] == address:
                self._way_failed(move, at, now)
                self._advance(move, now)

    def _close_channel(self, address: str) -> None:
        channel = self._channels.pop(address, None)
        if channel is not None:
            self._poller.discard(channel)
            channel.close()

    def close(self) -> None:
        """Close all channels; what was on its way is forgotten, without a callback."""
        for address in list(self._channels):
            self._close_channel(address)
        for link in self._memory.values():
            self._poller.discard(link.fd)
            link.close()
        self._memory.clear()
        self.segments.close()
        self._moves.clear()
        self._queue.clear()
        self._blocked.clear()


def _link_name(way: Way) -> str:
    return way[1] or f"worker {way[0]} by way of the broker"


def _outcome(move: _Move) -> Any:
    """What the callback gets."""
    machine = move.machine
    if isinstance(machine, Upload):
        return "" if machine.is_done else machine.error or "the worker cannot be reached"
    value, move.value = move.value, None
    return value if machine is not None and machine.is_done else None
