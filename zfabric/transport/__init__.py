"""Moves lists of frames between processes and knows no meaning."""

from zfabric.transport.contract import (
    Buffer,
    Capabilities,
    Channel,
    Endpoint,
    Listener,
    PeerId,
    Poller,
)
from zfabric.transport.registry import connect, listen, register, schemes

__all__ = [
    "Buffer",
    "Capabilities",
    "Channel",
    "Endpoint",
    "Listener",
    "PeerId",
    "Poller",
    "connect",
    "listen",
    "register",
    "schemes",
]
