"""Futures in the order in which they end, while more may be added.

    ac = as_completed(futures)
    for future in ac:
        if wants_more(future.result()):
            ac.add(client.submit(follow_up, future))

The I/O thread only appends ids to an inbox; which future an id belongs to is known on this side
alone. So an `as_completed` that nobody holds any more keeps no future alive.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

from zfabric.client.future import FAILED, Future
from zfabric.client.lazy_map import LazyMap
from zfabric.client.reading import error_of, value_of
from zfabric.client.waiting import Inbox, add_waiter, futures_of, remove_waiter
from zfabric.core.submitter import PENDING
from zfabric.errors import ResultTimeout, UsageError


class as_completed:
    """Iterate over futures as they end; the iteration is over when all that were added have.

    futures: futures, nested in whatever way, or what `client.map(..., max_inflight=n)` returned,
        which is then taken from as far as its limit allows.
    with_results: give (future, value) instead of the future.
    raise_errors: with_results raises a failed task's exception; if False, it stands in place of
        the value.
    timeout: seconds for the whole iteration, ResultTimeout after that.

    A future that is added twice comes twice. Add from any thread; iterate in one at a time.
    """

    def __init__(
        self,
        futures: Iterable[Future] | Future = (),
        *,
        with_results: bool = False,
        raise_errors: bool = True,
        timeout: float | None = None,
    ) -> None:
        self._with_results = with_results
        self._raise_errors = raise_errors
        self._timeout = timeout
        self._deadline = None if timeout is None else monotonic() + timeout
        self._inbox = Inbox()
        self._ready: deque[Future] = deque()
        self._pending: dict[int, list[Future]] = {}
        self._lock = threading.Lock()
        self._lazy: list[LazyMap] = []
        self.update(futures)

    # --- adding -------------------------------------------------------------------------------

    def add(self, future: Future) -> None:
        """Have this future come as well."""
        if not isinstance(future, Future):
            raise UsageError(f"add() takes a future, not an object of type {type(future).__name__}")
        if future._outcome.status != PENDING:
            self._ready.append(future)
            self._inbox.ring()
            return
        with self._lock:
            self._pending.setdefault(future.task_id, []).append(future)
        if not add_waiter(future._outcome, self._inbox):
            self._inbox(future._outcome)

    def update(self, futures: Iterable[Future] | Future) -> None:
        """Have all these come as well."""
        if isinstance(futures, LazyMap):
            self._lazy.append(futures)
            return
        for future in futures_of(futures, "as_completed()"):
            self.add(future)

    # --- counting -----------------------------------------------------------------------------

    def count(self) -> int:
        """How many futures have been added and not been given yet."""
        return len(self._ready) + sum(map(len, list(self._pending.values())))

    def is_empty(self) -> bool:
        """Whether nothing more will come."""
        self._top_up()
        return not self._ready and not self._pending

    def has_ready(self, timeout: float = 0.0) -> bool:
        """Whether the next one comes without waiting, or after so many seconds at most."""
        self._sort()
        if not self._ready and timeout > 0.0:
            with suppress(StopIteration):
                self._await_one(monotonic() + timeout)
        return bool(self._ready)

    def clear(self) -> None:
        """Forget all that was added and has not come yet. Their tasks go on."""
        with self._lock:
            pending, self._pending = self._pending, {}
        for futures in pending.values():
            remove_waiter(futures[0]._outcome, self._inbox)
        self._ready.clear()
        self._lazy.clear()
        self._inbox.ring()

    # --- taking -------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._await_one()
        return self._give(self._ready.popleft())

    def next_batch(self, block: bool = True) -> list[Any]:
        """All that have ended by now; with `block`, at least one unless nothing more comes."""
        if block:
            try:
                self._await_one()
            except StopIteration:
                return []
        else:
            self._sort()
        batch = []
        while self._ready:
            batch.append(self._give(self._ready.popleft()))
        return batch

    def batches(self) -> Iterator[list[Any]]:
        """Lists of all that ended since the last list, none of them empty."""
        while batch := self.next_batch():
            yield batch

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        from zfabric.client.awaiting import in_thread, wait_inbox

        while True:
            self._top_up()
            self._sort()
            if self._ready:
                future = self._ready.popleft()
                if self._with_results:
                    return await in_thread(self._give, future)
                return future
            if not self._pending:
                raise StopAsyncIteration
            if not await wait_inbox(self._inbox, self._deadline):
                raise self._late()

    # --- inside -------------------------------------------------------------------------------

    def _await_one(self, until: float | None = None) -> None:
        """Return when one is ready, or at `until`. Raises StopIteration when none will be, and
        ResultTimeout when the time of the whole iteration is over."""
        while True:
            if self._lazy:
                self._top_up()
            if not self._ready:
                self._sort()
            if self._ready:
                return
            if not self._pending:
                raise StopIteration
            client = next(iter(self._pending.values()))[0]._client
            deadline = self._deadline if until is None else until
            if not self._inbox.wait(client, deadline) and not self._ready:
                if until is not None:
                    return
                raise self._late()

    def _sort(self) -> None:
        """Move those whose ids have come from pending to ready."""
        ids = self._inbox.ids
        while ids:
            task = ids.popleft()
            with self._lock:
                futures = self._pending.get(task)
                if futures is None or futures[0]._outcome.status == PENDING:
                    continue  # said twice, or retried meanwhile
                del self._pending[task]
            self._ready.extend(futures)

    def _top_up(self) -> None:
        for lazy in list(self._lazy):
            while self.count() < lazy.max_inflight:
                try:
                    self.add(next(lazy))
                except StopIteration:
                    self._lazy.remove(lazy)
                    break

    def _give(self, future: Future) -> Any:
        if not self._with_results:
            return future
        outcome = future._outcome
        if outcome.status in FAILED and not self._raise_errors:
            return future, error_of(future)
        left = None if self._deadline is None else max(0.0, self._deadline - monotonic())
        return future, value_of(future, left)

    def _late(self) -> ResultTimeout:
        return ResultTimeout(
            f"{self.count()} tasks have not ended within {self._timeout:.3g} s; they go on"
        )
