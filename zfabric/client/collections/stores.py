"""`da.store` into what only the client's own process has: an array, or a file locked by threads.

The target travels to a worker as any argument does, so the worker would write into a copy of an
array, without a word. A file of xarray's that was opened for threads cannot travel at all.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable, Mapping
from typing import Any

from dask._task_spec import Alias, DataNode, GraphNode, Task, TaskRef, _execute_subgraph

from zfabric.errors import UsageError

MARK = "store-map"
"""In the names of tasks that da.store makes, also where Dask has fused them with others."""

_THREAD_LOCKS = (type(threading.Lock()), type(threading.RLock()))


def refuse_lost_stores(nodes: Mapping[Hashable, GraphNode]) -> None:
    """Raises UsageError if a task of these would store where no worker can."""
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

    if not isinstance(node, Task):
        return
    if node.func is _execute_subgraph:
        inner, _, names, *values = node.args
        within = {**around, **dict(zip(names, values, strict=False)), **inner}
        for each in inner.values():
            _refuse(each, within)
    elif node.func is not load_store_chunk:  # one that holds others: what was stored with delayed
        for each in node.args:
            _refuse(each, around)
    else:
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
                " workers can open, as x.to_zarr(path) does"
            )
        if type(target).__module__.startswith("h5py"):
            raise UsageError(
                "an HDF5 file that this process has open cannot be written by workers: use"
                " x.to_zarr(path), or xarray's to_netcdf(path, engine='h5netcdf')"
            )
        if _is_zarr_in_memory(target):
            raise UsageError(
                "a zarr store in this process's memory would be written to as copies on the"
                " workers: give a path or URL that they can open, as in x.to_zarr(path)"
            )
        if type(target).__module__.startswith("xarray.backends"):
            _refuse_thread_lock(target)


def _is_zarr_in_memory(target: Any) -> bool:
    """target: a zarr array, or one as xarray's backend writes to it."""
    if type(target).__module__.startswith("xarray.backends.zarr"):
        target = getattr(getattr(target, "datastore", None), "zarr_group", None)
    if not type(target).__module__.startswith("zarr"):
        return False
    store = getattr(target, "store", None)
    names = {base.__name__ for base in type(store).__mro__}
    return bool(names & {"MemoryStore", "KVStore", "dict"})


def _refuse_thread_lock(target: Any) -> None:
    """target: an array of a file, as xarray's backends write to it."""
    lock = getattr(getattr(target, "datastore", None), "lock", None)
    if any(isinstance(each, _THREAD_LOCKS) for each in (lock, *getattr(lock, "locks", ()))):
        raise UsageError(
            "xarray has opened this file to be written by threads of this process, which workers"
            " cannot join: `import zfabric.xarray` (or zfabric.xarray.enable()) before to_netcdf()"
            " or save_mfdataset(), and it locks the file for the whole fabric"
        )
