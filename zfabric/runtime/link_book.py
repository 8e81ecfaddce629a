"""The links over which one process moves values: their records, in both directions.

One book per process, used by its value server and its fetcher, so that a peer's record does not
depend on who began a transfer.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from zfabric.codec import compress
from zfabric.config import DEFAULTS, Settings
from zfabric.core.links import Inbound, Outbound
from zfabric.errors import CodecError
from zfabric.messages import Chunk, Fetch, Put
from zfabric.runtime.packing import Packer

MAX_LINKS = 256
"""Links that are remembered; the one that was silent for longest is forgotten for a new one."""


class LinkBook:
    """Records of links by the name of the peer, which is an address or says how it is reached."""

    def __init__(self, settings: Settings = DEFAULTS, packer: Packer | None = None) -> None:
        self._mode = settings.compression
        self._packer = packer or Packer(settings)
        self._inbound: OrderedDict[str, Inbound] = OrderedDict()
        self._outbound: OrderedDict[str, Outbound] = OrderedDict()

    def asks(self, peer: str, request: Fetch, is_local: bool, now: float) -> Fetch:
        """A request on its way to a peer: with what we can decompress, and the rate we see.

        is_local: bytes from there cross no network, so compressing them never pays.
        """
        link = self._link(self._inbound, peer, Inbound)
        link.asked(now)
        raw = is_local or self._mode == "off"
        return request._replace(codecs=() if raw else compress.codecs(), rate=link.rate)

    def came(self, peer: str, part: Chunk | Put, now: float, unpack_s: float) -> None:
        """A part came from a peer, and took so long to decompress."""
        wire = raw = len(part.data)
        if part.packing:
            try:
                raw = compress.parse_header(part.packing).raw_nbytes
            except CodecError:  # nobody asked for this part, so nobody has looked at it
                return
        self._link(self._inbound, peer, Inbound).came(wire, raw, now, unpack_s)

    def silenced(self, peer: str) -> None:
        """What was asked for there will not come."""
        link = self._inbound.get(peer)
        if link is not None:
            link.silenced()

    def packed(self, peer: str, request: Fetch, part: Any) -> Any:
        """The Chunk or Put that answers a peer's request, compressed where that pays."""
        link = self._link(self._outbound, peer, Outbound)
        packing, data = self._packer.pack(link, request, part.data)
        return part._replace(packing=packing, data=data) if packing else part

    def report(self) -> list[dict[str, Any]]:
        """Each link as a dict for people and programs: see Client.links."""
        return [
            {"peer": peer, **link.as_dict()}
            for book in (self._inbound, self._outbound)
            for peer, link in list(book.items())  # which another thread may change
        ]

    def _link(self, book: OrderedDict[str, Any], peer: str, make: Any) -> Any:
        link = book.get(peer)
        if link is None:
            link = book[peer] = make()
            if len(book) > MAX_LINKS:
                book.popitem(last=False)
        else:
            book.move_to_end(peer)
        return link
