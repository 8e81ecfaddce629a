"""The helper thread that runs users' callbacks, so that none can stall the I/O thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from zfabric.client.future import Future
from zfabric.client.waiting import add_waiter
from zfabric.core.submitter import Outcome

log = logging.getLogger(__name__)


class Callbacks:
    """Runs callbacks one after the other. The thread starts with the first one."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[Any], object], Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def when_done(self, future: Future, callback: Callable[[Any], object]) -> None:
        """callback(future) in the helper thread once the future's task has ended."""
        self._start()
        once = _Once(self._queue, future, callback)
        if not add_waiter(future._outcome, once):
            once(future._outcome)

    def close(self, timeout_s: float = 1.0) -> None:
        """Run what is due, then end the thread."""
        thread = self._thread
        if thread is not None:
            self._queue.put(None)
            if threading.current_thread() is not thread:
                thread.join(timeout_s)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_run, args=(self._queue,), name="zfabric-callbacks", daemon=True
                )
                self._thread.start()


class _Once:
    """A waiter that queues a callback the first time it is called.

    It holds the future: whoever leaves a callback behind wants the task to end.
    """

    __slots__ = ("_due", "_queue")

    def __init__(
        self,
        queue: SimpleQueue[tuple[Callable[[Any], object], Any] | None],
        future: Future,
        callback: Callable[[Any], object],
    ) -> None:
        self._queue = queue
        self._due = [(callback, future)]

    def __call__(self, outcome: Outcome) -> None:
        try:
            due = self._due.pop()  # atomic: two threads may call at once
        except IndexError:
            return
        self._queue.put(due)


def _run(queue: SimpleQueue[tuple[Callable[[Any], object], Any] | None]) -> None:
    while (due := queue.get()) is not None:
        callback, argument = due
        try:
            callback(argument)
        except Exception:
            log.exception("the callback %r of %r failed", callback, argument)
        del due, callback, argument  # hold no future while waiting for the next
