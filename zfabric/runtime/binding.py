"""Where a broker may listen: the next free port, and never beyond this host without keys."""

from __future__ import annotations

import ipaddress
import logging
import socket
from typing import Any

from zfabric import transport
from zfabric.config import Settings
from zfabric.errors import AddressInUse, ConfigError, InsecureBind
from zfabric.transport import Listener

log = logging.getLogger(__name__)

PORTS_TRIED = 100

_BEATING = frozenset(("tcp", "ipc"))
"""Schemes whose connections have a heartbeat of their own."""


def link_options(address: str, settings: Settings) -> dict[str, Any]:
    """What settings say of an endpoint at this address."""
    options: dict[str, Any] = {"max_frame": settings.max_frame}
    if address.partition("://")[0] in _BEATING:
        options["dead_s"] = settings.dead_s
    if address.startswith("tcp://"):
        options["seal"] = True
    return options


def split_tcp(address: str) -> tuple[str, str, int] | None:
    """(scheme, host, port) of an address with a port; None for the other kinds."""
    scheme, mark, rest = address.partition("://")
    if not mark or "tcp" not in scheme:
        return None
    host, colon, port = rest.rpartition(":")
    if not colon or not (port.isdigit() or port == "*") or int(port.replace("*", "0")) > 65535:
        raise ConfigError(
            f"{address} has no port; write it like {scheme}://127.0.0.1:8787 (port 0: a free one)"
        )
    return scheme, host, int(port.replace("*", "0"))


def is_loopback(host: str) -> bool:
    """Whether only processes of this host can reach a listener bound to this host name."""
    host = host.strip("[]")
    if host in ("*", ""):
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except OSError as exc:
        raise ConfigError(f"the host {host!r} cannot be resolved: {exc.strerror or exc}") from exc
    return all(ipaddress.ip_address(str(info[4][0])).is_loopback for info in found)


def reachable(address: str) -> str:
    """What to type elsewhere to reach a listener bound to this address.

    One that listens on all interfaces (0.0.0.0, [::], *) has an address that nobody can dial:
    it is told as that of the interface with the way out, else of any beyond loopback, else as
    this host's name. All other addresses come back as they are.
    """
    parts = split_tcp(address)
    if parts is None or parts[1].strip("[]") not in ("0.0.0.0", "::", "*", ""):
        return address
    scheme, host, port = parts
    families = [socket.AF_INET]
    if "::" in host:
        families.append(socket.AF_INET6)
    for look in (_way_out, _any_interface):
        for family in families:
            own = look(family)
            if own:
                return f"{scheme}://[{own}]:{port}" if ":" in own else f"{scheme}://{own}:{port}"
    return f"{scheme}://{socket.gethostname()}:{port}"


_FAR = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses kept for documentation: nobody has them, so the way there is the way out."""


def _way_out(family: socket.AddressFamily) -> str:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((_FAR[family], 9))  # asks the routing table; nothing is sent
            return _beyond_loopback(str(probe.getsockname()[0]))
    except OSError:
        return ""


def _any_interface(family: socket.AddressFamily) -> str:
    import psutil

    found = (a.address for some in psutil.net_if_addrs().values() for a in some)
    of_family = (a for a in found if a and _is_of(family, a))
    return next((own for a in of_family if (own := _beyond_loopback(a))), "")


def _is_of(family: socket.AddressFamily, text: str) -> bool:
    try:
        socket.inet_pton(family, text)
    except OSError:
        return False
    return True


def _beyond_loopback(text: str) -> str:
    """The address, "" where it is none that another host could dial."""
    own = ipaddress.ip_address(text)
    return "" if own.is_loopback or own.is_link_local or own.is_unspecified else text


def check_exposure(address: str, insecure: bool) -> None:
    """Raise InsecureBind for a listener beyond this host, unless it was asked for by name."""
    parts = split_tcp(address)
    if parts is None or is_loopback(parts[1]):
        return
    if not insecure:
        advice = "Make keys, which it then takes by itself:\n  zfabric keys init\n"
        if parts[0] != "tcp":
            advice = (
                f"{parts[0]}:// has no keys; make some, and listen on tcp://:\n"
                "  zfabric keys init\n"
                f"  zfabric broker --listen tcp://{parts[1]}:{parts[2]}\n"
            )
        raise InsecureBind(
            f"{address} can be reached from other machines, and whoever reaches it could run any "
            f"code here. {advice}"
            "or listen on tcp://127.0.0.1:8787 and reach it through `ssh -L`; or, in a network"
            " where you trust every machine and user, type:\n"
            f"  zfabric broker --listen {address} --insecure"
        )
    log.warning(
        "listening on %s without keys: anybody who can reach it can run any code here", address
    )


def listen_near(address: str, *, strict: bool, **options: Any) -> Listener:
    """Listen at the address, or, unless strict, at the next free port, saying so."""
    parts = split_tcp(address)
    if parts is None or parts[2] == 0 or strict:
        return transport.listen(address, **options)
    scheme, host, port = parts
    for candidate in range(port, min(port + PORTS_TRIED, 65536)):
        try:
            listener = transport.listen(f"{scheme}://{host}:{candidate}", **options)
        except AddressInUse:
            continue
        if candidate != port:
            log.warning("port %d is in use; listening on %d instead", port, candidate)
        return listener
    raise AddressInUse(address, f"ports {port} to {candidate} are all in use; choose another one")
