"""Waiting for outcomes: one, all of some, the first of some.

A waiter is put on an outcome first and the status looked at afterwards; the I/O thread settles
first and looks for waiters afterwards. A wait for many sleeps on the first that is pending and
then skips all that have ended meanwhile, so it is woken as often as batches arrive, not as often
as tasks end.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import TIMEOUT_MAX
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from zfabric.client.alarm import Alarm
from zfabric.client.future import FAILED, Future
from zfabric.core.submitter import PENDING, Outcome, Waiter
from zfabric.errors import UsageError

if TYPE_CHECKING:
    from zfabric.client.client import Client

ALL_COMPLETED = "ALL_COMPLETED"
FIRST_COMPLETED = "FIRST_COMPLETED"
FIRST_EXCEPTION = "FIRST_EXCEPTION"

WARN_AGAIN_S = 30.0
"""Between two warnings that there are no workers."""

_waiters_lock = threading.Lock()


def add_waiter(outcome: Outcome, waiter: Waiter) -> bool:
    """Have `waiter` called when the outcome is settled. False: it is already, and it may not be.

    It may be called although this returns False.
    """
    with _waiters_lock:  # two threads could both find None
        if outcome.waiters is None:
            outcome.waiters = [waiter]
        else:
            outcome.waiters.append(waiter)
    return outcome.status == PENDING


def remove_waiter(outcome: Outcome, waiter: Waiter) -> None:
    """Undo add_waiter, where the waiter has not been called yet."""
    with _waiters_lock:
        waiters = outcome.waiters
        if waiters is not None and waiter in waiters:
            outcome.waiters = [w for w in waiters if w is not waiter] or None


def slot_context() -> Any:
    """The SlotContext of the task that calls, None outside of tasks."""
    # Only a slot has loaded that module: nobody else pays for it.
    module = sys.modules.get("zfabric.runtime.slot_context")
    return None if module is None else module.current()


def blocked() -> AbstractContextManager[object]:
    """Around a wait: inside a task, its slot lets another one run meanwhile."""
    context = slot_context()
    return nullcontext() if context is None else context.blocked()


def sleep_until(client: Client, outcome: Outcome, deadline: float | None) -> bool:
    """Sleep until the outcome is settled. False: the deadline (monotonic seconds) has come."""
    if outcome.status != PENDING:
        return True
    alarm = Alarm()
    if not add_waiter(outcome, alarm):
        return True
    try:
        with blocked():
            rang = sleep(client, alarm, deadline)
    except BaseException:  # Ctrl-C: the client stays usable, and nothing of this wait is left
        remove_waiter(outcome, alarm)
        raise
    if not rang:
        remove_waiter(outcome, alarm)
    return rang


def sleep(client: Client, alarm: Alarm, deadline: float | None) -> bool:
    """alarm.wait(), with a look at whether there are workers at all when it takes long."""
    patience = client._settings.no_worker_warning_s
    while True:
        left = TIMEOUT_MAX if deadline is None else deadline - monotonic()
        if alarm.wait(min(left, patience)):
            return True
        if left <= patience:
            return False
        client._warn_without_workers()
        patience = WARN_AGAIN_S


class Inbox:
    """Where the ids of settled outcomes collect for one consumer thread."""

    __slots__ = ("alarm", "ids")

    def __init__(self) -> None:
        self.ids: deque[int] = deque()
        self.alarm: Callable[[], object] | None = None

    def __call__(self, outcome: Outcome) -> None:
        self.ids.append(outcome.id)
        alarm = self.alarm
        if alarm is not None:
            alarm()

    def ring(self) -> None:
        """Wake the consumer although nothing was settled."""
        alarm = self.alarm
        if alarm is not None:
            alarm()

    def wait(self, client: Client, deadline: float | None) -> bool:
        """Sleep until there is an id. False: the deadline has come first."""
        self.alarm = alarm = Alarm()
        try:
            if self.ids:
                return True
            with blocked():
                return sleep(client, alarm, deadline) or bool(self.ids)
        finally:
            self.alarm = None


class DoneAndNotDone(NamedTuple):
    """What wait() returns."""

    done: set[Future]
    not_done: set[Future]


def wait(
    futures: Iterable[Future],
    timeout: float | None = None,
    return_when: str = ALL_COMPLETED,
) -> DoneAndNotDone:
    """Wait until all, or the first, of these have ended.

    return_when: ALL_COMPLETED, FIRST_COMPLETED or FIRST_EXCEPTION, as in concurrent.futures.
    Returns what is done and what is not, also when `timeout` seconds are over.
    """
    flat = futures_of(futures, "wait()")
    deadline = None if timeout is None else monotonic() + timeout
    if return_when == ALL_COMPLETED:
        for future in flat:
            if not sleep_until(future._client, future._outcome, deadline):
                break
    elif return_when in (FIRST_COMPLETED, FIRST_EXCEPTION):
        _wait_first(flat, deadline, return_when == FIRST_EXCEPTION)
    else:
        raise UsageError(
            f"return_when={return_when!r}: it is ALL_COMPLETED, FIRST_COMPLETED or FIRST_EXCEPTION"
        )
    done = {f for f in flat if f._outcome.status != PENDING}
    return DoneAndNotDone(done, set(flat) - done)


def _wait_first(flat: Sequence[Future], deadline: float | None, only_errors: bool) -> None:
    inbox = Inbox()
    by_id = {f.task_id: f for f in flat}
    left = set(by_id)
    try:
        for future in by_id.values():
            if not add_waiter(future._outcome, inbox):
                inbox(future._outcome)
        while left and inbox.wait(flat[0]._client, deadline):
            while inbox.ids:
                task = inbox.ids.popleft()
                if not only_errors or by_id[task]._outcome.status in FAILED:
                    return
                left.discard(task)
    finally:
        for future in flat:
            remove_waiter(future._outcome, inbox)


def futures_of(nested: Any, verb: str = "") -> list[Future]:
    """Every future in nested lists, tuples, sets, dicts and iterators, in their order.

    verb: who takes nothing but futures; raises UsageError for anything else. "": others are
    passed over.
    """
    found: list[Future] = []
    _collect(nested, found, verb)
    return found


def _collect(nested: Any, found: list[Future], verb: str) -> None:
    if isinstance(nested, Future):
        found.append(nested)
    elif isinstance(nested, dict):
        for item in nested.values():
            _collect(item, found, verb)
    elif hasattr(nested, "__dask_graph__"):
        from zfabric.client.collections.scheduler import futures_of_collection

        found.extend(futures_of_collection(nested))
    elif isinstance(nested, Iterable) and not isinstance(nested, (str, bytes, bytearray)):
        for item in nested:
            if isinstance(item, Future):
                found.append(item)
            else:
                _collect(item, found, verb)
    elif verb:
        raise UsageError(
            f"{verb} takes futures, in whatever nesting, not an object of type"
            f" {type(nested).__name__}; client.submit(f, x) gives one"
        )


def warn_without_workers(address: str) -> None:
    """Say that nothing can run, and what to do."""
    warnings.warn(
        f"no workers are connected to {address}, so nothing runs; start one with"
        f" `zfabric worker {address}`",
        UserWarning,
        stacklevel=_users_level(),
    )


def _users_level() -> int:
    """The stacklevel, for whoever calls this, of the nearest frame outside of this package."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("zfabric."):
        frame = frame.f_back
        level += 1
    return level
