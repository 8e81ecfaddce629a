"""`map` over an iterator that is long, endless, or slow: a bounded number in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from zfabric.client.future import Future
from zfabric.client.waiting import Inbox, add_waiter
from zfabric.errors import UsageError

if TYPE_CHECKING:
    from zfabric.client.client import Client


class LazyMap:
    """An iterator of futures, in order, that submits as they are taken.

    At most `max_inflight` of its tasks are unfinished at any time, and at most that many wait to
    be taken. Taking the next one blocks while that limit is reached. `as_completed` takes it as
    it is, without ever blocking on it.
    """

    def __init__(
        self,
        client: Client,
        submit: Callable[[tuple[Any, ...]], Future],
        rows: Iterator[tuple[Any, ...]],
        max_inflight: int,
    ) -> None:
        if max_inflight < 1:
            raise UsageError(f"max_inflight is {max_inflight}; it must be 1 or more")
        self.max_inflight = max_inflight
        self._client = client
        self._submit = submit
        self._rows: Iterator[tuple[Any, ...]] | None = rows
        self._ahead: deque[Future] = deque()
        """Submitted, not yet taken."""
        self._unfinished: set[int] = set()
        """Ids, no futures: those that were taken are the user's to drop."""
        self._inbox = Inbox()

    def __iter__(self) -> Iterator[Future]:
        return self

    def __next__(self) -> Future:
        self._top_up()
        while not self._ahead:
            if self._rows is None:
                raise StopIteration
            self._inbox.wait(self._client, None)
            self._top_up()
        return self._ahead.popleft()

    def _top_up(self) -> None:
        ended = self._inbox.ids
        while ended:
            self._unfinished.discard(ended.popleft())
        while (
            self._rows is not None
            and len(self._unfinished) < self.max_inflight
            and len(self._ahead) < self.max_inflight
        ):
            try:
                row = next(self._rows)
            except StopIteration:
                self._rows = None
                return
            future = self._submit(row)
            self._ahead.append(future)
            self._unfinished.add(future.task_id)
            if not add_waiter(future._outcome, self._inbox):
                self._inbox(future._outcome)
