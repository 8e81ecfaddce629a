"""Dialling brokers and workers, with keys where the fabric has them.

The address of a worker's data door names its public key: `tcp://10.0.0.2:4001?key=<64 hex digits>`.
It comes by way of the broker, whose word is authentic, so whoever dials knows whom to expect.
"""

from __future__ import annotations

from typing import Any

from zfabric import transport
from zfabric.config import Settings
from zfabric.errors import ConfigError
from zfabric.keys import Join, KeyPair
from zfabric.keys.pair import key_bytes
from zfabric.runtime.binding import link_options
from zfabric.runtime.data_guard import client_keys
from zfabric.transport import Channel

_MARK = "?key="


def dial_broker(address: str, join: Join | None, settings: Settings) -> Channel:
    """A channel to a broker.  join: keys for it, None where it has none."""
    if join is None:
        return transport.connect(address, **link_options(address, settings))
    security = client_keys(join.broker, join.own)
    return transport.connect(address, **link_options(address, settings), security=security)


def dial_data(address: str, own: KeyPair | None, settings: Settings) -> Channel:
    """A channel to where a worker serves values; its address is the one given, key and all.

    Raises ConfigError for a door with a key where we have none, and the other way round: in a
    fabric with keys nothing goes over an open connection.
    """
    plain, mark, text = address.partition(_MARK)
    if own is None or not plain.startswith("tcp://"):
        if mark:
            raise ConfigError(f"{plain} wants a key, and this end has none")
        if own is not None and "tcp" in plain.partition("://")[0]:
            raise ConfigError(f"{plain} has no key, and this fabric has")
        return transport.connect(address, **bulk_options(address, settings))
    if not mark:
        raise ConfigError(f"{plain} has no key, and this fabric has")
    security = client_keys(key_bytes(text), own)
    channel = transport.connect(plain, **bulk_options(plain, settings), security=security)
    channel.address = address
    return channel


def bulk_options(address: str, settings: Settings) -> dict[str, Any]:
    """What an endpoint for values is made with, at either end."""
    options = link_options(address, settings)
    if address.partition("://")[0] in ("tcp", "ipc"):
        options["bulk"] = True
    return options


def with_key(address: str, public: bytes) -> str:
    """The address that tells others of a data door and its key."""
    return f"{address}{_MARK}{public.hex()}"
