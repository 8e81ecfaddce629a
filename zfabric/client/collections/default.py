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


class _Default(DaskScheduler):
    """What stands in Dask's configuration: the newest default client, whichever that is by then.

    A `with dask.config.set(...)` puts back what it found, also when the client that was the
    default then has closed within it. So this stands for all of them; and as Dask asks whether
    what is configured is true, it is false while there is none, and Dask goes on without it.
    """

    def __init__(self) -> None:
        super().__init__(_newest)
        self.before: Any = None
        """The scheduler that was configured before; None: none was."""

    def __bool__(self) -> bool:
        return self.is_open or self.before is not None

    def __call__(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        if self.is_open or self.before is None:
            return self.get(dsk, keys, **kwargs)
        from dask.base import get_scheduler

        return get_scheduler(scheduler=self.before)(dsk, keys, **kwargs)


_lock = threading.RLock()
_defaults: list[ref[Client]] = []
"""The newest last."""
_undo: list[Any] = []
"""Dask's own records of what was configured before the first: the methods, the scheduler."""


def set_default(client: Client) -> None:
    """Make this client the default until it is closed, or another one is made."""
    with _lock:
        _defaults.append(ref(client))
        if "dask.config" in sys.modules:
            _configure()
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())


def unset_default(client: Client) -> None:
    """The client closes: the one before it is the default again, or what was configured."""
    with _lock:
        _defaults[:] = [each for each in _defaults if each() not in (None, client)]
        if not _defaults:
            _restore()
            sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]


@contextmanager
def as_scheduler(scheduler: DaskScheduler) -> Iterator[DaskScheduler]:
    """Dask computes by this scheduler inside, in all threads of the process."""
    import dask

    with dask.config.set({"scheduler": scheduler, **METHODS}):
        yield scheduler


def _newest() -> Client | None:
    with _lock:
        while _defaults:
            client = _defaults[-1]()
            if client is not None:
                return client
            _defaults.pop()  # let go without close()
        return None


def _configure() -> None:
    """Have Dask's configuration name _default, where nobody has set another one since it did."""
    if not _defaults or _undo:
        return
    config = sys.modules["dask.config"]
    now = config.get("scheduler", None)
    if now is not _default:
        _default.before = now
    _undo.append(config.set(METHODS))
    _undo.append(config.set({"scheduler": _default}))


def _restore() -> None:
    """Have it say what it said before; a scheduler that somebody has set since stands."""
    if not _undo:
        return
    config = sys.modules["dask.config"]
    if config.get("scheduler", None) is _default:
        _undo[1].__exit__(None, None, None)
        _default.before = None
    _undo[0].__exit__(None, None, None)
    _undo.clear()


_default = _Default()


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
                _configure()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
