"""All of our own transports keep the contract."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path

import pytest

from zfabric.testing.contract import TransportContract, TransportMaker

pytestmark = pytest.mark.timeout(60)

numbers = itertools.count()


def dial_port(address: str) -> socket.socket:
    host, _, port = address.partition("://")[2].rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5.0)


def dial_path(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address.partition("://")[2])
    return sock


class TestTcp(TransportContract):
    @pytest.fixture
    def maker(self) -> TransportMaker:
        return TransportMaker(address=lambda: "tcp://127.0.0.1:0", raw=dial_port)


class TestSealedTcp(TransportContract):
    @pytest.fixture
    def maker(self) -> TransportMaker:
        options = {"seal": True}
        return TransportMaker(address=lambda: "tcp://127.0.0.1:0", raw=dial_port, options=options)


class TestIpc(TransportContract):
    @pytest.fixture
    def maker(self, tmp_path: Path) -> TransportMaker:
        return TransportMaker(address=lambda: f"ipc://{tmp_path}/{next(numbers)}", raw=dial_path)


class TestInproc(TransportContract):
    @pytest.fixture
    def maker(self) -> TransportMaker:
        return TransportMaker(
            address=lambda: f"inproc://contract.{next(numbers)}", crosses_processes=False
        )


class TestPlain(TransportContract):
    @pytest.fixture
    def maker(self) -> TransportMaker:
        return TransportMaker(address=lambda: "sock+tcp://127.0.0.1:0", raw=dial_port)
