"""Being Dask's default: what `x.compute()` uses without being named.

Dask has no hook for a client that is not dask.distributed's but its configuration, so that is set:
the scheduler, and the two methods that would otherwise use a local disk or dask.distributed. A
client made before Dask is imported must not import it (that takes a second): it leaves a finder
that sets the configuration as soon as somebody else does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from weakref import ref

from zfabric.client.collections.scheduler import DaskScheduler

if TYPE_CHECKING:
    from zfabric.client.client import Client

METHODS = {"dataframe.shuffle.method": "tasks", "array.rechunk.method": "tasks"}

_lock = threading.RLock()
_defaults: list[tuple[int, DaskScheduler]] = []
"""(id of its client, scheduler), the newest last."""
_before: Any = None
"""Dask's own record of what was configured before the first of them; None: nothing is set."""


def set_default(client: Client) -> None:
    """Make this client the default until it is closed, or another one is made."""
    with _lock:
        _defaults.append((id(client), DaskScheduler(ref(client))))
        if "dask.config" in sys.modules:
            _apply()
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())


def unset_default(client: Client) -> None:
    """The client closes: the one before it is the default again, or what was configured."""
    with _lock:
        _defaults[:] = [each for each in _defaults if each[0] != id(client)]
        _apply()
        if not _defaults:
            sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]


@contextmanager
def as_scheduler(scheduler: DaskScheduler) -> Iterator[DaskScheduler]:
    """Dask computes by this scheduler inside, in all threads of the process."""
    import dask

    with dask.config.set({"scheduler": scheduler, **METHODS}):
        yield scheduler


def _apply() -> None:
    """Have Dask's configuration say what _defaults says."""
    global _before
    config = sys.modules.get("dask.config")
    if config is None:
        return
    now = config.get("scheduler", None)
    if _before is not None and not isinstance(now, DaskScheduler):
        return  # somebody has configured another one since: theirs stands
    if not _defaults:
        if _before is not None:
            _before.__exit__(None, None, None)
            _before = None
    elif _before is None:
        _before = config.set({"scheduler": _defaults[-1][1], **METHODS})
    else:
        config.set({"scheduler": _defaults[-1][1]})


class _Finder:
    """Waits on sys.meta_path for the import of dask.config; then leaves."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "dask.config":
            return None
        with _lock:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute: Callable[[Any], None] = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            with _lock:
                _apply()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
