"""Values too large to ride along: fetched from the workers that hold them, and put there.

The transfers run in the I/O thread, side by side; user threads only wait for their end. A value
that none of its holders gives is asked for at the broker, which tells of other holders or has it
computed again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from mmap import mmap
from resource import RLIMIT_NOFILE, getrlimit
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakSet

import msgpack

from zfabric.client import misuse
from zfabric.client.alarm import Alarm
from zfabric.client.future import Future
from zfabric.client.waiting import blocked, sleep
from zfabric.codec import layout
from zfabric.codec.arguments import dump_call
from zfabric.codec.serialise import Buffer, dumps, loads, nbytes_of
from zfabric.core.submitter import LOADED, Outcome
from zfabric.errors import ClientClosed, DataLost, ResultTimeout
from zfabric.messages import STORED, Register
from zfabric.runtime.memory_door import SCHEME
from zfabric.transport.locality import is_same_host

if TYPE_CHECKING:
    from zfabric.client.client import Client
    from zfabric.client.io_thread import IoThread

MAX_TRIES = 3
"""Times that a value is not where the broker says, or cannot be put, before that is an error."""

LOOK_AGAIN_S = 0.02
"""Between two looks for a worker to put a value on."""

STALE_S = 1.0
"""Age at which the list of workers is asked for again before a value is put."""

Target: TypeAlias = tuple[int, str]
"""(worker's number, data address)."""


class _Fetch:
    """One value on its way here; `outcome.value` holds it while the outcome is STORED.

    value: None when nobody had it.  n_tries: how many fetches of it have failed before.
    """

    __slots__ = ("__weakref__", "ended", "n_tries", "payload", "rings", "value")

    def __init__(self, payload: bytes, n_tries: int) -> None:
        self.payload = payload
        self.n_tries = n_tries
        self.value: Any = None
        self.ended = False
        self.rings: list[Alarm] = []

    def end(self, value: Any) -> None:
        """The I/O thread has done what it could."""
        self.value = value
        self.ended = True
        for alarm in list(self.rings):
            alarm()


class Values:
    """The bulk side of one client."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._io: IoThread = client._io
        self._lock = threading.Lock()
        self._under_way: set[_Fetch | _Put] = set()
        self._turn = 0
        self._stores: list[Target] = []
        self._looked_at = -STALE_S
        self._asked_at = -STALE_S
        self._well: set[int] = set()
        """Numbers of the workers that were there and well when that was asked."""
        self._in_files: WeakSet[Any] = WeakSet()
        """What has a descriptor: values that were fetched, and memory that objects lie in."""
        self._io.at_end.append(partial(_give_up, self._under_way))

    # --- fetching -----------------------------------------------------------------------------

    def begin_fetch(self, future: Future) -> None:
        """Have a stored value brought here; `fetch` waits for it."""
        self._begun(future._outcome)

    def fetch(self, future: Future, deadline: float | None) -> None:
        """Return when the outcome is LOADED, or is no longer STORED and has to be looked at anew.

        Raises DataLost when it is nowhere to be found, ResultTimeout at the deadline.
        """
        outcome = future._outcome
        fetch = self._begun(outcome)
        if fetch is None:
            return
        alarm = Alarm()
        fetch.rings.append(alarm)
        if not fetch.ended and self._io.is_open:
            with blocked():
                if not sleep(self._client, alarm, deadline):
                    raise ResultTimeout(f"{future.key} has ended; its value is still on its way")
        if fetch.value is not None:
            self._load(outcome, fetch)
        elif not self._io.is_open:
            if self._client._forked:
                misuse.refuse_closed(self._client)
            raise ClientClosed("the client was closed before the value was here")
        elif fetch.n_tries >= MAX_TRIES:
            raise DataLost(
                f"the value of {future.key} cannot be fetched from any worker", future.key
            )

    def _begun(self, outcome: Outcome) -> _Fetch | None:
        with self._lock:
            payload, held = outcome.payload, outcome.value
            if outcome.status != STORED or payload is None:
                return None
            if isinstance(held, _Fetch):
                if held.payload is payload:
                    return held
                fetch = _Fetch(payload, held.n_tries + 1)
            else:
                fetch = _Fetch(payload, 0)
            outcome.value = fetch
        self._io.post(self._start_fetch, outcome, fetch)
        return fetch

    def _load(self, outcome: Outcome, fetch: _Fetch) -> None:
        with self._lock:  # two threads may have waited; both get the same object
            if outcome.status == STORED and outcome.value is fetch:
                stored = fetch.value.unshared()
                if isinstance(stored.area.obj, mmap) and stored is not fetch.value:
                    self._in_files.add(stored.area.obj)
                outcome.value = loads(layout.split(stored.area, stored.sizes))
                outcome.status = LOADED
                outcome.payload = None
                stored.close()

    def _start_fetch(self, outcome: Outcome, fetch: _Fetch) -> None:
        """In the I/O thread."""

        def on_end(value: Any) -> None:
            if value is None and outcome.payload is fetch.payload and fetch.n_tries < MAX_TRIES:
                self._io.submitter.locate(outcome, self._io.questions.new_number())
            self._under_way.discard(fetch)
            if value is not None and value.fd >= 0:
                # Descriptors are the user's as well: beyond a quarter of them it costs a copy.
                if len(self._in_files) < getrlimit(RLIMIT_NOFILE)[0] // 4:
                    self._in_files.add(fetch)
                else:
                    value = value.copied()
            fetch.end(value)

        data = self._io.data
        if data is None:
            fetch.end(None)
            return
        self._under_way.add(fetch)
        nbytes, holders = msgpack.unpackb(fetch.payload)
        sources = [(number, address) for number, address in holders]
        data.fetch(outcome.id, nbytes, sources, on_end)

    # --- putting ------------------------------------------------------------------------------

    def scatter(
        self,
        data: Sequence[Any],
        broadcast: bool = False,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> list[Future]:
        """Each of `data` as a value in a worker's store (with `broadcast`: in each one's).

        meanwhile: called once, while they are on their way.
        """
        if not self._io.is_open:
            misuse.refuse_closed(self._client)
        many = len(data) != 1
        frames = [
            dumps(item, f"data[{place}]" if many else "data") for place, item in enumerate(data)
        ]
        outcomes = self._put_group(frames, broadcast, meanwhile)
        return [Future(self._client, outcome) for outcome in outcomes]

    def is_there(self, future: Future) -> bool:
        """Whether a value that was put is known to the broker, and a worker that it was put on is
        there and well. The broker is asked: it says nothing of lost data by itself."""
        outcome = future._outcome
        payload = outcome.payload
        if outcome.status != STORED or payload is None:
            return False
        if outcome.id not in self._io.submitter.outcomes:
            return False
        if monotonic() - self._asked_at > STALE_S:
            try:
                workers = self._client.info()["workers"]
            except ResultTimeout:
                return False  # the broker is away: it goes again when that is back
            self._well = {worker["number"] for worker in workers if not worker["suspect"]}
            self._asked_at = monotonic()
        return any(number in self._well for number, _ in msgpack.unpackb(payload)[1])

    def tidy_at(self, when: float) -> None:
        """When to let go of what is kept for calls to come, on a monotonic clock."""
        self._io.tidy_at = when

    def are_on_this_host(self) -> bool:
        """Whether values go to the workers' stores as memory that is handed over."""
        return self._client._settings.shared_memory == "on" and all(
            SCHEME in address and is_same_host(address.split()[0])
            for _, address in self._targets(fresh=False)
        )

    def put_arguments(self, frames: Sequence[Buffer]) -> int:
        """A call's frames as a value; its id. Whoever asked releases it."""
        return self._put_group([frames], False)[0].id

    def spread(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords that many calls share, with the large ones put into a store once."""
        limit = self._client._settings.argument_limit
        if nbytes_of(dump_call((), kwargs)[0]) <= limit:
            return kwargs
        large = {}
        for name, each in kwargs.items():
            frames, dependencies = dump_call((each,), {})
            if not dependencies and nbytes_of(frames) > limit // 4:
                large[name] = each
        return {**kwargs, **dict(zip(large, self.scatter(list(large.values())), strict=True))}

    def _put_group(
        self,
        items: Sequence[Sequence[Buffer]],
        broadcast: bool,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> list[Outcome]:
        """Put them side by side, once more elsewhere where that fails, and tell the broker."""
        submitter = self._io.submitter
        outcomes = submitter.new_outcomes(0, len(items))
        areas = [layout.Laid(frames) for frames in items]
        placed: list[list[Target]] = [[] for _ in items]
        left = list(range(len(items)))
        text = ""
        for attempt in range(MAX_TRIES):
            targets = self._targets(fresh=attempt > 0)
            puts = []
            for place in left:
                mine = targets if broadcast else [targets[self._turn % len(targets)]]
                self._turn += 1
                left_of = [len(mine)]
                for target in mine:
                    put = _Put(outcomes[place].id, areas[place], target, left_of)
                    self._io.post(self._start_put, put)
                    puts.append((place, put))
            if not attempt:
                meanwhile()
            for place, put in puts:
                with blocked():
                    sleep(self._client, put.alarm, None)
                if put.error:
                    text = put.error
                elif put.target not in placed[place]:
                    placed[place].append(put.target)
            left = [place for place in left if not placed[place]]
            if not left or not self._io.is_open:
                break
        if left:
            for outcome in outcomes:
                submitter.outcomes.pop(outcome.id, None)
            if not self._io.is_open:
                misuse.refuse_closed(self._client)
            raise DataLost(f"data could not be put into any worker's store: {text}")
        self._register(outcomes, [area.nbytes for area in areas], placed)
        return outcomes

    def _register(
        self, outcomes: list[Outcome], sizes: list[int], placed: list[list[Target]]
    ) -> None:
        payloads = [
            msgpack.packb([nbytes, targets]) for nbytes, targets in zip(sizes, placed, strict=True)
        ]
        holders = [[number for number, _ in targets] for targets in placed]
        message = Register([outcome.id for outcome in outcomes], sizes, holders)
        self._io.call(self._io.submitter.register, outcomes, payloads, message)

    def _targets(self, fresh: bool) -> list[Target]:
        """The workers' stores; waits until there is one."""
        pause = threading.Event()
        began = monotonic()
        while fresh or not self._stores or monotonic() - self._looked_at > STALE_S:
            self._looked_at = monotonic()
            found = self._client.info()["workers"]
            self._stores = [(worker["number"], worker["data_address"]) for worker in found]
            fresh = False
            if not self._stores:
                if monotonic() - began > self._client._settings.no_worker_warning_s:
                    self._client._warn_without_workers()
                with blocked():
                    pause.wait(LOOK_AGAIN_S)
        return self._stores

    def _start_put(self, put: _Put) -> None:
        """In the I/O thread."""

        def on_end(error: str) -> None:
            self._under_way.discard(put)
            put.end(error)

        data = self._io.data
        if data is None:
            put.end("the client was closed")
            return
        self._under_way.add(put)
        data.put(put.id, put.area.sizes, put.area, put.target, on_end)


class _Put:
    """One value on its way to one worker. error: "" when it is there."""

    __slots__ = ("alarm", "area", "error", "id", "left_of", "target")

    def __init__(self, task: int, area: layout.Laid, target: Target, left_of: list[int]) -> None:
        """left_of: how many puts of this value have not ended, in a list that they share."""
        self.left_of = left_of
        self.id = task
        self.area = area
        self.target = target
        self.alarm = Alarm()
        self.error = ""

    def end(self, error: str) -> None:
        """The I/O thread has done what it could."""
        self.error = error
        self.left_of[0] -= 1
        if not self.left_of[0]:
            self.area.file = None  # the stores have it: it is memory, and a descriptor
        self.alarm()


def _give_up(under_way: set[_Fetch | _Put]) -> None:
    """The I/O thread ends: wake who waits. No method: the thread may not hold the client."""
    for each in list(under_way):
        if isinstance(each, _Put):
            each.end("the client was closed")
        else:
            each.end(None)
    under_way.clear()
