"""What xarray has to be told before it writes by a fabric.

It asks which scheduler Dask has, and knows three answers. For any other it takes a lock of threads,
which cannot travel, and keeps the file open in the process of the user, where HDF5 then lets nobody
else write. A fabric is like "distributed" in both respects, but for the lock: that is ours.

xarray has no registry for this, so the functions that it asks are replaced. They differ only while
a fabric is Dask's scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from zfabric.client.collections.scheduler import DaskScheduler
from zfabric.errors import ConfigError
from zfabric.integrations.xarray.locks import file_lock

MODULES = ("locks", "writers", "api")
"""Of xarray.backends, where the scheduler is asked for; which of them depends on the version."""

SCHEDULER_NAMES = ("get_dask_scheduler", "_get_scheduler")
"""The same function, newer and older name."""

_replaced: list[tuple[Any, str, Any]] = []


def enable() -> None:
    """Let `to_netcdf` and `save_mfdataset` write from several workers at once.

    Done by `import zfabric.xarray`; calling it again changes nothing. Raises ConfigError for an
    xarray that is not made as those that this was written for.
    """
    if _replaced:
        return
    locks = import_module("xarray.backends.locks")
    name = next((name for name in SCHEDULER_NAMES if hasattr(locks, name)), None)
    if name is None or not hasattr(locks, "_get_lock_maker"):
        import xarray

        raise ConfigError(
            f"xarray {xarray.__version__} chooses its locks in a way that zfabric does not know;"
            " compute() first and write what comes of it, or use another version of xarray"
        )
    asked, make_lock = getattr(locks, name), locks._get_lock_maker
    for module in _modules():
        if getattr(module, name, None) is asked:
            _replace(module, name, _scheduler_of(asked))
    _replace(locks, "_get_lock_maker", _lock_maker_of(make_lock))


def disable() -> None:
    """Undo enable()."""
    while _replaced:
        module, name, original = _replaced.pop()
        setattr(module, name, original)


def is_fabric() -> bool:
    """Whether Dask computes by a fabric now."""
    from dask.base import get_scheduler

    get = get_scheduler()
    scheduler = getattr(get, "__self__", get)
    return isinstance(scheduler, DaskScheduler) and scheduler.is_open


def _modules() -> list[Any]:
    found = []
    for name in MODULES:
        try:
            found.append(import_module(f"xarray.backends.{name}"))
        except ModuleNotFoundError:
            continue
    return found


def _replace(module: Any, name: str, new: Any) -> None:
    _replaced.append((module, name, getattr(module, name)))
    setattr(module, name, new)


def _scheduler_of(original: Callable[..., str | None]) -> Callable[..., str | None]:
    def get_dask_scheduler(get: Any = None, collection: Any = None) -> str | None:
        if get is None and collection is None and is_fabric():
            return "distributed"
        return original(get, collection)

    return get_dask_scheduler


def _lock_maker_of(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_lock_maker(scheduler: str | None = None) -> Callable[..., Any]:
        if scheduler == "distributed" and is_fabric():
            return file_lock
        return original(scheduler)

    return _get_lock_maker
