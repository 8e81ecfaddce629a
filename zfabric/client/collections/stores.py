"""`da.store` into an array of the client's own process, which would be lost without a word.

The target travels to a worker as any argument does, so the worker would write into a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from typing import Any

from dask._task_spec import Alias, DataNode, GraphNode, Task, TaskRef, _execute_subgraph

from zfabric.errors import UsageError

MARK = "store-map"
"""In the names of tasks that da.store makes, also where Dask has fused them with others."""


def refuse_lost_stores(nodes: Mapping[Hashable, GraphNode]) -> None:
    """Raises UsageError if a task of these would store into a numpy array."""
    if "dask.array.core" not in sys.modules:
        return
    seen = set()
    for key, node in nodes.items():
        name = key[0] if type(key) is tuple else key
        if type(name) is not str or MARK not in name or name in seen:
            continue
        seen.add(name)
        _refuse(node, nodes)


def _refuse(node: GraphNode, around: Mapping[Hashable, Any]) -> None:
    """around: what its references may mean."""
    import numpy as np
    from dask.array.core import load_store_chunk

    if type(node) is not Task:
        return
    if node.func is _execute_subgraph:
        inner, _, names, *values = node.args
        within = {**around, **dict(zip(names, values, strict=False)), **inner}
        for each in inner.values():
            _refuse(each, within)
    elif node.func is load_store_chunk:
        target = node.args[1]
        for _ in range(5):  # from references to a node to its value
            if isinstance(target, Alias):
                target = around.get(target.target)
            elif isinstance(target, TaskRef):
                target = around.get(target.key)
            elif type(target) is DataNode:
                target = target.value
        if isinstance(target, np.ndarray):
            raise UsageError(
                f"da.store() into a numpy {type(target).__name__} of this process would write into"
                " copies of it on the workers: use target[...] = x.compute(), or store into what"
                " workers can open, as x.to_zarr() and da.to_hdf5() do"
            )
