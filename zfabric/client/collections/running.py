"""What a worker does with a row that is a block of a Dask graph.

The row's function is a `Runner`, which says the client's version of Dask: it is loaded before the
first block is, and nodes of another version would not load, or not do what they say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import dask
from dask._task_spec import GraphNode, Task, TaskRef, _execute_subgraph
from dask.utils import SerializableLock

from zfabric.client.lock import Lock
from zfabric.client.waiting import slot_context
from zfabric.errors import CodecError, UsageError


class Runner:
    """Runs blocks: the one function of all rows that come from graphs."""

    __name__ = __qualname__ = "dask"

    def __call__(
        self,
        steps: dict[Hashable, GraphNode],
        outputs: Sequence[Hashable] | None,
        given: Sequence[tuple[Hashable, int, int | None]],
        values: Sequence[Any],
    ) -> Any:
        """Run the nodes in order.

        outputs: keys whose values are returned as a list; None: the last node's value itself.
        given: (key, place in values, place in that bundle or None) of each input.
        """
        known: dict[Hashable, Any] = {
            key: values[place] if item is None else values[place][item]
            for key, place, item in given
        }
        last = next(reversed(steps))
        if outputs is None and len(steps) == 1:
            return _run(last, steps[last], known)
        _run_all(steps, known, (last,) if outputs is None else outputs)
        return known[last] if outputs is None else [known[key] for key in outputs]

    def __reduce__(self) -> tuple[Callable[[str], Runner], tuple[str]]:
        return runner_for, (dask.__version__,)


def runner_for(version: str) -> Runner:
    """The runner of this process. Raises CodecError when its Dask is not of that version."""
    if version != dask.__version__:
        raise CodecError(
            f"dask is {version} at the client and {dask.__version__} on this worker: install the"
            " same version on both sides, as graphs are only understood by the Dask that made them"
        )
    if slot_context() is not None:
        # A collection computed inside a task would start a pool of threads in each slot.
        dask.config.set(scheduler="sync")
    return Runner()


def _run_all(
    steps: dict[Hashable, GraphNode], known: dict[Hashable, Any], keep: Sequence[Hashable]
) -> None:
    """Run the nodes in order into `known`; values go with their last use, but for those to keep."""
    uses: dict[Hashable, int] = dict.fromkeys(keep, 1)
    for node in steps.values():
        for key in node.dependencies:
            uses[key] = uses.get(key, 0) + 1
    for key, node in steps.items():
        known[key] = _run(key, node, known)
        for need in node.dependencies:
            uses[need] -= 1
            if not uses[need]:
                del known[need]


def _run(key: Hashable, node: GraphNode, known: dict[Hashable, Any]) -> Any:
    try:
        if type(node) is Task:
            if node.func is _execute_subgraph and not node.kwargs:
                return _run_fused(*[_argument(each, known) for each in node.args])
            arrays = sys.modules.get("dask.array.core")
            if arrays is not None and node.func is arrays.load_store_chunk:
                return _store(node, known)
        value = node(known)
        if hasattr(value, "__await__") and node.is_coro:
            import asyncio

            value = asyncio.run(value)
        return value
    except Exception as exc:
        if isinstance(exc, RuntimeError) and str(exc).startswith("P2P "):
            raise UsageError(
                f"{key!r} belongs to the p2p shuffle or rechunk, which only runs on"
                " dask.distributed's own workers: use the method 'tasks', which is the default"
                " while a zfabric client is Dask's scheduler, or zfabric.Client('dask://...')"
            ) from exc
        if not getattr(exc, "__notes__", None):
            exc.add_note(f"in the Dask task {key!r}")
        raise


def _store(node: Task, known: dict[Hashable, Any]) -> Any:
    """da.store of one chunk. The lock that Dask gives it by default is one per process; chunks of
    one target are written by several, and where two share a block of it one of them was lost."""
    arguments = [_argument(each, known) for each in node.args]
    options = {name: _argument(each, known) for name, each in node.kwargs.items()}
    lock = options.get("lock")
    if isinstance(lock, SerializableLock):
        options["lock"] = Lock(f"dask store {lock.token}")
    return node.func(*arguments, **options)


def _argument(each: Any, known: dict[Hashable, Any]) -> Any:
    if isinstance(each, TaskRef):
        return known[each.key]
    if isinstance(each, GraphNode):
        return each({key: known[key] for key in each.dependencies})
    return each


def _run_fused(
    inner: dict[Hashable, GraphNode], out: Hashable, given: Sequence[Hashable], *values: Any
) -> Any:
    """A task that Dask fused of several. Its own way finds their order each time it runs one,
    by what orders whole graphs, and that is a third of the time of a graph of small tasks."""
    known: dict[Hashable, Any] = dict(zip(given, values, strict=False))
    steps: dict[Hashable, GraphNode] = {}  # an inner node may have no key of its own
    stack = [out]
    while stack:
        key = stack[-1]
        if key in steps or key in known:
            stack.pop()
            continue
        waiting = [k for k in inner[key].dependencies if k not in steps and k not in known]
        if waiting:
            stack += waiting
        else:
            steps[key] = inner[key]
            stack.pop()
    _run_all(steps, known, (out,))
    return known[out]
