"""Rows out of a graph's blocks: pickled, queued, let go where only the graph needs them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dask._task_spec import DataNode
from dask.sizeof import sizeof

from zfabric.client import misuse
from zfabric.client.collections.blocks import Block, block_size, cut
from zfabric.client.collections.graphs import Graph
from zfabric.client.collections.held import DaskFuture
from zfabric.client.collections.running import Runner
from zfabric.client.future import Future
from zfabric.codec.arguments import dump_call
from zfabric.codec.functions import DumpedFunction, dump_function
from zfabric.codec.serialise import nbytes_of, pack
from zfabric.messages import TaskOptions

if TYPE_CHECKING:
    from zfabric.client.client import Client

ROW_BYTES = 256 * 1024
"""Of a block that travels in its row. Above, it is put into a worker's store first, and that is
waited for; a graph's many small constants would make that the rule."""

DATA_BYTES = 64 * 1024
"""From here on a constant of a graph travels once, as a value, however many tasks need it."""

ANNOTATED = ("priority", "retries", "resources", "workers")

_runner: DumpedFunction | None = None


def send(
    client: Client,
    graph: Graph,
    n_slots: int,
    options: Mapping[str, Any],
    alone: Collection[Hashable] = (),
    *,
    together: bool = False,
) -> dict[Hashable, DaskFuture]:
    """Queue the graph; a DaskFuture for each wanted key.

    n_slots: of the fabric.  options: for all tasks, as in Client.submit; annotations go first.
    alone: wanted keys whose value is to be a future's own, in no bundle.
    together: all in one row, as far as annotations let it.
    """
    return _Sending(client, graph, n_slots, options, alone, together).send()


class _Sending:
    def __init__(
        self,
        client: Client,
        graph: Graph,
        n_slots: int,
        options: Mapping[str, Any],
        alone: Collection[Hashable],
        together: bool,
    ) -> None:
        self._client = client
        self._graph = graph
        self._options = {name: options[name] for name in ANNOTATED if options.get(name)}
        self._n_slots = n_slots
        self._together = together
        self._own = {graph.names[key] for key in alone}
        self._where: dict[Hashable, DaskFuture] = dict(graph.known)
        self._constants: dict[Hashable, Any] = {}

    def send(self) -> dict[Hashable, DaskFuture]:
        graph, nodes, where = self._graph, self._graph.nodes, self._where
        self._put_data(nodes)
        wanted = {key for key in graph.names.values() if key not in where}
        # A small constant is copied into each row that needs it.
        self._constants = {
            key: node
            for key, node in nodes.items()
            if type(node) is DataNode and key not in where and key not in wanted
        }
        order = [key for key in nodes if key not in where and key not in self._constants]
        blocks, _ = cut(
            order,
            {key: nodes[key].dependencies for key in order},
            wanted,
            self._own,
            self._marks(order),
            len(order) if self._together else block_size(len(order), self._n_slots),
        )
        # Futures of what is only passed on live until the last row that needs them is queued.
        last: dict[Hashable, int] = {}
        for number, block in enumerate(blocks):
            for key in block.inputs:
                last[key] = number
        for number, block in enumerate(blocks):
            bundle = None
            if len(block.outputs) > 1:
                bundle = block.outputs
            elif block.outputs and block.outputs[0] is not block.keys[-1]:
                block.keys = [k for k in block.keys if k != block.outputs[0]] + block.outputs
                bundle = block.outputs
            future = self._row(block, bundle)
            for item, key in enumerate(block.outputs):
                where[key] = DaskFuture(key, future, None if bundle is None else item)
            for key in block.inputs:
                if last[key] == number and key not in wanted and key not in graph.known:
                    where.pop(key, None)
        return {key: where[name] for key, name in graph.names.items()}

    def _put_data(self, nodes: Mapping[Hashable, Any]) -> None:
        large = [
            node
            for node in nodes.values()
            if type(node) is DataNode and sizeof(node.value) > DATA_BYTES
        ]
        if large:
            futures = self._client._values.scatter([node.value for node in large], False)
            for node, future in zip(large, futures, strict=True):
                self._where[node.key] = DaskFuture(node.key, future, None)

    def _marks(self, order: Iterable[Hashable]) -> dict[Hashable, Hashable]:
        """Tasks with annotations that mean something to us: the options of their rows."""
        tables = {name: self._graph.annotations.get(name) for name in ANNOTATED}
        tables = {name: table for name, table in tables.items() if table}
        if not tables:
            return {}
        marks: dict[Hashable, Hashable] = {}
        for key in order:
            found = {name: table[key] for name, table in tables.items() if key in table}  # type: ignore[index, operator]
            if found:
                marks[key] = _frozen(found)
        return marks

    def _row(self, block: Block, bundle: list[Hashable] | None) -> Future:
        client, where, nodes = self._client, self._where, self._graph.nodes
        submitter = client._submitter
        if submitter.closed_text:
            misuse.refuse_closed(client)
        function = _dumped_runner()
        if function.id not in submitter.functions:
            client._calls._learn(function)
        values: dict[int, int] = {}
        futures = []
        given = []
        steps = {}
        for key in block.inputs:
            if key in self._constants:
                steps[key] = self._constants[key]
                continue
            source = where[key]
            place = values.get(source.future.task_id)
            if place is None:
                place = values[source.future.task_id] = len(futures)
                futures.append(source.future)
            given.append((key, place, source.item))
        for key in block.keys:
            steps[key] = nodes[key]
        frames, deps = dump_call((steps, bundle, given, futures), {})
        if deps:
            misuse.refuse_foreign(client, deps)
        if nbytes_of(frames) <= ROW_BYTES:
            payload = pack(frames)
        else:
            payload, deps = client._calls._payload(frames, deps)
        outcome = submitter.new_outcome(function.id)
        future = Future(client, outcome)
        options = self._options
        if block.mark is not None:
            options = {**options, **_thawed(block.mark)}
        row_options = _options(options) if options else None
        submitter.rows.append((outcome.id, function.id, payload, deps or None, row_options))
        if not payload:
            submitter.released.append(deps[-1])  # its task keeps it from now on
        if client._io.sleeping:
            client._io.wake()
        return future


def _dumped_runner() -> DumpedFunction:
    global _runner
    if _runner is None:
        _runner = dump_function(Runner())
    return _runner


def _options(given: Mapping[str, Any]) -> TaskOptions | None:
    return misuse.options_of(
        None,
        given.get("retries") or 0,
        given.get("priority") or 0,
        given.get("resources"),
        given.get("workers"),
    )


def _frozen(found: dict[str, Any]) -> Hashable:
    """The options as something that can be compared and be a key."""
    frozen = []
    for name, value in sorted(found.items()):
        if isinstance(value, dict):
            value = ("dict", *sorted(value.items()))
        elif isinstance(value, (list, set, frozenset)):
            value = ("list", *sorted(value))
        frozen.append((name, value))
    return tuple(frozen)


def _thawed(mark: Any) -> dict[str, Any]:
    found = {}
    for name, value in mark:
        if isinstance(value, tuple) and value[:1] == ("dict",):
            value = dict(value[1:])
        elif isinstance(value, tuple) and value[:1] == ("list",):
            value = list(value[1:])
        found[name] = value
    return found
