"""What code inside a task can find out about where it runs, and `blocked()`.

A slot that is a process has one context for all its threads, as a task may wait in a thread of
its own; a slot that is a thread has its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def _nothing() -> None:
    """A slot that is a thread does not keep house in its process."""


class SlotContext:
    """Where a task runs.

    address: of the broker.  worker: its worker's name.  slot: its slot's number there.
    task_id, attempt: of the row that runs, or ran last.  client: room for the nested client of
    this slot; whatever is put there is closed, by its close(), when the slot ends.  settle: once
    it was called, tasks find their process as it was then; see surroundings.
    """

    __slots__ = (
        "_depth",
        "_lock",
        "_tell",
        "address",
        "attempt",
        "client",
        "settle",
        "slot",
        "task_id",
        "worker",
    )

    def __init__(self, slot: int, tell: Callable[[bool], None]) -> None:
        self.slot = slot
        self.address = ""
        self.worker = ""
        self.task_id = 0
        self.attempt = 0
        self.client: Any = None
        self.settle: Callable[[], None] = _nothing
        self._tell = tell
        self._depth = 0
        self._lock = threading.Lock()

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """While inside, the task only waits: the worker runs another row in its place.

        Nests, and may be used from several threads of the task at once.
        """
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._tell(True)
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    self._tell(False)


_process_context: SlotContext | None = None
_local = threading.local()


def current() -> SlotContext | None:
    """The context of the task that calls, None outside of tasks."""
    context: SlotContext | None = getattr(_local, "context", None)
    return _process_context if context is None else context


def enter(context: SlotContext | None, whole_process: bool) -> None:
    """Make a context the current one, of this thread or of the whole process."""
    global _process_context
    if whole_process:
        _process_context = context
    else:
        _local.context = context
