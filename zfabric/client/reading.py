"""From a settled outcome to the value or the exception that it stands for."""

from __future__ import annotations

import traceback
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgpack

from zfabric.codec.serialise import loads_inline
from zfabric.core.submitter import LOADED, PENDING
from zfabric.errors import (
    DataLost,
    KilledTask,
    MemoryExceeded,
    NoWorkerFits,
    QuotaExceeded,
    ResultTimeout,
    TaskCancelled,
    TaskFailed,
    TaskLost,
    TaskTimeout,
    UnknownOutcome,
)
from zfabric.ids import counter_of
from zfabric.messages import (
    CANCELLED,
    ERROR,
    FULL,
    KILLED,
    LATE,
    LOST,
    OVERSIZE,
    STORED,
    UNFIT,
    UNKNOWN,
    VALUE,
)

if TYPE_CHECKING:
    from zfabric.client.future import Future


def value_of(future: Future, timeout: float | None = None) -> Any:
    """The value, waited for and fetched where needed; raises the task's error.

    It is unpickled once and kept, so that every result() gives the same object, as in
    concurrent.futures.
    """
    outcome = future._outcome
    deadline = None if timeout is None else monotonic() + timeout
    while True:
        payload = outcome.payload
        status = outcome.status
        if status == VALUE:
            if payload is None:  # settled, or loaded by another thread, between those two lines
                continue
            value = loads_inline(payload)
            outcome.value = value
            outcome.status = LOADED
            outcome.payload = None
            return value
        if status == LOADED:
            return outcome.value
        if status == PENDING:
            if not future._client._sleep_until(outcome, deadline):
                raise _late(future, timeout)
        elif status == STORED:
            future._client._values.fetch(future, deadline)
        else:
            raise _raisable(error_of(future), future.key)


def exception_of(future: Future, timeout: float | None) -> BaseException | None:
    """What value_of would raise, None if it would not. Raises TaskCancelled, ResultTimeout."""
    outcome = future._outcome
    deadline = None if timeout is None else monotonic() + timeout
    if not future._client._sleep_until(outcome, deadline):
        raise _late(future, timeout)
    if outcome.status in (VALUE, STORED, LOADED, PENDING):
        return None
    error = error_of(future)
    if outcome.status == CANCELLED:
        raise error
    return error


def _raisable(error: BaseException, key: str) -> BaseException:
    """What to raise for a task's exception: itself, unless that would end the program here without
    a word, as the SystemExit of a task would. future.exception() gives it as it is."""
    if not isinstance(error, (SystemExit, KeyboardInterrupt, GeneratorExit)):
        return error
    name = type(error).__name__
    told = f"{name}({error})" if str(error) else name
    failed = TaskFailed(f"{key} raised {told}", key, name, traceback_text(error))
    failed.__cause__ = error
    return failed


def error_of(future: Future) -> BaseException:
    """A fresh exception for an outcome without a value: each raise has a traceback of its own."""
    outcome, key = future._outcome, future.key
    status, payload = outcome.status, outcome.payload or b""
    if status == ERROR:
        from zfabric.codec.exceptions import load_exception

        return load_exception(payload)
    text, *rest = msgpack.unpackb(payload) if payload else [""]
    # The broker names tasks by their ids; people know them by what Future.key says.
    text = text.replace(f"-{outcome.id:x}", f"-{counter_of(outcome.id)}")
    if text.startswith((f"{key} ", f"task {key} ")):
        named = text
    else:
        named = f"{key}: {text}"
    if status == CANCELLED:
        return TaskCancelled(f"{key} was cancelled" + (f": {text}" if text else ""), key)
    if status == KILLED:
        return KilledTask(named, key, rest[0] if rest else ())
    if status == LOST:
        return (TaskLost if outcome.fn else DataLost)(named, key)
    if status in _KINDS:
        return _KINDS[status](named, key)
    raise AssertionError(f"no error has status {status}")


_KINDS = {
    UNFIT: NoWorkerFits,
    LATE: TaskTimeout,
    OVERSIZE: MemoryExceeded,
    UNKNOWN: UnknownOutcome,
    FULL: QuotaExceeded,
}


def _late(future: Future, timeout: float | None) -> ResultTimeout:
    return ResultTimeout(f"{future.key} has not ended within {timeout:.3g} s; it goes on")


def traceback_text(error: BaseException) -> str:
    """The remote traceback of a task's exception, as text."""
    own = getattr(error, "traceback", None)
    if isinstance(own, str) and own:
        return own
    if error.__cause__ is not None:
        return str(error.__cause__)
    return "".join(traceback.format_exception(error))
