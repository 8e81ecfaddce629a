"""Which fabric a client belongs to: the one named, the one around it, or one of its own."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from zfabric.client import misuse
from zfabric.client.waiting import slot_context
from zfabric.errors import ConfigError
from zfabric.keys import Join, resolve

KINDS = ("process", "thread")


class Found(NamedTuple):
    """address: of the broker.  depth: 1 inside a task, else 0.  owned: a fabric to close.
    join: keys for it."""

    address: str
    depth: int
    owned: Any
    join: Join | None = None


def find_fabric(
    address: Any,
    *,
    n_workers: int | None,
    slots: int | None,
    kind: str | None,
    processes: bool | None,
    memory_limit: int | None = None,
    echo: bool = True,
) -> Found:
    """Where to connect; starts a LocalFabric where nothing else is named.

    echo: whether that one prints what its tasks print.

    Raises ConfigError for options that contradict one another.
    """
    context = slot_context()
    depth = 0 if context is None else 1
    if address is None:
        address = os.environ.get("ZFABRIC_ADDRESS")
    if address is None and context is not None:
        address = context.address
    if address is not None:
        misuse.refuse_local_options(
            address,
            n_workers=n_workers,
            slots=slots,
            kind=kind,
            processes=processes,
            memory_limit=memory_limit,
        )
        text = address if isinstance(address, str) else getattr(address, "address", None)
        if not isinstance(text, str):
            raise ConfigError(
                f"address={address!r}: it is a text such as tcp://host:8787, or a LocalFabric"
            )
        text, join = resolve(text)
        return Found(text, depth, None, join)
    if processes is not None:
        wanted = "process" if processes else "thread"
        if kind is not None and kind != wanted:
            raise ConfigError(f"kind={kind!r} and processes={processes} contradict one another")
        kind = wanted
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"kind={kind!r}: it is 'process' or 'thread'")
    from zfabric.launch.local import LocalFabric

    fabric = LocalFabric(
        n_workers=1 if n_workers is None else n_workers,
        slots=slots,
        kind=kind or "process",
        memory_limit=memory_limit or 0,
        echo=echo,
    )
    return Found(fabric.address, depth, fabric)
