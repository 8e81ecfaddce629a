"""The thread that moves a process's values, so that its other thread has time for the control.

It owns the data sockets: the listener where others ask for this store's values, and the channels
on which this end asks others. What costs time there (copies, waiting) runs without the
interpreter's lock, so a gigabyte on its way delays a control message by tens of microseconds.

The owner's thread and this one talk by queues of calls. What this end wants said through the
broker goes to the owner, whose the control channel is; so do all callbacks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from time import monotonic
from typing import Any

from zfabric import wire
from zfabric.config import Settings
from zfabric.core.transfer import Source
from zfabric.keys import KeyPair
from zfabric.messages import Message
from zfabric.runtime.fetch import Fetcher, Way
from zfabric.runtime.link_book import LinkBook
from zfabric.runtime.memory_door import MemoryDoor
from zfabric.runtime.store import Store
from zfabric.runtime.value import Value
from zfabric.runtime.value_server import ValueServer
from zfabric.transport.contract import Listener, Poller

log = logging.getLogger(__name__)

RETRY_S = 0.005
"""When to try a full link again."""

JOIN_S = 5.0

Deliver = Callable[..., None]


class DataThread:
    """The transfers of one process. Every method may be called from any thread.

    deliver: called as deliver(function, *args), has the owner's thread call function(*args) soon.
    relay: called there with (session number, frames) to be sent through the broker.
    store, listener, on_put: of a worker; see ValueServer.  own, links, relay_is_local, allocate:
    see Fetcher.
    The listener is closed at the end of the thread.
    """

    def __init__(
        self,
        deliver: Deliver,
        relay: Callable[[int, list[Any]], None],
        *,
        own: KeyPair | None = None,
        settings: Settings,
        links: LinkBook,
        relay_is_local: bool = False,
        store: Store | None = None,
        listener: Listener | None = None,
        on_put: Callable[[int, int], None] | None = None,
        allocate: Callable[[Sequence[int]], Value] | None = None,
    ) -> None:
        self._deliver = deliver
        self._relay = relay
        self._own = own
        self._settings = settings
        self._links = links
        self._relay_is_local = relay_is_local
        self._store = store
        self._listener = listener
        self._on_put = on_put
        self._allocate = allocate or (Value.allocate if store is None else store.allocate)
        self._door = self._open_door()
        self.door = "" if self._door is None else self._door.address
        """The address under which processes of this host get values as memory; "" for none."""
        self._calls: deque[Callable[[], object]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="zfabric-data", daemon=True)
        self._thread.start()

    # --- for the owner ------------------------------------------------------------------------

    def fetch(
        self, id_: int, nbytes: int, sources: Sequence[Way], on_end: Callable[[Value | None], None]
    ) -> None:
        """See Fetcher.fetch. Where there is a store, others who ask for the value meanwhile get
        the parts that are here, and wait for the rest."""

        def end(value: Value | None) -> None:
            on_end(value)
            if self._store is not None:
                self._post(lambda: self._arrived(id_))

        def begin() -> None:
            if self._server is not None:
                self._server.expect(id_)
            self._fetcher.fetch(
                id_, nbytes, sources, lambda value: self._deliver(end, value), monotonic()
            )

        self._post(begin)

    def serves_at(self, number: int, address: str) -> None:
        """Say when asking for values where others get them from now on; number: the worker's."""

        def note() -> None:
            self._fetcher.place = (number, address)

        self._post(note)

    def put(
        self,
        id_: int,
        sizes: Sequence[int],
        area: Source,
        target: Way,
        on_end: Callable[[str], None],
    ) -> None:
        """See Fetcher.put."""
        self._post(
            lambda: self._fetcher.put(
                id_, sizes, area, target, lambda error: self._deliver(on_end, error), monotonic()
            )
        )

    def relayed(self, peer: int, message: Message) -> None:
        """What a Relay from another session brought."""
        self._post(lambda: self._take_relay(peer, message))

    def gone(self, peer: int) -> None:
        """The broker says that there is no such session."""
        self._post(lambda: self._fetcher.on_gone(peer, monotonic()))

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """Have function(*args) called in this thread: for what the listener's owner must do."""
        self._post(lambda: function(*args))

    def reset(self) -> None:
        """Forget all transfers, without callbacks."""

        def forget() -> None:
            self._fetcher.close()
            if self._server is not None:
                self._server.forget()

        self._post(forget)

    def close(self) -> None:
        """End the thread, and the listener with it. What is on its way is forgotten."""
        self._closing = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_S)

    def _post(self, call: Callable[[], object]) -> None:
        self._calls.append(call)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake_fd, 1)

    def __del__(self) -> None:
        # Not at the thread's end: an owner may be about to write to it.
        os.close(self._wake_fd)

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        poller = Poller()
        self._fetcher = Fetcher(
            poller,
            self._relay_out,
            own=self._own,
            settings=self._settings,
            links=self._links,
            relay_is_local=self._relay_is_local,
            allocate=self._allocate,
        )
        self._server: ValueServer | None = None
        if self._store is not None:
            self._server = ValueServer(
                self._store,
                self._listener,
                self._put_came,
                settings=self._settings,
                links=self._links,
                coming=self._fetcher.coming,
            )
        self._segments = [self._fetcher.segments]
        if self._store is not None:
            self._segments.append(self._store.segments)
        if self._door is not None:
            self._door.watch(poller.add, poller.discard)
        poller.add(self._wake_fd)
        if self._listener is not None:
            poller.add(self._listener)
        try:
            while not self._closing:
                self._turn(poller)
        except BaseException as exc:
            log.exception("the data thread failed")
            self._deliver(_fail, exc)
        finally:
            self._fetcher.close()
            if self._door is not None:
                self._door.close()
            if self._listener is not None:
                self._listener.close()
            # They know this object, and whoever lets go of it wants its descriptor closed now.
            del self._fetcher, self._server, self._door, self._segments
            self._calls.clear()

    def _arrived(self, id_: int) -> None:
        if self._server is not None:
            self._server.arrived(id_, monotonic())

    def _open_door(self) -> MemoryDoor | None:
        # Where nobody shall dial in, nobody shall come by this way either.
        if self._store is None or self._listener is None or self._settings.shared_memory == "off":
            return None
        try:
            return MemoryDoor(self._store, self._put_came, f"zfabric-{os.urandom(16).hex()}")
        except OSError as exc:
            log.warning("no values by shared memory from here: %s", exc)
            return None

    def _turn(self, poller: Poller) -> None:
        fetcher, server = self._fetcher, self._server
        now = monotonic()
        wait_s: float | None = None
        if not fetcher.is_idle:
            wake = fetcher.tick(now)
            wait_s = None if wake is None else max(0.0, wake - now)
        if server is not None and server.tick():
            wait_s = RETRY_S if wait_s is None else min(wait_s, RETRY_S)
        if server is not None and server.look_at < inf:
            if now >= server.look_at:
                server.look(now)
            if (at := server.look_at) < inf:
                wait_s = max(0.0, at - now if wait_s is None else min(wait_s, at - now))
        for segments in self._segments:
            left_s = segments.tick(now)
            if left_s is not None:
                wait_s = left_s if wait_s is None else min(wait_s, left_s)
        for thing in poller.wait(wait_s):
            if thing is self._listener:
                assert server is not None
                server.on_ready(monotonic())
            elif thing == self._wake_fd:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(thing)
            elif self._door is not None and isinstance(thing, int) and self._door.owns(thing):
                self._door.on_ready(thing)
            elif fetcher.owns(thing):
                fetcher.on_ready(thing, monotonic())
                if server is not None and server.is_holding:
                    server.look(monotonic())
        while self._calls:
            self._calls.popleft()()

    def _take_relay(self, peer: int, message: Message) -> None:
        def reply(answer: Message) -> None:
            self._relay_out(peer, wire.encode(answer))

        now = monotonic()
        # A Fetch may ask for what we hold, or for more of what we put somewhere.
        name = f"session {peer} by way of the broker"
        server = self._server
        if server is None or not server.on_message(message, reply, name, now, is_relayed=True):
            self._fetcher.on_relay(peer, message, now)

    def _relay_out(self, peer: int, frames: list[Any]) -> None:
        self._deliver(self._relay, peer, frames)

    def _put_came(self, id_: int, nbytes: int) -> None:
        if self._on_put is not None:
            self._deliver(self._on_put, id_, nbytes)


def _fail(exc: BaseException) -> None:
    """In the owner's thread: without its values it is of no use."""
    raise exc
