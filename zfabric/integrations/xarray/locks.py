"""The lock of a file that several processes write to."""

from __future__ import annotations

from typing import Any

from zfabric.client.lock import Lock
from zfabric.errors import ZFabricError


class FileLock(Lock):
    """A `zfabric.Lock` as xarray's file managers want it.

    They try for it when they are collected, which may be when there is no fabric any more: then it
    is simply not to be had.
    """

    __slots__ = ()

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Whether it is ours now."""
        if blocking:
            return super().acquire(True, timeout)
        try:
            return super().acquire(False)
        except ZFabricError:
            return False

    def __reduce__(self) -> Any:
        return FileLock, (self.name,)


def file_lock(name: str) -> FileLock:
    """The lock of the file of that name."""
    return FileLock(name[-1024:])  # the end of a long path tells more than its beginning
