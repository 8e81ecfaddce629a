"""What distributed asks of addresses, and what `zmq://` cannot give."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Any


async def numeric(host: str) -> str:
    """The IP address of a host name, looked up without blocking; numbers stay. Raises OSError."""
    try:
        socket.getaddrinfo(host or "127.0.0.1", None, flags=socket.AI_NUMERICHOST)
        return host or "127.0.0.1"
    except socket.gaierror as exc:
        if exc.errno != socket.EAI_NONAME:
            raise
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    # IPv4 first, as tcp:// has it: IPv6 is broken in more places.
    found.sort(key=lambda info: info[0] != socket.AF_INET)
    return str(found[0][4][0])


def refuse_encryption(address: str, connection_args: Mapping[str, Any]) -> None:
    """Raise RuntimeError if these ask for what `zmq://` does not do: TLS."""
    if connection_args.get("require_encryption") or connection_args.get("ssl_context"):
        raise RuntimeError(
            "encryption required by Dask configuration, refusing communication from/to"
            f" {address!r}: zmq:// has no TLS. Use protocol='tls://', or zmq:// inside a network"
            " that you trust"
        )
