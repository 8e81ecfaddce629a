"""Engines: other schedulers that serve zfabric's verbs, chosen by the scheme of an address.

`Client("dask://scheduler:8786")` is an instance of a subclass of Client that somebody else brings:
by an entry point in the group `zfabric.engines` (its name is the scheme, its object the subclass),
or by a call of `register`. This room knows none of them.
"""

from __future__ import annotations

import importlib
from typing import Any

from zfabric.errors import ConfigError

ENTRY_POINTS = "zfabric.engines"

OURS = frozenset({"tcp", "ipc", "inproc", "sock+tcp", "mpi"})
"""Schemes of the fabric's own transports: nobody is asked about them."""

_registered: dict[str, str] = {}


def register(scheme: str, engine: str) -> None:
    """Serve addresses of this scheme by a subclass of Client, named "module:class"."""
    _registered[scheme] = engine


def engine_of(address: Any) -> Any:
    """The class that serves this address; None: a fabric does. Raises ConfigError.

    The error is that of an engine which cannot be loaded, mostly for want of its library.
    """
    if not isinstance(address, str):
        return None
    scheme, separator, _ = address.partition("://")
    if not separator or scheme in OURS:
        return None
    engine = _registered.get(scheme) or _by_entry_point(scheme)
    if engine is None:
        return None
    module, _, name = engine.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as exc:
        raise ConfigError(f"{scheme}:// needs a library that is not here: {exc}") from exc


def _by_entry_point(scheme: str) -> str | None:
    from importlib import metadata

    for point in metadata.entry_points(group=ENTRY_POINTS, name=scheme):
        return point.value
    return None
