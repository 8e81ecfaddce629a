"""`import zfabric.joblib` gives joblib a backend of that name; see zfabric.integrations.joblib."""

from __future__ import annotations

from zfabric.integrations.joblib import ZFabricBackend, register

__all__ = ["ZFabricBackend", "register"]
