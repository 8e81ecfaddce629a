"""dask.distributed on ZeroMQ: the `zmq://` comm backend."""

from __future__ import annotations

from zfabric.integrations.distributed.backend import ZmqBackend, register
from zfabric.integrations.distributed.comm import ZmqComm

__all__ = ["ZmqBackend", "ZmqComm", "register"]
