"""What the calls of `Client.pool()` return: the words of `multiprocessing.pool`'s results."""

from __future__ import annotations

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any

from zfabric.client.as_completed import as_completed
from zfabric.client.future import Future
from zfabric.client.lazy_map import LazyMap
from zfabric.client.waiting import wait
from zfabric.errors import ResultTimeout

if TYPE_CHECKING:
    from zfabric.client.pool import Pool


class PoolTimeout(ResultTimeout, multiprocessing.TimeoutError):
    """A call of a pool had no value in time."""


class AsyncResult:
    """What apply_async, map_async and starmap_async return; the values of some futures."""

    def __init__(
        self,
        pool: Pool,
        futures: list[Future],
        collect: Callable[[list[Any]], Any],
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> None:
        self._futures = futures
        self._collect = collect
        self._lock = threading.Lock()
        self._left = len(futures)
        self._callback = callback
        self._error_callback = error_callback
        self._value: list[Any] = []
        if callback is not None or error_callback is not None:
            for future in futures:
                pool._client._callbacks.when_done(future, self._one_ended)
            if not futures:
                self._call_back()

    def get(self, timeout: float | None = None) -> Any:
        """The value. Raises what the call raised, PoolTimeout after `timeout` seconds."""
        if not self._value:
            deadline = None if timeout is None else monotonic() + timeout
            values = []
            for future in self._futures:
                left = None if deadline is None else max(0.0, deadline - monotonic())
                try:
                    values.append(future.result(left))
                except ResultTimeout as exc:
                    if future.done():
                        raise  # the task itself raised it
                    raise PoolTimeout(str(exc)) from None
            self._value = [self._collect(values)]
        return self._value[0]

    def wait(self, timeout: float | None = None) -> None:
        """Return when it has ended, or after `timeout` seconds."""
        wait(self._futures, timeout)

    def ready(self) -> bool:
        """Whether it has ended."""
        return all(future.done() for future in self._futures)

    def successful(self) -> bool:
        """Whether it ended without an exception. Raises ValueError while it has not ended."""
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return all(future.status == "finished" for future in self._futures)

    def _one_ended(self, _: Future) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self._call_back()

    def _call_back(self) -> None:
        try:
            value = self.get()
        except BaseException as exc:
            if self._error_callback is not None:
                self._error_callback(exc)
        else:
            if self._callback is not None:
                self._callback(value)


class ImapResults:
    """What imap returns: an iterator whose `next` may have a timeout. An item that fails raises,
    and those behind it come all the same; after a timeout the same item is waited for again."""

    def __init__(self, futures: Iterator[Future]) -> None:
        self._futures = futures
        self._future: Future | None = None
        """The one whose values come next."""
        self._values: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """The next value. Raises StopIteration, what the call raised, PoolTimeout after `timeout`
        seconds."""
        deadline = None if timeout is None else monotonic() + timeout
        while not self._values:
            if self._future is None:
                self._future = self._take(deadline)
            left = None if deadline is None else max(0.0, deadline - monotonic())
            try:
                chunk = self._future.result(left)
            except ResultTimeout as exc:
                if not self._future.done():
                    raise PoolTimeout(str(exc)) from None
                self._future = None
                raise
            except BaseException:
                self._future = None
                raise
            self._future = None
            self._values.extend(chunk[1])
        return self._values.popleft()

    def _take(self, deadline: float | None) -> Future:
        return next(self._futures)


class UnorderedResults(ImapResults):
    """What imap_unordered returns."""

    def __init__(self, lazy: LazyMap) -> None:
        self._ended = as_completed(lazy)
        super().__init__(self._ended)

    def _take(self, deadline: float | None) -> Future:
        if deadline is not None:
            left = max(0.0, deadline - monotonic())
            if not self._ended.has_ready(left) and not self._ended.is_empty():
                raise PoolTimeout("no item has ended in time; they go on")
        return super()._take(deadline)
