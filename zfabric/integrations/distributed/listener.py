"""Listening: one socket for all comms that are accepted at an address."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import dask
from distributed.comm.addressing import parse_host_port, unparse_host_port
from distributed.comm.core import BaseListener, CommClosedError
from distributed.comm.utils import ensure_concrete_host

from zfabric.errors import AddressInUse, ConfigError, TransportError
from zfabric.integrations.distributed.addresses import numeric, refuse_encryption
from zfabric.integrations.distributed.comm import MEMORY, PREFIX, ZmqComm, address_of
from zfabric.integrations.distributed.connector import OPTIONS, VERSION
from zfabric.integrations.distributed.framing import CLOSE, HELLO
from zfabric.integrations.distributed.link import Link
from zfabric.integrations.distributed.wire import Wire
from zfabric.transport import registry

LINGER_S = 5.0
"""Seconds that the last messages may need to leave when the socket is closed."""

log = logging.getLogger(__name__)


class ZmqListener(BaseListener):
    """Accepts comms at one port and hands each to `handle_comm`.

    stop() accepts no more. libzmq cuts off those that a socket accepted when it is unbound, so
    the port is free once the last comm that came by it has ended.
    """

    prefix = PREFIX

    def __init__(
        self,
        address: str,
        handle_comm: Any,
        deserialize: bool = True,
        allow_offload: bool = True,
        default_host: str | None = None,
        default_port: int = 0,
        **connection_args: Any,
    ) -> None:
        super().__init__()
        refuse_encryption(PREFIX + address, connection_args)
        self.ip, self.port = parse_host_port(address, default_port)
        self.default_host = default_host
        self.comm_handler = handle_comm
        self.deserialize = deserialize
        self.allow_offload = allow_offload
        self._endpoint: Any = None
        self._bound = ("", 0)
        self._wire: Wire | None = None
        self._accepting = False
        self._links: dict[bytes, Link] = {}
        self._stuck: set[bytes] = set()  # peers whose last message the socket did not take
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Bind. Raises OSError with EADDRINUSE when somebody else listens there."""
        host = await numeric(self.ip) if self.ip else "0.0.0.0"
        address = f"tcp://{unparse_host_port(host, self.port)}"
        try:
            self._endpoint = registry.listen(address, **OPTIONS)
        except AddressInUse as exc:
            raise OSError(errno.EADDRINUSE, str(exc)) from exc
        except ConfigError as exc:
            raise OSError(errno.EADDRNOTAVAIL, str(exc)) from exc
        self._bound = parse_host_port(self._endpoint.address.removeprefix("tcp://"))
        self._wire = Wire(self._endpoint, self._take)
        self._accepting = True

    def stop(self) -> None:
        """Accept no more comms; those that stand go on."""
        self._accepting = False
        self._close_if_empty()

    def get_host_port(self) -> tuple[str, int]:
        """The listening address. Raises ValueError before start()."""
        if self._endpoint is None:
            raise ValueError("invalid operation on non-started listener")
        return self._bound

    @property
    def listen_address(self) -> str:
        """As bound, maybe with a wildcard for its host."""
        return PREFIX + unparse_host_port(*self.get_host_port())

    @property
    def contact_address(self) -> str:
        """Where others reach it."""
        host, port = self.get_host_port()
        return PREFIX + unparse_host_port(ensure_concrete_host(host, self.default_host), port)

    # --- peers --------------------------------------------------------------------------------

    def _take(self) -> None:
        wire = self._wire
        assert wire is not None
        recv, links = self._endpoint.recv, self._links
        while not wire.closed:
            got = recv()
            if got is None:
                break
            peer, frames = got
            link = links.get(peer)
            if link is None:
                if frames and frames[0] == HELLO:
                    self._welcome(peer, frames)
            elif frames:
                link.arrived(frames)
            else:
                link.lost()
        stuck, self._stuck = self._stuck, set()
        for peer in stuck:
            if peer in links:
                links[peer].flush()

    def _welcome(self, peer: bytes, hello: Sequence[Any]) -> None:
        if not self._accepting or len(hello) < 2 or hello[1] != b"%d" % VERSION:
            reason = "another version of zfabric listens" if self._accepting else "not listening"
            try:
                self._endpoint.send(peer, (CLOSE, reason.encode()))
            except TransportError:
                return
            return
        link = Link(partial(self._send, peer), partial(self._forget, peer))
        self._links[peer] = link
        names = self._endpoint.names_of(peer)
        if names is None:  # it left while we looked
            link.lost()
            return
        if names[0][0] == names[1][0] and len(hello) > 2 and dask.config.get(MEMORY, True):
            link.meet(hello[2])
        comm = ZmqComm(link, address_of(names[0]), address_of(names[1]), self.deserialize)
        comm.allow_offload = self.allow_offload
        task = asyncio.ensure_future(self._handle(comm))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, comm: ZmqComm) -> None:
        try:
            await self.on_connection(comm)
        except CommClosedError:
            log.info("Connection from %s closed before handshake completed", comm.peer_address)
            return
        await self.comm_handler(comm)

    def _send(self, peer: bytes, frames: Sequence[Any]) -> bool:
        wire = self._wire
        if wire is None or wire.closed:
            raise TransportError("closed here")
        taken: bool = self._endpoint.send(peer, frames)
        if taken:
            wire.sent()
        else:
            self._stuck.add(peer)
            wire.stuck()
        return taken

    def _forget(self, peer: bytes, linger_s: float) -> None:
        # The socket is shared: who is forgotten last must not cut short those before.
        self._links.pop(peer, None)
        self._stuck.discard(peer)
        self._close_if_empty()

    def _close_if_empty(self) -> None:
        if not self._accepting and not self._links and self._wire is not None:
            self._wire.close(LINGER_S)
