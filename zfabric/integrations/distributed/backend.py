"""What distributed loads for addresses that begin with `zmq://`."""

from __future__ import annotations

from typing import Any

from distributed.comm.addressing import parse_host_port, unparse_host_port
from distributed.comm.registry import Backend, backends
from distributed.utils import ensure_ip, get_ip

from zfabric.integrations.distributed.allocator import reuse_chunks
from zfabric.integrations.distributed.connector import ZmqConnector
from zfabric.integrations.distributed.listener import ZmqListener


class ZmqBackend(Backend):
    """Comms over zfabric's transport."""

    def __init__(self) -> None:
        reuse_chunks()

    def get_connector(self) -> ZmqConnector:
        """For connecting to addresses."""
        return ZmqConnector()

    def get_listener(
        self, loc: str, handle_comm: Any, deserialize: bool, **connection_args: Any
    ) -> ZmqListener:
        """For listening at host:port."""
        return ZmqListener(loc, handle_comm, deserialize, **connection_args)

    def get_address_host(self, loc: str) -> str:
        """The host of host:port."""
        return str(parse_host_port(loc)[0])

    def get_address_host_port(self, loc: str) -> tuple[str, int]:
        """Both of them."""
        host, port = parse_host_port(loc)
        return host, port

    def resolve_address(self, loc: str) -> str:
        """host:port with the host as an IP address."""
        host, port = parse_host_port(loc)
        return str(unparse_host_port(ensure_ip(host), port))

    def get_local_address_for(self, loc: str) -> str:
        """The host of ours that reaches host:port."""
        host, _ = parse_host_port(loc)
        return str(unparse_host_port(get_ip(ensure_ip(host)), None))


def register() -> None:
    """Serve zmq:// in this process; installing zfabric does it for all, by an entry point."""
    backends.setdefault("zmq", ZmqBackend())
