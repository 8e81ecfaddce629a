"""`import zfabric.xarray` lets xarray write files by a fabric; see zfabric.integrations.xarray."""

from __future__ import annotations

from zfabric.integrations.xarray import FileLock, disable, enable

__all__ = ["FileLock", "disable", "enable"]
