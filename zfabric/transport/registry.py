"""Which transport serves an address: chosen by the scheme before `://`.

Ours are imported when first used, so that a program pays for none it does not use. Outsiders add
theirs with `register`, or without a call by an entry point in the group `zfabric.transports`:
its name is the scheme, its object a module (or class) with `listen` and `connect`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from zfabric.errors import ConfigError
from zfabric.transport.contract import Channel, Listener

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

ENTRY_POINTS = "zfabric.transports"


class Transport(NamedTuple):
    """The two functions that make a transport; each takes an address and options."""

    listen: Callable[..., Listener]
    connect: Callable[..., Channel]


_OURS = {
    "tcp": "zfabric.transport.zmq",
    "ipc": "zfabric.transport.zmq",
    "inproc": "zfabric.transport.zmq",
    "sock+tcp": "zfabric.transport.plain",
    "mpi": "zfabric.transport.mpi",
}
_registered: dict[str, Transport] = {}


def listen(address: str, **options: Any) -> Listener:
    """A listener at `address`; port 0 picks a free one, `.address` has the real one.

    Raises ConfigError for an unknown scheme or an address that makes no sense, AddressInUse when
    somebody else listens there. After an error nothing is bound.
    """
    return transport_of(address).listen(address, **options)


def connect(address: str, **options: Any) -> Channel:
    """A channel that dials `address` in the background, and again whenever it is lost.

    Returns at once, connected or not. Raises ConfigError for an unknown scheme or an address that
    makes no sense; that nobody answers is no error here.
    """
    return transport_of(address).connect(address, **options)


def register(
    scheme: str, *, listen: Callable[..., Listener], connect: Callable[..., Channel]
) -> None:
    """Serve addresses of this scheme from now on; a later registration replaces an earlier one.

    scheme: without `://`. Raises ConfigError if it is empty or has anything but letters, digits
    and `+-.` in it.
    """
    if not scheme or not all(c.isalnum() or c in "+-." for c in scheme):
        raise ConfigError(f"{scheme!r} cannot be an address scheme; use letters, digits and +-.")
    _registered[scheme] = Transport(listen, connect)


def entry_points() -> EntryPoints:
    """Entry points of our group. The import takes 20 ms, which most programs need not spend."""
    from importlib import metadata

    return metadata.entry_points(group=ENTRY_POINTS)


def schemes() -> list[str]:
    """All schemes known here, those of entry points included, sorted."""
    found = {point.name for point in entry_points()}
    return sorted(found | set(_OURS) | set(_registered))


def transport_of(address: str) -> Transport:
    """The transport that serves an address. Raises ConfigError, as `listen` does."""
    scheme, separator, rest = address.partition("://")
    if separator and rest:
        known = _registered.get(scheme) or _loaded(scheme)
        if known is not None:
            return known
    raise ConfigError(_unknown(address, scheme if separator else ""))


def _loaded(scheme: str) -> Transport | None:
    if scheme in _OURS:
        module: Any = import_module(_OURS[scheme])
    else:
        point = next((p for p in entry_points() if p.name == scheme), None)
        if point is None:
            return None
        try:
            module = point.load()
        except Exception as exc:
            raise ConfigError(
                f"the transport for {scheme}:// ({point.value}) cannot be loaded: {exc}"
            ) from exc
    transport = Transport(module.listen, module.connect)
    _registered[scheme] = transport
    return transport


def _unknown(address: str, scheme: str) -> str:
    known = schemes()
    listing = ", ".join(f"{name}://" for name in known)
    if not scheme:
        return (
            f"{address!r} is not an address: it has no scheme; did you mean"
            f" tcp://{address or '127.0.0.1:0'}? Known: {listing}"
        )
    if scheme in known:
        return f"{address!r} is not an address: nothing follows {scheme}://"
    near = difflib.get_close_matches(scheme, known, 1)
    hint = f"did you mean {near[0]}://? " if near else ""
    return f"{address!r}: no transport for {scheme}://; {hint}Known: {listing}"
