"""Which clients are open in this process: for get_client(), for exit, and for fork."""

from __future__ import annotations

import atexit
import os
import threading
from typing import TYPE_CHECKING
from weakref import WeakSet

from zfabric.config import Settings
from zfabric.errors import UsageError

if TYPE_CHECKING:
    from zfabric.client.client import Client

_open: WeakSet[Client] = WeakSet()
_order: list[int] = []
"""ids of open clients, the newest last."""
_lock = threading.Lock()


def opened(client: Client) -> None:
    """Note a client that is ready."""
    with _lock:
        _open.add(client)
        _order.append(id(client))


def closed(client: Client) -> None:
    """Forget it."""
    with _lock:
        _open.discard(client)
        if id(client) in _order:
            _order.remove(id(client))


def get_client() -> Client:
    """The client of whoever calls.

    Inside a task: a client of the fabric that runs it, one for the whole slot process, so that
    tasks submit tasks and wait for them; the slot runs others meanwhile. Elsewhere: the client
    that was opened last and is still open. Raises UsageError where there is none.
    """
    from zfabric.client.client import Client
    from zfabric.client.waiting import slot_context

    context = slot_context()
    if context is not None:
        with _lock:
            client = context.client
        if client is None or not client._io.is_open:
            # The broker was there a moment ago, and may be about to be there again.
            patience_s = Settings.load().dead_s
            name = f"task-in-{context.worker}"
            made = Client(context.address, name=name, timeout=patience_s)
            with _lock:
                if context.client is None or not context.client._io.is_open:
                    context.client = made
                client = context.client
            if client is not made:  # another thread of this task was faster
                made.close()
        return client  # type: ignore[no-any-return]
    with _lock:
        by_id = {id(client): client for client in _open}
        for each in reversed(_order):
            if each in by_id:
                return by_id[each]
    raise UsageError("get_client() found no open client: make one with zfabric.Client()")


def _close_all() -> None:
    for client in list(_open):
        client.close()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for client in list(_open):
        client._mark_forked()
    _open.clear()
    _order.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)
