"""What Dask hands to a scheduler, as one table of nodes: only what is wanted, in Dask's order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any, TypeAlias

from dask._task_spec import Alias, GraphNode, convert_legacy_graph
from dask.order import order
from dask.utils import ensure_dict

from zfabric.client.collections.held import DaskFuture
from zfabric.client.collections.stores import refuse_lost_stores
from zfabric.errors import UsageError

Key: TypeAlias = Hashable


class Graph:
    """The part of a graph that the wanted keys need.

    nodes: by key, each behind its inputs.  known: inputs whose data is held already.
    names: wanted key to the key that has its value: another one behind an alias.
    annotations: {what: {key: value}}, as Dask has kept them.
    """

    def __init__(
        self,
        dsk: Any,
        wanted: Iterable[Key],
        held: Callable[[Key], DaskFuture | None],
        failed: Callable[[Key], DaskFuture | None] = lambda key: None,
    ) -> None:
        """held: gives the data of a persisted key.  failed: the same where there will be none, as
        its task failed: for keys that the graph itself does not say how to make."""
        raw: Mapping[Key, Any] = dsk
        self.annotations: dict[str, dict[Key, Any]] = {}
        if not isinstance(dsk, dict):
            raw = ensure_dict(dsk.__dask_graph__() if hasattr(dsk, "__dask_graph__") else dsk)
            ask = getattr(dsk, "__dask_annotations__", None)
            self.annotations = ask() if ask is not None else {}
        self._held = held
        self._failed = failed
        # Dask drops these as it converts the graph: they refer to themselves.
        self._given = {k: v for k, v in raw.items() if isinstance(v, DaskFuture)}
        self._table: dict[Key, GraphNode] = convert_legacy_graph(dict(raw))
        self.known: dict[Key, DaskFuture] = {}
        self.names = {key: self._behind(key) for key in wanted}
        self.nodes = self._cull(self.names.values())
        refuse_lost_stores(self.nodes)

    def arrange(self) -> None:
        """Bring the nodes into Dask's order: depth first, values used soon after they are made."""
        nodes = self.nodes
        if len(nodes) > 1:
            ranks = order(nodes)
            self.nodes = {key: nodes[key] for key in sorted(nodes, key=ranks.__getitem__)}

    def _find(self, key: Key) -> DaskFuture | None:
        """Who has it already."""
        found = self._given.get(key)
        if found is not None and found.key == key:
            return found
        return self._held(key if found is None else found.key)

    def _behind(self, key: Key) -> Key:
        for _ in range(len(self._table) + 1):
            node = self._table.get(key)
            if type(node) is not Alias or self._find(key) is not None or node.target == key:
                return key
            key = node.target
        raise UsageError(f"the alias {key!r} leads back to itself")

    def _cull(self, wanted: Collection[Key]) -> dict[Key, GraphNode]:
        """The nodes that are needed, each behind its inputs."""
        kept: dict[Key, GraphNode] = {}
        known, table, find = self.known, self._table, self._find
        open_: set[Key] = set()
        stack = list(dict.fromkeys(wanted))
        while stack:
            key = stack[-1]
            if key in kept or key in known:
                stack.pop()
                continue
            if key in open_:  # what it needs has been found
                kept[key] = table[key]
                stack.pop()
                continue
            future = find(key)
            if future is not None:
                known[key] = future
                continue
            node = table.get(key)
            if node is None and (future := self._failed(key)) is not None:
                known[key] = future  # whoever needs it ends as it did
                continue
            if node is None:
                raise UsageError(
                    f"the graph needs {key!r}, which is neither in it nor persisted with this"
                    " client any more: a persisted collection is computed by the client that"
                    " persisted it, while that is open"
                )
            if key in node.dependencies:  # Dask's order() finds the longer ones
                raise RuntimeError(
                    f"Cycle detected between the following keys:\n  -> {key}\n  -> {key}"
                )
            open_.add(key)
            stack.extend(node.dependencies)
        return kept
