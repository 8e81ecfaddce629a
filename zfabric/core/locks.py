"""The locks of a fabric: who holds each, and who waits for it.

A lock is a queue of requests, and whoever stands first holds it. It needs no task and no slot: the
broker alone knows of it. A request belongs to a client's session (inside a task, to the session of
its slot's nested client), so it ends with that session at the latest: a holder that died leaves
nothing locked. Requests are served in the order in which they came.

    Acquire ──> queued ──first──> held        Locked(held) is said once it is first
                  └────────┬────────┘
                         Unlock, or the session's end: the next one is first
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

from zfabric import messages as m
from zfabric.core.outbound import Outgoing
from zfabric.errors import RemoteProtocolError

Request: TypeAlias = tuple[int, int]
"""(session number, the session's own number for the request)."""


MAX_REQUESTS = 10_000
"""Open ones of one session."""


class Locks:
    """All locks that somebody holds."""

    def __init__(self) -> None:
        self._queues: dict[str, OrderedDict[Request, None]] = {}
        """By name; never an empty one. The first request holds the lock."""
        self._names: dict[int, dict[int, str]] = {}
        """Session number -> its requests -> the lock that each is about."""

    def acquire(self, session: int, message: m.Acquire) -> list[Outgoing]:
        """A client wants a lock. Raises RemoteProtocolError for a request that is open already."""
        request, name = message.request, message.name
        requests = self._names.setdefault(session, {})
        if request in requests:
            raise RemoteProtocolError("lock", f"request {request} for a lock was made twice")
        if len(requests) >= MAX_REQUESTS:
            raise RemoteProtocolError("lock", f"more than {MAX_REQUESTS} locks of one session")
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = OrderedDict()
        elif not message.waits:
            if not requests:
                del self._names[session]
            return [(session, m.Locked(request, False))]
        queue[session, request] = None
        requests[request] = name
        return [(session, m.Locked(request, True))] if len(queue) == 1 else []

    def unlock(self, session: int, message: m.Unlock) -> list[Outgoing]:
        """A client wants it no more, whether it holds it or waits. Unknown requests are ignored:
        one that was refused may be given up before the client knows."""
        requests = self._names.get(session)
        if requests is None:
            return []
        name = requests.pop(message.request, None)
        if not requests:
            del self._names[session]
        return [] if name is None else self._leave(name, (session, message.request))

    def session_ended(self, session: int) -> list[Outgoing]:
        """All its requests are over."""
        requests = self._names.pop(session, {})
        said: list[Outgoing] = []
        # The newest first: of several for one lock, none is told that it holds it just before it
        # goes as well.
        for request in sorted(requests, reverse=True):
            said += self._leave(requests[request], (session, request))
        return said

    def is_locked(self, name: str) -> bool:
        """Whether somebody holds it."""
        return name in self._queues

    def holder(self, name: str) -> int | None:
        """The session that holds it, None when nobody does."""
        queue = self._queues.get(name)
        return None if queue is None else next(iter(queue))[0]

    def n_waiting(self, name: str) -> int:
        """Requests behind the one that holds it."""
        return max(0, len(self._queues.get(name, ())) - 1)

    def requests(self, session: int | None = None) -> list[tuple[str, int, int]]:
        """(name, session, request) of all, or of one session's; each lock's in the order of its
        queue, the holder's first."""
        return [
            (name, number, request)
            for name, queue in self._queues.items()
            for number, request in queue
            if session is None or number == session
        ]

    def names(self) -> list[str]:
        """Of the locks that are held, in the order in which they were taken from being free."""
        return list(self._queues)

    def _leave(self, name: str, request: Request) -> list[Outgoing]:
        queue = self._queues[name]
        held = next(iter(queue)) == request
        del queue[request]
        if not queue:
            del self._queues[name]
            return []
        if not held:
            return []
        session, number = next(iter(queue))
        return [(session, m.Locked(number, True))]
