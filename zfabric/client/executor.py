"""A `concurrent.futures.Executor` over a client, with genuine `concurrent.futures.Future`s.

For code that takes an executor: dask, asyncio's run_in_executor, scipy's `workers=`. It keeps the
contract of the standard library: tasks run whether or not anybody holds their futures, shutdown
waits for them, `cancel` works until the task has ended.
"""

from __future__ import annotations

import concurrent.futures as cf
import itertools
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from zfabric.client import misuse
from zfabric.client.chunks import Initialised, InitializerFailed
from zfabric.client.future import Future
from zfabric.client.waiting import add_waiter
from zfabric.client.waiting import wait as wait_all
from zfabric.core.submitter import Outcome
from zfabric.messages import CANCELLED

if TYPE_CHECKING:
    from zfabric.client.client import Client


BATCH_ROWS = 4096
BATCH_S = 0.002
"""How long map() looks for rows before those that it has begin to run."""


def _batch(rows: Iterator[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The next rows: as many as come in no time. [] at the end."""
    found = []
    until = monotonic() + BATCH_S
    for row in rows:
        found.append(row)
        if len(found) >= BATCH_ROWS or monotonic() > until:
            break
    return found


class ExecutorFuture(cf.Future[Any]):
    """A concurrent.futures.Future whose cancel() reaches the fabric."""

    def __init__(self, executor: ClientExecutor, task: Future) -> None:
        super().__init__()
        self._executor: ClientExecutor | None = executor
        self._task: Future | None = task

    def cancel(self) -> bool:
        """Cancel unless it has ended; a running task is killed."""
        executor, task = self._executor, self._task
        if executor is None or task is None or not executor._take(task.task_id):
            return super().cancel()
        self._let_go()
        super().cancel()
        self.set_running_or_notify_cancel()
        executor._client.cancel(task)
        return True

    def _let_go(self) -> None:
        self._executor = self._task = None


class ClientExecutor(cf.Executor):
    """See `Client.get_executor`. Shutting it down leaves the client open."""

    def __init__(
        self,
        client: Client,
        *,
        retries: int = 0,
        priority: int = 0,
        resources: Mapping[str, float] | None = None,
        workers: str | Iterable[str] | None = None,
        timeout: float | None = None,
        retry_on: type[BaseException] | tuple[type[BaseException], ...] = (),
        idempotent: bool = True,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
    ) -> None:
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        self._client = client
        self._initializer = initializer
        self._initargs = tuple(initargs)
        self._token = secrets.token_hex(8)
        self._broken = ""
        self._options = misuse.options_of(
            None, retries, priority, resources, workers, timeout, retry_on, idempotent
        )
        self._lock = threading.Lock()
        self._shut = False
        self._submitted: dict[int, ExecutorFuture] = {}
        """Of submit(), until they have ended."""
        self._mapped: dict[int, Future] = {}
        """Of map(), until they have ended: they run also when nobody iterates."""

    @property
    def _max_workers(self) -> int:
        """How many tasks run at once; dask and others look here."""
        slots: int = sum(worker["slots"] for worker in self._client.info()["workers"])
        return max(1, slots)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> cf.Future[Any]:
        """Run fn(*args, **kwargs); all keywords are the function's."""
        with self._lock:
            self._refuse_shut()
            fn = self._prepared(fn)
            task = self._client._calls.submit(fn, args, kwargs, self._options)
            future = ExecutorFuture(self, task)
            self._submitted[task.task_id] = future
        self._client._callbacks.when_done(task, self._finish)
        return future

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """The values of fn(a, b, ...) for each row of zip(*iterables), in order.

        chunksize: rows per task.  timeout: seconds from now for all of them.
        buffersize: take rows only as values are taken, so that at most that many tasks have been
            submitted whose values have not; None: take all rows now.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else monotonic() + timeout
        rows: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
        if chunksize > 1:
            rows, fn = _chunks(rows, chunksize), partial(run_chunk, fn)
        fn = self._prepared(fn)
        if buffersize is None:
            values = self._values(self._submit_rows(fn, rows), deadline)
        else:
            ahead = self._submit_rows(fn, itertools.islice(rows, buffersize))
            values = self._values_by_need(fn, rows, ahead, deadline)
        return itertools.chain.from_iterable(values) if chunksize > 1 else values

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; with `wait`, return when all have ended.

        cancel_futures: cancel those that no worker has begun to look at. The others go on, as in
        the standard library, so that nothing runs any more when this returns.
        """
        with self._lock:
            self._shut = True
            submitted, mapped = list(self._submitted.values()), list(self._mapped.values())
        if cancel_futures:
            self._cancel_waiting(submitted, mapped)
        if wait:
            cf.wait(submitted)
            wait_all(mapped)

    # --- inside -------------------------------------------------------------------------------

    def _refuse_shut(self) -> None:
        if self._shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self._broken:
            raise InitializerFailed(self._broken)

    def _prepared(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        if self._initializer is None:
            return fn
        return Initialised(fn, self._token, self._initializer, self._initargs)

    def _submit_rows(self, fn: Callable[..., Any], rows: Iterator[tuple[Any, ...]]) -> list[Future]:
        found: list[Future] = []
        with self._lock:
            self._refuse_shut()
        # Not under the lock: the caller's iterables may use this executor, or wait for its futures.
        while batch := _batch(rows):
            with self._lock:
                self._refuse_shut()
                futures = self._client._calls.map(fn, iter(batch), self._options)
                self._mapped.update((future.task_id, future) for future in futures)
            for future in futures:
                if not add_waiter(future._outcome, self._forget):
                    self._forget(future._outcome)
            found += futures
        return found

    def _take(self, task: int) -> bool:
        """Whether the caller is the one that may end this future."""
        with self._lock:
            return self._submitted.pop(task, None) is not None

    def _finish(self, task: Future) -> None:
        with self._lock:
            future = self._submitted.pop(task.task_id, None)
        if future is None:
            return
        future._let_go()
        if task._outcome.status == CANCELLED:
            cf.Future.cancel(future)
        if not future.set_running_or_notify_cancel():
            return
        try:
            value = task.result()
        except BaseException as exc:
            if isinstance(exc, InitializerFailed):
                self._broken = str(exc)
            future.set_exception(exc)
        else:
            future.set_result(value)

    def _cancel_waiting(self, submitted: list[ExecutorFuture], mapped: list[Future]) -> None:
        io = self._client._io
        tasks = [*filter(None, [future._task for future in submitted]), *mapped]
        if tasks and io.is_open:
            outcomes = [task._outcome for task in tasks]
            io.call(io.submitter.cancel_waiting, outcomes, io.questions.new_number())

    def _forget(self, outcome: Outcome) -> None:
        self._mapped.pop(outcome.id, None)

    def _values(self, futures: list[Future], deadline: float | None) -> Iterator[Any]:
        futures.reverse()
        try:
            while futures:
                # Popped first, so that no reference to a value is left behind it.
                left = None if deadline is None else max(0.0, deadline - monotonic())
                yield futures.pop().result(left)
        finally:
            if futures and self._client._io.is_open:
                self._client.cancel(futures)

    def _values_by_need(
        self,
        fn: Callable[..., Any],
        rows: Iterator[tuple[Any, ...]],
        ahead: list[Future],
        deadline: float | None,
    ) -> Iterator[Any]:
        futures = deque(ahead)
        del ahead
        try:
            while futures:
                left = None if deadline is None else max(0.0, deadline - monotonic())
                value = futures.popleft().result(left)
                futures.extend(self._submit_rows(fn, itertools.islice(rows, 1)))
                yield value
                del value
        finally:
            if futures and self._client._io.is_open:
                self._client.cancel(list(futures))


def run_chunk(fn: Callable[..., Any], *rows: tuple[Any, ...]) -> list[Any]:
    """[fn(*row) for each row], as one task."""
    return [fn(*row) for row in rows]


def _chunks(rows: Iterator[tuple[Any, ...]], size: int) -> Iterator[tuple[Any, ...]]:
    while chunk := tuple(itertools.islice(rows, size)):
        yield chunk
