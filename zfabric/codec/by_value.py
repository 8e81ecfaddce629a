"""Modules whose functions and classes travel by value, as cloudpickle keeps them.

Looked up without importing cloudpickle: whoever never loaded it has registered nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Collection


def names_by_value() -> Collection[str]:
    """Names of the modules that were registered; nothing where cloudpickle is not loaded, or is
    just being loaded by another thread, for then nothing can have been registered yet."""
    names = getattr(sys.modules.get("cloudpickle"), "list_registry_pickle_by_value", None)
    return names() if names is not None else ()
