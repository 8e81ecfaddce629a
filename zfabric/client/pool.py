"""`Client.pool()`: the words of `multiprocessing.Pool` over a fabric.

For libraries that take a pool: emcee, dynesty, schwimmbad. These call `pool.map` in every step of
a sampler with the same fat function and few tiny items. So the items of one call travel in chunks,
about as many as there are slots; the function is known by its content, and goes to a worker once.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any

from zfabric.client.chunks import Chunk, Initialised
from zfabric.client.future import Future
from zfabric.client.lazy_map import LazyMap
from zfabric.client.pool_results import AsyncResult, ImapResults, UnorderedResults
from zfabric.client.waiting import add_waiter, wait
from zfabric.core.submitter import Outcome

if TYPE_CHECKING:
    from zfabric.client.client import Client

KEPT_FUNCTIONS = 8
"""Functions of which a pool remembers how long they take and what they were wrapped in."""

CHUNKS_PER_SLOT = 4
"""As in multiprocessing: enough that slots that are done early take over from slow ones."""

SHORT_S = 0.002
"""A slot's share of a call that is done within this time is not worth cutting in pieces: a task
costs some 20 us, and its message a part of a millisecond."""

LOOK_S = 5.0
"""Between two looks at how many slots there are."""


class Pool:
    """See `Client.pool`. Ending it leaves the client and its workers as they are.

    size: slots of the fabric when it was made; what libraries take for the number of processes.
    """

    def __init__(
        self,
        client: Client,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
    ) -> None:
        if processes is not None and processes < 1:
            raise ValueError("Number of processes must be at least 1")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        self._client = client
        self._fixed = processes
        self._initializer = initializer
        self._initargs = tuple(initargs)
        self._token = secrets.token_hex(8)
        self._closed = False
        self._running: dict[int, Future] = {}
        self._known: OrderedDict[Any, _Known] = OrderedDict()
        self._looked_at = -LOOK_S
        self._slots = 1
        self.size = self._n_slots()

    @property
    def _processes(self) -> int:
        return self.size

    # --- calls --------------------------------------------------------------------------------

    def apply(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
    ) -> Any:
        """func(*args, **kwds)."""
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult:
        """func(*args, **kwds), later. One of the callbacks runs in a helper thread."""
        self._refuse_closed()
        future = self._client._calls.submit(self._prepared(func), tuple(args), dict(kwds or {}))
        self._watch([future])
        return AsyncResult(self, [future], lambda values: values[0], callback, error_callback)

    def map(
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int | None = None
    ) -> list[Any]:
        """[func(item) for each item]. chunksize: items per task."""
        result: list[Any] = self.map_async(func, iterable, chunksize).get()
        return result

    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int | None = None
    ) -> list[Any]:
        """[func(*item) for each item]."""
        result: list[Any] = self.starmap_async(func, iterable, chunksize).get()
        return result

    def map_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult:
        """map(), later."""
        return self._map(func, iterable, chunksize, False, callback, error_callback)

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult:
        """starmap(), later."""
        return self._map(func, iterable, chunksize, True, callback, error_callback)

    def imap(
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int = 1
    ) -> ImapResults:
        """The values of func(item), in order, as they come. Items are taken when there is room,
        so that an endless iterable will do."""
        return ImapResults(self._lazy(func, iterable, chunksize))

    def imap_unordered(
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int = 1
    ) -> ImapResults:
        """The same, whichever is ready first."""
        return UnorderedResults(self._lazy(func, iterable, chunksize))

    # --- life ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more calls."""
        self._closed = True

    def terminate(self) -> None:
        """Take no more calls, and cancel those that have not ended."""
        self._closed = True
        running = list(self._running.values())
        if running and self._client._io.is_open:
            self._client.cancel(running)
        self._known.clear()

    def join(self) -> None:
        """Wait until all calls have ended; after close() or terminate()."""
        if not self._closed:
            raise ValueError("Pool is still running")
        wait(list(self._running.values()))

    def __enter__(self) -> Pool:
        self._refuse_closed()
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def __reduce__(self) -> Any:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    # --- inside -------------------------------------------------------------------------------

    def _map(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None,
        star: bool,
        callback: Callable[[Any], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> AsyncResult:
        self._refuse_closed()
        items = iterable if _can_be_cut(iterable) else list(iterable)
        known = self._know(func, star)
        n_items = len(items)
        if chunksize is not None and chunksize < 0:
            raise ValueError(f"Chunksize must be 1+, not {chunksize}")
        size = chunksize or known.chunk_size(n_items, self._n_slots())
        rows = ((items[start : start + size],) for start in range(0, n_items, size))
        futures = self._client._calls.map(known.task, rows)
        self._watch(futures)

        def collect(chunks: list[tuple[float, list[Any]]]) -> list[Any]:
            known.took(sum(seconds for seconds, _ in chunks), n_items)
            return [value for _, values in chunks for value in values]

        return AsyncResult(self, futures, collect, callback, error_callback)

    def _lazy(self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int) -> LazyMap:
        self._refuse_closed()
        if chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize}")
        task = self._know(func, False).task

        def submit(row: tuple[Any, ...]) -> Future:
            future = self._client._calls.submit(task, row, {})
            self._watch([future])
            return future

        ahead = 2 * CHUNKS_PER_SLOT * self._n_slots()
        return LazyMap(self._client, submit, _cut(iter(iterable), chunksize), ahead)

    def _know(self, func: Callable[..., Any], star: bool) -> _Known:
        """What is remembered of a function. The memory holds it: an id may not be used again."""
        # Each `obj.method` is a new object; what it is bound to tells whether it is the same.
        key = (id(getattr(func, "__self__", func)), getattr(func, "__name__", ""), star)
        known = self._known.get(key)
        if known is None or known.func != func:
            known = self._known[key] = _Known(func, self._prepared(Chunk(func, star)))
            if len(self._known) > KEPT_FUNCTIONS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return known

    def _prepared(self, func: Callable[..., Any]) -> Callable[..., Any]:
        if self._initializer is None:
            return func
        return Initialised(func, self._token, self._initializer, self._initargs)

    def _n_slots(self) -> int:
        """Slots of the fabric now, or nearly now."""
        if self._fixed is not None:
            return self._fixed
        now = monotonic()
        if now - self._looked_at > LOOK_S:
            self._looked_at = now
            workers = self._client.info()["workers"]
            self._slots = max(1, sum(worker["slots"] for worker in workers))
        return self._slots

    def _watch(self, futures: list[Future]) -> None:
        self._running.update((future.task_id, future) for future in futures)
        for future in futures:
            if not add_waiter(future._outcome, self._forget):
                self._forget(future._outcome)

    def _forget(self, outcome: Outcome) -> None:
        self._running.pop(outcome.id, None)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ValueError("Pool not running")


class _Known:
    """A function of a pool. seconds: per item, of the last map; None before that."""

    __slots__ = ("func", "seconds", "task")

    def __init__(self, func: Callable[..., Any], task: Callable[..., Any]) -> None:
        self.func = func
        self.task = task
        self.seconds: float | None = None

    def chunk_size(self, n_items: int, n_slots: int) -> int:
        """Items per task."""
        short = self.seconds is not None and self.seconds * n_items < SHORT_S * n_slots
        n_chunks = n_slots if short else CHUNKS_PER_SLOT * n_slots
        return max(1, -(-n_items // n_chunks))

    def took(self, seconds: float, n_items: int) -> None:
        if n_items:
            self.seconds = seconds / n_items


def _can_be_cut(items: Any) -> bool:
    """Whether slices of it are runs of its items: an array's rows then travel as one block."""
    kind = type(items)
    return kind in (list, tuple, range) or (
        (kind.__module__, kind.__name__) == ("numpy", "ndarray") and items.ndim > 0
    )


def _cut(items: Iterator[Any], size: int) -> Iterator[tuple[Any, ...]]:
    while chunk := list(islice(items, size)):
        yield (chunk,)
