"""Serving a store to others: answers Fetch, takes in Put, directly or through the broker."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any

from msgpack import packb

from zfabric import wire
from zfabric.clock import now_s
from zfabric.codec import layout
from zfabric.config import DEFAULTS, Settings
from zfabric.core.spreading import SPREAD_NBYTES, Attempts, Readers
from zfabric.core.transfer import RELAY_PART, RELAY_PARTS, Destination, Download
from zfabric.errors import RemoteProtocolError, TransportError
from zfabric.messages import (
    Chunk,
    Fetch,
    LinksTold,
    LinksWanted,
    Message,
    NotHere,
    Put,
    PutDone,
)
from zfabric.runtime.chunk_memory import keep_chunks
from zfabric.runtime.link_book import LinkBook
from zfabric.runtime.store import Store
from zfabric.runtime.value import Value
from zfabric.transport.contract import Listener, PeerId

DRAIN = 64

MAX_WAITING = 256
"""Answers kept for peers whose links are full; later ones are dropped, and asked for again."""

MAX_UPLOADS = 64

MAX_HELD = 1024
"""Requests that wait for their turn, or for a value that is on its way here."""

LOOK_S = 0.25
"""Between two looks at them."""

Reply = Callable[[Message], None]


class _Upload:
    """A value that somebody is putting into the store."""

    __slots__ = ("download", "value", "why")

    def __init__(self) -> None:
        self.why = ""
        """There was no memory for it."""
        self.value: Value | None = None
        self.download: Download | None = None


class ValueServer:
    """A store's door.

    listener: where others dial in; None when nobody can.
    on_put: called with (id, nbytes) when somebody has put a value into the store.
    coming: see Fetcher.coming, which brings values into the store.
    """

    def __init__(
        self,
        store: Store,
        listener: Listener | None,
        on_put: Callable[[int, int], None],
        *,
        settings: Settings = DEFAULTS,
        links: LinkBook | None = None,
        coming: Callable[[int], tuple[Value, int] | None] = lambda id_: None,
    ) -> None:
        self._store = store
        self._find_coming = coming
        self._listener = listener
        self._on_put = on_put
        self._settings = settings
        self._links = links or LinkBook(settings)
        self._uploads: dict[int, _Upload] = {}
        self._readers = Readers()
        self._attempts = Attempts()
        self._held: deque[tuple[Fetch, Reply, str]] = deque()
        self._look_at = inf
        self._coming: set[int] = set()
        """Values that are being fetched into the store."""
        self._waiting: deque[tuple[PeerId, list[Any]]] = deque(maxlen=MAX_WAITING)

    def on_ready(self, now: float) -> None:
        """The listener has something."""
        listener = self._listener
        if listener is None:
            return
        self._send_waiting()
        for _ in range(DRAIN):
            item = listener.recv()
            if item is None:
                return
            peer, frames = item
            if not frames:
                continue
            try:
                _, message = wire.decode(frames)
            except RemoteProtocolError:
                continue
            self.on_message(message, partial(self._send, peer), f"caller {peer.hex()}", now)

    def on_message(
        self, message: Message, reply: Reply, peer: str, now: float, is_relayed: bool = False
    ) -> bool:
        """Answer one message; False for one that is no request to a store.

        peer: names the link that it came by.  is_relayed: that is the way through the broker.
        """
        if isinstance(message, Fetch):
            self._on_fetch(message, reply, peer, now)
        elif isinstance(message, Put):
            self._on_put_part(message, reply, peer, now, is_relayed)
        elif isinstance(message, LinksWanted):
            reply(LinksTold(message.request, packb(self._links.report())))
        else:
            return False
        return True

    def expect(self, id_: int) -> None:
        """A value is being fetched into the store."""
        self._coming.add(id_)

    def arrived(self, id_: int, now: float) -> None:
        """It is there, or will not come."""
        self._coming.discard(id_)
        value = self._store.peek(id_)
        if value is not None:
            self._attempts.settled(id_, value.serial)
        self.look(now)

    def forget(self) -> None:
        """Nothing is being fetched any more."""
        self._coming.clear()

    @property
    def is_holding(self) -> bool:
        """Whether requests wait."""
        return bool(self._held)

    @property
    def look_at(self) -> float:
        """When to call look(); infinity while no request waits."""
        return self._look_at if self._held else inf

    def look(self, now: float) -> None:
        """Take up the requests that wait."""
        held, self._held = self._held, deque()
        self._look_at = now + LOOK_S
        for message, reply, peer in held:
            self._on_fetch(message, reply, peer, now)

    def _hold(self, message: Fetch, reply: Reply, peer: str, now: float) -> None:
        if len(self._held) >= MAX_HELD:
            reply(NotHere(message.id))
            return
        if not self._held:
            self._look_at = min(max(self._look_at, now), now + LOOK_S)
        self._held.append((message, reply, peer))

    def _waits_or_leaves(
        self, message: Fetch, nbytes: int, reply: Reply, peer: str, now: float
    ) -> bool:
        """Whether a reader of something large has to wait, or was told to ask others."""
        is_last = message.offset + message.length >= nbytes
        place = (message.number, message.address)
        others = self._readers.ask(message.id, place, not message.offset, is_last, now)
        if others is None:
            self._hold(message, reply, peer, now)
            return True
        if others:
            reply(NotHere(message.id, others))
            return True
        if is_last or self._readers.has_new:
            self._look_at = now
        return False

    def _on_fetch(self, message: Fetch, reply: Reply, peer: str, now: float) -> None:
        id_, offset = message.id, message.offset
        length = min(message.length, self._settings.chunk)
        try:
            if id_ in self._coming and id_ not in self._store:
                found = self._find_coming(id_)
                if found is None or min(offset + length, found[0].nbytes) > found[1]:
                    self._hold(message, reply, peer, now)
                    return
                value: Value | None = found[0]
                data = found[0].chunk(offset, length)
                is_void = not self._attempts.may_read(id_, peer, found[0].serial, not offset)
            else:
                data = self._store.chunk(id_, offset, length)
                value = self._store.get(id_)
                is_void = value is not None and self._attempts.is_void(
                    id_, peer, value.serial, not offset
                )
        except OSError:  # no descriptor or memory to map it with: another holder may have both
            data = value = None
        if data is None or value is None or is_void:
            reply(NotHere(id_))
        elif (
            not message.number
            or value.nbytes < SPREAD_NBYTES
            or not self._waits_or_leaves(message, value.nbytes, reply, peer, now)
        ):
            reply(self._links.packed(peer, message, Chunk(id_, offset, value.sizes, data)))

    def _on_put_part(
        self, message: Put, reply: Reply, peer: str, now: float, is_relayed: bool
    ) -> None:
        id_ = message.id
        if id_ in self._store:
            reply(PutDone(id_))
            return
        upload = self._uploads.get(id_)
        if message.offset == 0 or upload is None or upload.download is None:
            upload = self._begin(id_, now)
        download = upload.download
        assert download is not None
        began = now_s()
        data, packing = message.data, message.packing
        download.part_came(0, message.offset, message.sizes, data, now, packing)
        if message.offset and not download.has_failed:
            self._links.came(peer, message, began, now_s() - began if packing else 0.0)
        if download.has_failed:
            self._links.silenced(peer)
            self._uploads.pop(id_, None)
            reply(PutDone(id_, upload.why or "the parts do not fit together"))
        elif download.is_done:
            self._uploads.pop(id_, None)
            value, upload.value = upload.value, None
            assert value is not None
            self._store.put(id_, value)
            self._on_put(id_, value.nbytes)
            reply(PutDone(id_))
        else:
            ahead = max(1, RELAY_PARTS // len(self._uploads))
            asked = download.requests(RELAY_PART, ahead) if is_relayed else download.requests()
            for request in asked:
                reply(self._links.asks(peer, request, False, now))

    def _begin(self, id_: int, now: float) -> _Upload:
        """A new upload; one whose sender fell silent makes room."""
        for other, old in list(self._uploads.items()):
            if old.download is None or now >= old.download.wake_at:
                del self._uploads[other]
        while len(self._uploads) >= MAX_UPLOADS:
            del self._uploads[next(iter(self._uploads))]
        upload = _Upload()

        def allocate(sizes: Sequence[int]) -> Destination:
            try:
                if not self._store.make_room(layout.nbytes_of(sizes)):
                    raise OSError(errno.ENOMEM, self._store.why_no_room(layout.nbytes_of(sizes)))
                upload.value = self._store.allocate(sizes)
            except OSError as exc:
                upload.why = exc.strerror or str(exc)
                raise
            return upload.value.destination

        upload.download = Download(id_, 1, allocate, settings=self._settings, now=now)
        upload.download.requests()  # The Put that begins an upload answers this first request.
        self._uploads[id_] = upload
        keep_chunks()
        return upload

    def _send(self, peer: PeerId, message: Message) -> None:
        self._waiting.append((peer, wire.encode(message)))
        self._send_waiting()

    def _send_waiting(self) -> None:
        listener = self._listener
        full: set[PeerId] = set()
        for _ in range(len(self._waiting)):
            peer, frames = self._waiting.popleft()
            try:
                if listener is not None and (peer in full or not listener.send(peer, frames)):
                    full.add(peer)
                    self._waiting.append((peer, frames))
            except TransportError:
                pass  # The peer is gone; its request went with it.

    def tick(self) -> bool:
        """Try again what could not be sent; whether something still waits."""
        if self._waiting:
            self._send_waiting()
        return bool(self._waiting)
