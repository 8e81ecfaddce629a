"""The user's side of a fabric: `Client`, `Future`, and what waits for futures."""

from __future__ import annotations

from typing import Any

from zfabric.client.as_completed import as_completed
from zfabric.client.client import Client
from zfabric.client.current import get_client
from zfabric.client.future import Future
from zfabric.client.waiting import wait

__all__ = [
    "Client",
    "Future",
    "as_completed",
    "fire_and_forget",
    "get_client",
    "progress",
    "register_by_value",
    "wait",
]


def fire_and_forget(futures: Any) -> None:
    """Keep tasks until they have ended, also when nobody holds their futures any more."""
    from zfabric.client.waiting import futures_of

    for future in futures_of(futures, "fire_and_forget()"):
        future.client.fire_and_forget(future)


def progress(futures: Any, **options: Any) -> None:
    """Show how far these futures are; see zfabric.client.progress_bar."""
    from zfabric.client.progress_bar import progress as show

    show(futures, **options)


def register_by_value(module: Any) -> None:
    """Send a module's functions and classes with the tasks: for modules that workers lack."""
    from zfabric.codec.functions import register_by_value as register

    register(module)
