"""A compute fabric for Python on ZeroMQ.

    import zfabric

    with zfabric.Client() as client:
        print(client.submit(pow, 2, 10).result())

Everything public is here; each name is imported when it is first used, so `import zfabric` itself
loads no ZeroMQ, no numpy and no asyncio (`tests/unit/test_import.py` holds it to that).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zfabric.errors import (
    AddressInUse,
    ChannelClosed,
    ClientClosed,
    CodecError,
    ConfigError,
    ConnectFailed,
    DataLost,
    FrameTooLarge,
    InsecureBind,
    InternalError,
    KilledTask,
    LocalProtocolError,
    MemoryExceeded,
    ModuleMissing,
    NoWorkerFits,
    ProtocolError,
    QuotaExceeded,
    Refused,
    RemoteProtocolError,
    ResultTimeout,
    TaskCancelled,
    TaskError,
    TaskFailed,
    TaskLost,
    TaskTimeout,
    TransportError,
    UnknownOutcome,
    Unserialisable,
    UsageError,
    WorkerLost,
    ZFabricError,
)

if TYPE_CHECKING:
    from zfabric.client import (
        Client,
        Future,
        fire_and_forget,
        get_client,
        register_by_value,
        wait,
    )
    from zfabric.client.as_completed import as_completed
    from zfabric.client.lock import Lock
    from zfabric.client.progress_bar import progress
    from zfabric.launch.local import LocalFabric

__version__ = "0.1.0.dev0"

_HOMES = {
    "Client": "zfabric.client",
    "Future": "zfabric.client",
    "LocalFabric": "zfabric.launch.local",
    "Lock": "zfabric.client.lock",
    "as_completed": "zfabric.client",
    "fire_and_forget": "zfabric.client",
    "get_client": "zfabric.client",
    "progress": "zfabric.client",
    "register_by_value": "zfabric.client",
    "wait": "zfabric.client",
}

__all__ = [
    "AddressInUse",
    "ChannelClosed",
    "Client",
    "ClientClosed",
    "CodecError",
    "ConfigError",
    "ConnectFailed",
    "DataLost",
    "FrameTooLarge",
    "Future",
    "InsecureBind",
    "InternalError",
    "KilledTask",
    "LocalFabric",
    "LocalProtocolError",
    "Lock",
    "MemoryExceeded",
    "ModuleMissing",
    "NoWorkerFits",
    "QuotaExceeded",
    "ProtocolError",
    "Refused",
    "RemoteProtocolError",
    "ResultTimeout",
    "TaskCancelled",
    "TaskError",
    "TaskFailed",
    "TaskLost",
    "TaskTimeout",
    "TransportError",
    "UnknownOutcome",
    "Unserialisable",
    "UsageError",
    "WorkerLost",
    "ZFabricError",
    "__version__",
    "as_completed",
    "fire_and_forget",
    "get_client",
    "progress",
    "register_by_value",
    "wait",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'zfabric' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
