"""Futures under asyncio. The I/O thread tells the loop; no thread is parked per await."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from zfabric.client.waiting import Inbox, add_waiter, remove_waiter
from zfabric.core.submitter import PENDING
from zfabric.messages import STORED

if TYPE_CHECKING:
    from zfabric.client.future import Future


class LoopAlarm:
    """An Alarm for a coroutine: calling it from any thread sets an asyncio future of its loop."""

    __slots__ = ("_loop", "rung")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.rung: asyncio.Future[None] = self._loop.create_future()

    def __call__(self, *_: object) -> None:
        try:
            self._loop.call_soon_threadsafe(self._set)
        except RuntimeError:  # the loop was closed: nobody waits any more
            pass

    def _set(self) -> None:
        if not self.rung.done():
            self.rung.set_result(None)


async def result_async(future: Future) -> Any:
    """future.result() for `await`."""
    outcome = future._outcome
    while outcome.status == PENDING:
        alarm = LoopAlarm()
        if not add_waiter(outcome, alarm):
            break
        try:
            await alarm.rung
        finally:
            remove_waiter(outcome, alarm)
    if outcome.status == STORED:  # fetching blocks
        return await in_thread(future.result)
    return future.result()


async def wait_inbox(inbox: Inbox, deadline: float | None) -> bool:
    """Inbox.wait for a coroutine. False: the deadline (monotonic seconds) came first."""
    alarm = LoopAlarm()
    inbox.alarm = alarm
    try:
        if inbox.ids:
            return True
        timeout = None if deadline is None else max(0.0, deadline - monotonic())
        try:
            await asyncio.wait_for(alarm.rung, timeout)
        except TimeoutError:
            return bool(inbox.ids)
        return True
    finally:
        inbox.alarm = None


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in the loop's thread pool, for what would block the loop."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)
