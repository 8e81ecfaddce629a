"""What a thread sleeps on: one lock, acquired by the sleeper and released by who wakes it.

A `threading.Event` would be a condition, a lock, a list of locks and some Python code for each
wake-up. Waiting here is one C call that Ctrl-C can interrupt, waking is another.
"""

from __future__ import annotations

from _thread import allocate_lock
from threading import TIMEOUT_MAX


class Alarm:
    """Rings once. Calling it wakes the sleeper; further calls change nothing."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._lock.acquire()

    def __call__(self, *_: object) -> None:
        try:
            self._lock.release()
        except RuntimeError:  # it has rung already
            pass

    def wait(self, timeout_s: float | None = None) -> bool:
        """Sleep until it rings, at most timeout_s. Whether it rang; asking again says so again."""
        if timeout_s is None:
            self._lock.acquire()
        elif not self._lock.acquire(True, min(max(timeout_s, 0.0), TIMEOUT_MAX)):
            return False
        self._lock.release()
        return True
