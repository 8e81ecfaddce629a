"""Modules whose functions and classes travel by value: those that cloudpickle has registered, and
the main module of a process that multiprocessing has spawned.

Looked up without importing cloudpickle: whoever never loaded it has registered nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Collection

SPAWNED_MAIN = "__mp_main__"
"""What multiprocessing calls the program's main module in the processes that it spawns. No worker
can import it, as none can `__main__`, but cloudpickle only knows the latter."""


def names_by_value() -> Collection[str]:
    """Names of those modules. Of registered ones, nothing where cloudpickle is not loaded, or is
    just being loaded by another thread, for then nothing can have been registered yet."""
    registered = getattr(sys.modules.get("cloudpickle"), "list_registry_pickle_by_value", None)
    names: Collection[str] = registered() if registered is not None else ()
    if SPAWNED_MAIN in sys.modules and SPAWNED_MAIN not in names:
        return {*names, SPAWNED_MAIN}
    return names


def register_spawned_main() -> None:
    """Have cloudpickle treat that module as it treats `__main__`."""
    module = sys.modules.get(SPAWNED_MAIN)
    if module is None:
        return
    import cloudpickle

    if SPAWNED_MAIN not in cloudpickle.list_registry_pickle_by_value():
        cloudpickle.register_pickle_by_value(module)
