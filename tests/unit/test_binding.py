"""Where a broker may listen, and what it says when it may not."""

from __future__ import annotations

import logging
import socket

import pytest

from zfabric.errors import AddressInUse, ConfigError, InsecureBind
from zfabric.runtime.binding import check_exposure, is_loopback, listen_near, split_tcp


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("tcp://127.0.0.1:8787", ("tcp", "127.0.0.1", 8787)),
        ("tcp://[::1]:0", ("tcp", "[::1]", 0)),
        ("tcp://*:*", ("tcp", "*", 0)),
        ("sock+tcp://localhost:1", ("sock+tcp", "localhost", 1)),
        ("ipc:///tmp/x", None),
        ("inproc://x", None),
    ],
)
def test_split_tcp(address: str, parts: object) -> None:
    assert split_tcp(address) == parts


@pytest.mark.parametrize("address", ["tcp://127.0.0.1", "tcp://x:port", "tcp://x:70000"])
def test_an_address_without_a_port_says_how_to_write_one(address: str) -> None:
    with pytest.raises(ConfigError, match="8787"):
        split_tcp(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "*", "", "10.1.2.3", "192.168.0.1"])
def test_beyond_loopback_is_refused_with_the_line_to_type(host: str) -> None:
    with pytest.raises(InsecureBind, match=r"--insecure"):
        check_exposure(f"tcp://{host}:8787", insecure=False)


def test_insecure_overrides_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "zfabric"):
        check_exposure("tcp://0.0.0.0:8787", insecure=True)
    assert "without keys" in caplog.text


def test_loopback_and_ipc_need_nothing() -> None:
    check_exposure("tcp://127.0.0.1:1", insecure=False)
    check_exposure("ipc:///tmp/anything", insecure=False)


def test_a_used_port_gives_the_next_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with caplog.at_level(logging.WARNING, "zfabric"):
            listener = listen_near(f"tcp://127.0.0.1:{port}", strict=False)
        try:
            assert int(listener.address.rpartition(":")[2]) > port
            assert f"port {port} is in use" in caplog.text
        finally:
            listener.close()
        with pytest.raises(AddressInUse):
            listen_near(f"tcp://127.0.0.1:{port}", strict=True)
