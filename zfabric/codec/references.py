"""A value that is still to come, inside a call's arguments.

The client's `Future` is a `Reference`. While a call is being pickled, a collector is open on this
thread: each reference that the pickler meets, at whatever depth, notes its task id there and puts
a placeholder into the stream. While a call is being loaded, the values lie on this thread in the
same order, and each placeholder takes its own.

It is the reference that knows how to be pickled, rather than a pickler that looks for references:
so the C pickler needs no Python callback per object, and a call with a million plain objects costs
what pickle costs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from zfabric.errors import CodecError, UsageError


class _Here(threading.local):
    """What this thread is in the middle of. Class attributes are each thread's first values."""

    seen: dict[int, int] | None = None
    values: Sequence[object] | None = None


here = _Here()


class Reference:
    """Base of whatever stands for the value of a task. A subclass has `task_id`, an int."""

    __slots__ = ()

    task_id: int

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        seen = here.seen
        if seen is None:
            raise UsageError(
                f"a {type(self).__name__} cannot be pickled or sent by itself: "
                "return its .result() from the task, or pass it as an argument of submit(), "
                "where its value takes its place"
            )
        return value_at, (seen.setdefault(self.task_id, len(seen)),)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # object.__reduce_ex__ would look for copyreg and __getstate__ first: this is shorter.
        return self.__reduce__()

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Any:
        return self


def value_at(index: int) -> object:
    """The value of the `index`-th dependency of the call that this thread is loading."""
    values = here.values
    if values is None or not 0 <= index < len(values):
        raise CodecError(f"a placeholder for dependency {index} stands where no such value is")
    return values[index]
