"""joblib on a fabric.

    import joblib, zfabric.joblib

    with joblib.parallel_config("zfabric", client=client):
        joblib.Parallel()(joblib.delayed(f)(x) for x in data)

Needs joblib 1.5, whose backends are asked to `submit`.
"""

from __future__ import annotations

from zfabric.integrations.joblib.backend import ZFabricBackend, register

__all__ = ["ZFabricBackend", "register"]

register()
