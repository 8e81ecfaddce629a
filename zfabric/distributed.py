"""dask.distributed on zfabric's transport: addresses that begin with `zmq://`.

    from distributed import Client, LocalCluster

    client = Client(LocalCluster(protocol="zmq://"))

Where zfabric is installed, distributed finds the backend by itself, in every process. Importing
this module registers it by hand, for a zfabric that only lies on the path: `dask worker --preload
zfabric.distributed`.

The same holds for the other direction, `zfabric.Client("dask://scheduler:8786")`: zfabric's verbs
on a cluster of dask.distributed.
"""

from __future__ import annotations

from zfabric.client import engines
from zfabric.integrations.distributed import ZmqBackend, ZmqComm, register

__all__ = ["ZmqBackend", "ZmqComm", "register"]

register()
for _scheme in ("dask", "dask+zmq", "dask+tls"):
    engines.register(_scheme, "zfabric.integrations.distributed.engine:DaskClient")
