"""Persisted keys: what stands in a collection for data that the workers have.

A `DaskFuture` is a `TaskRef`, because that is what Dask looks for in graphs, names and tokens. It
pickles as a bare reference to its key. Its value is a future's, or one item of a bundle that a
future brings; the data goes when the last DaskFuture of it does.

Dask drops from a graph what refers to itself, and a persisted chunk does. So a key that a graph
needs and does not have is looked up in the scheduler's table of those that are alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dask._task_spec import TaskRef
from dask.base import is_dask_collection
from dask.tokenize import normalize_token

from zfabric.client.future import Future


class DaskFuture(TaskRef):  # type: ignore[misc]
    """A key of a graph whose value is on the workers, now or soon.

    item: its place in the future's value, which is then a bundle; None: it is the value.
    light: it is known to be small before it is there.
    """

    __slots__ = ("__weakref__", "future", "item", "light")
    __dask_future__ = True

    def __init__(self, key: Any, future: Future, item: int | None) -> None:
        super().__init__(key)
        self.future = future
        self.item = item
        self.light = False

    def done(self) -> bool:
        """Whether the tasks behind it have ended."""
        return self.future.done()

    @property
    def status(self) -> str:
        """As of a Future."""
        return self.future.status

    def result(self, timeout: float | None = None) -> Any:
        """The value, waited for and fetched. Raises what Future.result() raises."""
        value = self.future.result(timeout)
        return value if self.item is None else value[self.item]


@normalize_token.register(Future)  # type: ignore[untyped-decorator]
def _token(future: Future) -> tuple[str, int]:
    return "zfabric-future", future.task_id


def futures_in(collection: Any) -> Iterator[Future]:
    """The futures that a collection's graph holds, each once."""
    if not is_dask_collection(collection):
        return
    seen: set[int] = set()
    for value in dict(collection.__dask_graph__()).values():
        future = value.future if isinstance(value, DaskFuture) else _foreign(value)
        if future is not None and future.task_id not in seen:
            seen.add(future.task_id)
            yield future


foreign: list[Callable[[Any], Future | None]] = []
"""What other engines add: gives the future for what stands in their persisted collections."""


def _foreign(value: Any) -> Future | None:
    for future_of in foreign:
        if (future := future_of(value)) is not None:
            return future
    return None
