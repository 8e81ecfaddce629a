"""Where a broker may listen, and what it says when it may not."""

from __future__ import annotations

import logging
import socket

import pytest

from zfabric.errors import AddressInUse, ConfigError, InsecureBind
from zfabric.runtime import binding
from zfabric.runtime.binding import (
    check_exposure,
    is_loopback,
    listen_near,
    reachable,
    split_tcp,
)


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


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "*", "10.1.2.3"])
def test_plain_sockets_are_refused_like_tcp_which_could_have_keys(host: str) -> None:
    with pytest.raises(InsecureBind, match=r"has no keys") as caught:
        check_exposure(f"sock+tcp://{host}:8787", insecure=False)
    assert f"zfabric broker --listen tcp://{host}:8787\n" in str(caught.value)
    assert f"--listen sock+tcp://{host}:8787 --insecure" in str(caught.value)


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


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:8787", "tcp://[::1]:1", "tcp://node7:8787", "ipc:///tmp/x", "inproc://x"],
)
def test_an_address_that_can_be_dialled_is_told_as_it_is(address: str) -> None:
    assert reachable(address) == address


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "*"])
def test_all_interfaces_are_told_as_one_that_can_be_dialled(host: str) -> None:
    told = split_tcp(reachable(f"sock+tcp://{host}:8787"))
    assert told is not None and told[0] == "sock+tcp" and told[2] == 8787
    assert told[1].strip("[]") not in ("0.0.0.0", "::", "*", "", "127.0.0.1", "::1")


@pytest.mark.parametrize(
    ("way_out", "interface", "told"),
    [
        ({"AF_INET": "10.1.2.3", "AF_INET6": "fd00::5"}, {}, "tcp://10.1.2.3:1"),
        ({"AF_INET6": "fd00::5"}, {"AF_INET": "10.9.9.9"}, "tcp://[fd00::5]:1"),
        ({}, {"AF_INET": "10.9.9.9"}, "tcp://10.9.9.9:1"),
        ({}, {}, "tcp://node7:1"),
    ],
)
def test_the_way_out_goes_before_any_interface_and_the_name(
    way_out: dict[str, str],
    interface: dict[str, str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(binding, "_way_out", lambda family: way_out.get(family.name, ""))
    monkeypatch.setattr(binding, "_any_interface", lambda family: interface.get(family.name, ""))
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    assert reachable("tcp://[::]:1") == told


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("127.0.0.1", ""),
        ("::1", ""),
        ("fe80::1", ""),
        ("169.254.1.1", ""),
        ("10.1.2.3", "10.1.2.3"),
    ],
)
def test_addresses_that_another_host_can_dial(text: str, own: str) -> None:
    assert binding._beyond_loopback(text) == own


def test_an_interface_is_found_without_a_way_out() -> None:
    own = binding._any_interface(socket.AF_INET)
    assert own == "" or binding._beyond_loopback(own) == own


def test_a_data_address_beyond_this_host_has_to_be_asked_for_by_name() -> None:
    from zfabric.config import DEFAULTS
    from zfabric.runtime.data_address import listen_for_data

    with pytest.raises(ConfigError, match="--insecure"):
        listen_for_data("tcp://127.0.0.1:8787", "tcp://0.0.0.0:0", DEFAULTS)
    for wanted, insecure in [("tcp://127.0.0.1:0", False), ("tcp://0.0.0.0:0", True)]:
        listener = listen_for_data("tcp://127.0.0.1:8787", wanted, DEFAULTS, insecure)
        assert listener is not None
        listener.close()
