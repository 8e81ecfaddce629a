"""When a task that failed runs again: which failures count, and how long to wait before.

The broker never unpickles, so it cannot ask isinstance. The names of an exception's classes travel
behind the pickled exception, which ends where its pickle ends; `retry_on` is a list of such names.
"""

from __future__ import annotations

from collections.abc import Iterable

from zfabric.config import Settings
from zfabric.errors import MemoryExceeded, TaskTimeout
from zfabric.messages import ERROR, LATE, OVERSIZE, TaskOptions

FAILURES = frozenset((ERROR, LATE, OVERSIZE))
"""Ends of an attempt that `retries` is about."""

MAX_NAMES_NBYTES = 8 * 1024


def class_names(kind: type) -> list[str]:
    """Names of a class and its bases, `module.qualname` each, but for `object`."""
    return [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__[:-1]]


def with_names(blob: bytes, names: Iterable[str]) -> bytes:
    """A pickled exception with the names of its classes behind it."""
    text = "\n".join(names).encode("utf-8", "replace")[:MAX_NAMES_NBYTES]
    return b"%b%b%b" % (blob, text, len(text).to_bytes(2, "little"))


def names_behind(blob: bytes) -> frozenset[str]:
    """What with_names put there; something else for any other bytes, but never an error."""
    nbytes = int.from_bytes(blob[-2:], "little")
    return frozenset(blob[-2 - nbytes : -2].decode("utf-8", "replace").split("\n"))


_OURS = {
    LATE: frozenset(class_names(TaskTimeout)),
    OVERSIZE: frozenset(class_names(MemoryExceeded)),
}


def is_wanted(options: TaskOptions, status: int, payload: bytes) -> bool:
    """Whether this failure is one that the task is to be tried again after."""
    if not options.retry_on:
        return True
    names = _OURS.get(status) or names_behind(payload)
    return not names.isdisjoint(options.retry_on)


def pause_s(n_failed: int, id_: int, settings: Settings) -> float:
    """Seconds before the next try, after `n_failed` >= 1 tries.

    Doubles each time, with a jitter of half of it, so that tasks which failed together do not come
    back together. The jitter is made from the task's id: the same events give the same pauses.
    """
    longest = min(settings.retry_s * 2.0 ** min(n_failed - 1, 60), settings.max_retry_s)
    jitter = ((id_ * 2654435761 + n_failed * 40503) & 0xFFFFFFFF) / 2**32
    return longest * (0.5 + 0.5 * jitter)
