"""What a worker does with a row that is a block of a Dask graph.

The row's function is a `Runner`, which says the client's version of Dask: it is loaded before the
first block is, and nodes of another version would not load, or not do what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import dask
from dask._task_spec import GraphNode

from zfabric.client.waiting import slot_context
from zfabric.errors import CodecError


class Runner:
    """Runs blocks: the one function of all rows that come from graphs."""

    __name__ = __qualname__ = "dask"

    def __call__(
        self,
        steps: Sequence[GraphNode],
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
        if outputs is None and len(steps) == 1:
            return _run(steps[0], known)
        uses: dict[Hashable, int] = {}
        for key in outputs if outputs is not None else (steps[-1].key,):
            uses[key] = 1
        for node in steps:
            for key in node.dependencies:
                uses[key] = uses.get(key, 0) + 1
        for node in steps:
            known[node.key] = _run(node, known)
            for key in node.dependencies:
                uses[key] -= 1
                if not uses[key]:
                    del known[key]
        if outputs is None:
            return known[steps[-1].key]
        return [known[key] for key in outputs]

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


def _run(node: GraphNode, known: dict[Hashable, Any]) -> Any:
    try:
        value = node(known)
        if hasattr(value, "__await__") and node.is_coro:
            import asyncio

            value = asyncio.run(value)
        return value
    except Exception as exc:
        exc.add_note(f"in the Dask task {node.key!r}")
        raise
