"""Dialling: one socket per comm."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import dask
from distributed.comm.addressing import parse_host_port, unparse_host_port
from distributed.comm.core import Comm, Connector

from zfabric.errors import TransportError
from zfabric.integrations.distributed.addresses import numeric, refuse_encryption
from zfabric.integrations.distributed.comm import MEMORY, PREFIX, ZmqComm, address_of
from zfabric.integrations.distributed.framing import HELLO, WHOLE
from zfabric.integrations.distributed.link import Link
from zfabric.integrations.distributed.wire import Wire
from zfabric.transport import registry
from zfabric.transport.contract import LARGE

VERSION = 5
"""Of what links say to one another; a listener refuses others."""

DIAL_S = 2.0
"""Seconds in which a connection stands or is given up. distributed then tries again, backing off,
until its own timeout. ZeroMQ's I/O threads answer for a peer whose Python is busy."""

OPTIONS: dict[str, Any] = {
    # Credit bounds what is on its way to 1024 messages and 64 MiB; this is only the fuse.
    "hwm": 4096,
    "max_frame": WHOLE + LARGE,
    "max_frames": 4,
}


class ZmqConnector(Connector):
    """Makes comms to listeners elsewhere."""

    async def connect(self, address: str, deserialize: bool = True, **connection_args: Any) -> Comm:
        """A comm with the listener at host:port. Raises OSError if none answers in time."""
        refuse_encryption(PREFIX + address, connection_args)
        host, port = parse_host_port(address)
        target = unparse_host_port(await numeric(host), port)
        dialled = _Dialled(f"tcp://{target}")
        try:
            await asyncio.wait_for(dialled.up, DIAL_S)
        except TimeoutError:
            dialled.link.abort(linger_s=0.0)
            raise OSError(f"nobody answers at {PREFIX}{address}") from None
        except BaseException:
            dialled.link.abort(linger_s=0.0)
            raise
        names = dialled.channel.names()
        local = address_of(names[0]) if names else address_of((host, 0))
        return ZmqComm(dialled.link, local, PREFIX + address, deserialize)


class _Dialled:
    """A channel, its wire and its link."""

    def __init__(self, address: str) -> None:
        self.channel: Any = registry.connect(address, **OPTIONS)
        self.wire = Wire(self.channel, self._take)
        self.link = Link(self._send, self.wire.close)
        self.up: asyncio.Future[None] = self.link.loop.create_future()
        self._dial()

    def _dial(self) -> None:
        """The first word, once there is a connection to say it on."""
        offer = self.link.offer() if dask.config.get(MEMORY, True) else b"-"
        if self.channel.send((HELLO, b"%d" % VERSION, offer)):
            self.up.set_result(None)
            self.wire.sent()

    def _send(self, frames: Sequence[Any]) -> bool:
        if self.wire.closed:
            raise TransportError("closed here")
        taken: bool = self.channel.send(frames)
        if taken:
            self.wire.sent()
        else:
            self.wire.stuck()
        return taken

    def _take(self) -> None:
        if not self.up.done():
            # Nobody speaks before we do; this also reads that the connection stands.
            if self.channel.recv() is None:
                self._dial()
            return
        recv, arrived, wire = self.channel.recv, self.link.arrived, self.wire
        while not wire.closed:
            frames = recv()
            if frames is None:
                break
            if not frames:
                self.link.lost()
                return
            arrived(frames)
        if not wire.closed:
            self.link.flush()
