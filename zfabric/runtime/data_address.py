"""Where a worker serves its values, chosen by how it reaches its broker."""

from __future__ import annotations

import logging
import os
import socket

from zfabric import transport
from zfabric.config import Settings
from zfabric.errors import ConfigError, InsecureBind, TransportError
from zfabric.runtime.binding import check_exposure, is_loopback, split_tcp
from zfabric.runtime.data_guard import DataGuard
from zfabric.runtime.dialling import bulk_options
from zfabric.transport.contract import Listener

log = logging.getLogger(__name__)


def listen_for_data(
    broker: str,
    wanted: str | None,
    settings: Settings,
    insecure: bool = False,
    guard: DataGuard | None = None,
) -> Listener | None:
    """The listener for a worker's values; None when others must go through the broker.

    broker: its address.  wanted: an address, "" for none, None to choose: beside an ipc broker's
    socket, on loopback for a broker on loopback, else on the interface that leads to the broker.
    insecure: a wanted address may be one that other hosts reach.  guard: admits by keys.
    Raises ConfigError, TransportError only for an address that was asked for.
    """
    if wanted == "":
        return None
    address = data_address_for(broker) if wanted is None else wanted
    options = bulk_options(address, settings)
    if wanted is not None:
        if guard is not None and wanted.startswith("tcp://"):
            options["security"] = guard.security
        else:
            _check_wanted(wanted, insecure)
        return transport.listen(wanted, **options)
    if guard is not None:
        options["security"] = guard.security
    try:
        listener = transport.listen(address, **options)
    except (ConfigError, TransportError) as exc:
        log.warning("no direct way to this worker's values (%s); the broker relays them", exc)
        return None
    parts = split_tcp(listener.address)
    if guard is None and parts is not None and not is_loopback(parts[1]):
        log.warning(
            "serving values on %s without keys, as the broker is on another host: anybody who can"
            ' reach it can read and put values (--data-address "" has the broker relay them)',
            listener.address,
        )
    return listener


def _check_wanted(address: str, insecure: bool) -> None:
    try:
        check_exposure(address, insecure)
    except InsecureBind as exc:
        raise InsecureBind(
            f"the data address {address} can be reached from other machines, and whoever reaches it"
            " could read and replace values here. Leave it out, or give an address on loopback or"
            ' "" (the broker relays values then); in a network where you trust every machine and'
            f" user, type:\n  zfabric worker ... --data-address {address} --insecure"
        ) from exc


def data_address_for(broker: str) -> str:
    """The address to listen at, by default, for a worker of this broker."""
    mark = f"data-{os.getpid()}-{os.urandom(3).hex()}"
    scheme, _, rest = broker.partition("://")
    if scheme == "ipc":
        return f"ipc://{os.path.join(os.path.dirname(rest), mark)}"
    parts = split_tcp(broker)
    if parts is None:
        return f"{scheme}://{mark}"
    _, host, port = parts
    if is_loopback(host):
        return f"{scheme}://127.0.0.1:0"
    own = _interface_towards(host.strip("[]"), port)
    return f"{scheme}://[{own}]:0" if ":" in own else f"{scheme}://{own}:0"


def _interface_towards(host: str, port: int) -> str:
    """The address of this host's interface that leads to another host; nothing is sent."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(found[0], socket.SOCK_DGRAM) as probe:
            probe.connect(found[4])
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
