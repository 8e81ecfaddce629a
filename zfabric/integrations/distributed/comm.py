"""`zmq://` comms: distributed's messages over a link."""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from random import Random
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed.comm.addressing import unparse_host_port
from distributed.comm.core import Comm, CommClosedError
from distributed.comm.utils import from_frames, to_frames
from distributed.protocol import dumps, loads

from zfabric.codec import compress, sampler
from zfabric.integrations.distributed.framing import INLINE, flat, split
from zfabric.integrations.distributed.link import Link, LinkEnded
from zfabric.integrations.distributed.small import is_small

log = logging.getLogger(__name__)

PREFIX = "zmq://"

COMPRESSION = "distributed.comm.zmq.compression"
"""Config: False sends everything as it is; else zfabric's sampler decides for each large frame."""

MEMORY = "distributed.comm.zmq.memory"
"""Config: False sends large frames by ZeroMQ also where the peer could fetch them from memory."""


class ZmqComm(Comm):
    """One conversation. Made by the connector and the listener."""

    def __init__(
        self, link: Link, local_addr: str, peer_addr: str, deserialize: bool = True
    ) -> None:
        super().__init__(deserialize=deserialize)
        self._link = link
        # distributed reads these two names as well as the properties.
        self._local_addr = local_addr
        self._peer_addr = peer_addr
        self._random = Random(len(peer_addr))
        self._told = False  # that the link ended
        self._finalizer = weakref.finalize(self, _abandon, link, f"{local_addr} to {peer_addr}")
        self._finalizer.atexit = False

    @property
    def local_address(self) -> str:
        """Ours, with the port of this very connection."""
        return self._local_addr

    @property
    def peer_address(self) -> str:
        """What was dialled; at the listener's side, where the peer dialled from."""
        return self._peer_addr

    def handshake_info(self) -> dict[str, Any]:
        """distributed's, without its compression: the sampler decides about that here."""
        info = dict(super().handshake_info())
        info["compression"] = None
        return info

    async def read(self, deserializers: Any = None) -> Any:
        """The next message. Raises CommClosedError when the peer closed, died or was cut off."""
        try:
            frames = await self._link.read()
        except LinkEnded as exc:
            self._told = True
            self.abort()
            raise CommClosedError(f"in {self!r}: {exc}") from None
        except BaseException:
            # Who gives up reading must not meet the answer to an old question later.
            self.abort()
            raise
        try:
            if self.deserialize and sum(map(len, frames)) <= INLINE:
                return loads(frames, deserialize=True, deserializers=deserializers)
            return await from_frames(
                frames,
                deserialize=self.deserialize,
                deserializers=deserializers,
                allow_offload=self.allow_offload,
            )
        except EOFError:
            self.abort()
            raise CommClosedError("aborted on truncated data") from None

    async def write(self, msg: Any, serializers: Any = None, on_error: Any = "message") -> int:
        """Send a message; waits while the peer is too far behind. Bytes of its frames.

        Raises CommClosedError after close and abort here, and after the peer's end was told. One
        message that meets that end first is dropped without a word unless somebody reads, as a
        kernel does that has yet to hear of it. distributed's scheduler answers a worker that
        registers before it reads what follows, and by that reading alone forgets one that died: an
        error by the answer leaves it listed until its time to live, 5 minutes.
        """
        if self.closed() and not self._unheard():
            raise CommClosedError(f"in {self!r}: {self._link.ended}")
        options = {
            "serializers": serializers,
            "on_error": on_error,
            "context": {
                "sender": self.local_info,
                "recipient": self.remote_info,
                **self.handshake_options,
            },
            # Chunks are cut below; cutting here would only cost the other end a copy.
            "frame_split_size": sys.maxsize,
        }
        if is_small(msg):
            frames = dumps(msg, **options)
        else:
            frames = await to_frames(msg, allow_offload=self.allow_offload, **options)
        frames = [flat(frame) for frame in frames]
        nbytes = sum(map(len, frames))
        packer = None if nbytes <= INLINE else self._compressor()
        try:
            link = self._link
            taken = await link.write(split(frames, packer, link.fetched, link.told))
        except LinkEnded as exc:
            raise CommClosedError(f"in {self!r}: {exc}") from None
        except BaseException:
            self.abort()
            raise
        if not taken:
            if not self._unheard():
                raise CommClosedError(f"in {self!r}: {self._link.ended}")
            self._told = True
        return nbytes

    async def close(self) -> None:
        """Let what was written leave, then close; the peer hears of it at once."""
        self._told = True
        self._finalizer.detach()
        timeout = dask.config.get("distributed.comm.timeouts.tcp", "30s")
        await self._link.close(parse_timedelta(timeout, default="seconds"))

    def abort(self) -> None:
        """Close at once, from whatever thread; what was not sent is dropped."""
        self._told = True
        self._finalizer.detach()
        _abort(self._link)

    def closed(self) -> bool:
        """Whether nothing can be sent any more; what came before can still be read."""
        return self._link.ended is not None

    def _unheard(self) -> bool:
        """Whether the peer ended this and nobody here was told, nor waits to be."""
        return not self._told and not self._link.is_read

    def _compressor(self) -> Any:
        if self.same_host or dask.config.get(COMPRESSION, True) is False:
            return None
        return self._compress if compress.codecs() else None

    def _compress(self, chunk: memoryview) -> compress.Compressed | None:
        # Frames come as flat bytes; 8 is the item size of nearly all that is large.
        verdict = sampler.judge(
            chunk, 8, self._random, compress.compressed_size, link_rate=self._link.flow.rate
        )
        return compress.compress(chunk, 8) if verdict.compress else None


def address_of(name: Any) -> str:
    """`zmq://host:port` of what getsockname or getpeername gave; (host, port, ...)."""
    return PREFIX + unparse_host_port(*name[:2])


def _abandon(link: Link, names: str) -> None:
    if link.ended is None:
        log.warning("Closing dangling comm %s", names)
    _abort(link)


def _abort(link: Link) -> None:
    """From whatever thread: the link's loop does it, or nobody is left who could mind."""
    if link.loop.is_closed():
        link.ended = link.ended or "closed here"
        link.dispose(0.0)
    elif threading.get_ident() == link.thread:
        link.abort()
    else:
        link.ended = link.ended or "closed here"
        try:
            link.loop.call_soon_threadsafe(link.abort)
        except RuntimeError:  # closed in between
            link.dispose(0.0)
