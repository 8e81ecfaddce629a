"""`Lock`: one at a time, among all clients and tasks of a fabric."""

from __future__ import annotations

import threading
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import msgpack

from zfabric.client import misuse
from zfabric.client.alarm import Alarm
from zfabric.client.current import get_client
from zfabric.errors import TransportError, UsageError
from zfabric.messages import Acquire, Unlock

if TYPE_CHECKING:
    from zfabric.client.client import Client

MAX_NAME = 1024
"""Characters of a lock's name; what the wire takes."""


class _Held(NamedTuple):
    """era: of the client's link when the lock was given (IoThread.lock_era)."""

    client: Client
    era: int
    request: int


class Lock:
    """A lock of the fabric, known by its name.

    Works in the user's process and inside tasks, and travels by its name. It is the broker that
    holds it: taking it needs no slot. It ends with its holder: when a client closes or its process
    dies, and when the process of a slot dies, the next one in the queue has it. Who came first is
    served first. As with threading.Lock, any thread may release it, and it cannot be taken twice.

    A slot that waits for a lock runs nothing else meanwhile. So a task that holds a lock should
    not wait for other tasks: the slots that these need may all be waiting for the lock.

    name: a text.  client: whose fabric; None for that of `zfabric.get_client()` when it is taken.
    """

    __slots__ = ("__weakref__", "_client", "_guard", "_held", "name")

    _by_name: WeakValueDictionary[tuple[type, str], Lock] = WeakValueDictionary()
    _by_name_guard = threading.RLock()
    _in_use: set[Lock] = set()
    """Those that are held: `Lock("a").acquire()` is not forgotten before `Lock("a").release()`."""
    # These guards can be taken again by the thread that has them: the collector may run within
    # them, and what it finalises may be about locks.

    name: str

    def __new__(cls, name: str, client: Client | None = None) -> Lock:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise UsageError(f"a lock's name is a text of 1 to {MAX_NAME} characters")
        # One object per name and process. Who takes several locks in the order of their ids, as
        # xarray does, then has one order in all threads, and no two of them wait for one another.
        with Lock._by_name_guard:
            lock = None if client is not None else Lock._by_name.get((cls, name))
            if lock is None:
                lock = super().__new__(cls)
                lock.name = name
                lock._client = client
                lock._guard = threading.RLock()
                lock._held = []
                if client is None:
                    Lock._by_name[cls, name] = lock
            return lock

    _client: Client | None
    _guard: threading.RLock
    _held: list[_Held]

    def __reduce__(self) -> Any:
        return Lock, (self.name,)

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Whether it is ours now. timeout: seconds to wait at most; None or below 0: any time.

        Raises ClientClosed, ValueError for a timeout without blocking.
        """
        if timeout is not None and timeout < 0:
            timeout = None
        if not blocking and timeout is not None:
            raise ValueError("can't specify a timeout for a non-blocking call")
        client = self._client or get_client()
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            got = _acquire(client, self.name, blocking, deadline)
            if type(got) is _Held:
                with self._guard:
                    self._held.append(got)
                    Lock._in_use.add(self)
                return True
            if got is False:
                return False
            # The broker lost our session, and with it our place in the queue.

    def release(self) -> None:
        """Give it to the next one. Raises RuntimeError when it is not held through this object,
        TransportError when it was lost before: somebody else may have had it meanwhile."""
        with self._guard:
            if not self._held:
                raise RuntimeError(f"release of the lock {self.name!r}, which is not held here")
            client, era, request = self._held.pop()
            if not self._held:
                Lock._in_use.discard(self)
        io = client._io
        if not io.is_open:
            return  # it ended with the client
        if io.link.lock_era != era:
            raise TransportError(
                f"the lock {self.name!r} was lost with the connection to the broker before it was"
                " released; what it protects may have been used by others since then"
            )
        io.post(io.submitter.say, Unlock(request))

    def locked(self) -> bool:
        """Whether anybody holds it now."""
        client = self._client or get_client()
        if not client._io.is_open:
            misuse.refuse_closed(client)
        answer = client._io.ask("locked", client._settings.dead_s, text=self.name)
        return bool(msgpack.unpackb(answer))

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Lock {self.name!r}{' held here' if self._held else ''}>"


def _acquire(client: Client, name: str, blocking: bool, deadline: float | None) -> _Held | bool:
    """False: somebody else has it, or the time is over. True: to be asked for anew."""
    io = client._io
    if not hasattr(io, "is_this_thread"):
        raise UsageError(
            f"a zfabric.Lock needs a fabric's broker, and {client.address} is none: "
            "on a Dask cluster use distributed.Lock"
        )
    if not io.is_open:
        misuse.refuse_closed(client)
    if io.is_this_thread():
        # Something was collected here whose end asks for a lock; the answer could not be heard.
        if blocking:
            raise UsageError("a lock cannot be waited for in the client's I/O thread")
        return False
    request = io.questions.new_number()
    alarm = Alarm()
    answer: list[tuple[bool, int]] = []
    io.questions.lockers[request] = (alarm, answer)
    try:
        io.call(io.submitter.say, Acquire(request, name, blocking))
        rang = alarm.wait(None if deadline is None else deadline - monotonic())
    except BaseException:  # Ctrl-C: what may be ours by now goes back
        io.post(io.submitter.say, Unlock(request))
        raise
    finally:
        io.questions.lockers.pop(request, None)
    if answer:
        held, era = answer[0]
        return _Held(client, era, request) if held else False
    if not rang:
        io.post(io.submitter.say, Unlock(request))
        return False
    if not io.is_open:
        misuse.refuse_closed(client)
    # The broker restarted. This request may be in its journal, or go to it again, and what it said
    # of it may be lost: so it is taken back before it is made anew.
    io.post(io.submitter.say, Unlock(request))
    return True
