"""Addresses find their transport, and those that do not say why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest

from zfabric.errors import ConfigError
from zfabric.transport import registry


class Pigeon:
    """A transport as an outsider would write it, as far as the registry looks at it."""

    @staticmethod
    def listen(address: str, **options: Any) -> Any:
        return ("listening", address, options)

    @staticmethod
    def connect(address: str, **options: Any) -> Any:
        return ("dialling", address, options)


@pytest.fixture(autouse=True)
def fresh_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", {})
    yield


def offer(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    points = EntryPoints([EntryPoint(name, value, registry.ENTRY_POINTS)])
    monkeypatch.setattr(registry, "entry_points", lambda: points)


def test_our_schemes_are_known_without_importing_them() -> None:
    assert {"tcp", "ipc", "inproc", "sock+tcp", "mpi"} <= set(registry.schemes())


@pytest.mark.parametrize("scheme", ["tcp", "ipc", "inproc", "sock+tcp"])
def test_our_transports_load(scheme: str) -> None:
    transport = registry.transport_of(f"{scheme}://x")
    assert callable(transport.listen)
    assert callable(transport.connect)


def test_importing_the_registry_imports_no_transport() -> None:
    code = (
        "import sys, zfabric.transport; "
        "sys.exit(any(m in sys.modules for m in ('zmq', 'numpy', 'asyncio', 'socket')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_scheme_lists_the_known_ones_and_suggests() -> None:
    with pytest.raises(ConfigError) as caught:
        registry.listen("tpc://127.0.0.1:0")
    text = str(caught.value)
    assert "did you mean tcp://?" in text
    assert "inproc://, ipc://, mpi://, sock+tcp://, tcp://" in text


def test_an_address_without_scheme_is_told_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean tcp://localhost:8786\?"):
        registry.connect("localhost:8786")


def test_a_bare_scheme_is_no_address() -> None:
    with pytest.raises(ConfigError, match="nothing follows tcp://"):
        registry.connect("tcp://")


def test_register_serves_a_scheme_and_passes_options_on() -> None:
    registry.register("pigeon", listen=Pigeon.listen, connect=Pigeon.connect)
    assert "pigeon" in registry.schemes()
    answer: Any = registry.listen("pigeon://roof", seed=3)
    assert answer == ("listening", "pigeon://roof", {"seed": 3})


@pytest.mark.parametrize("scheme", ["", "a://b", "a b"])
def test_register_refuses_what_cannot_be_a_scheme(scheme: str) -> None:
    with pytest.raises(ConfigError, match="scheme"):
        registry.register(scheme, listen=Pigeon.listen, connect=Pigeon.connect)


def test_an_entry_point_is_found_listed_and_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "pigeon", f"{__name__}:Pigeon")
    assert "pigeon" in registry.schemes()
    answer: Any = registry.connect("pigeon://roof")
    assert answer == ("dialling", "pigeon://roof", {})


def test_an_entry_point_that_does_not_load_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(monkeypatch, "pigeon", "no_such_module_at_all")
    with pytest.raises(ConfigError, match="no_such_module_at_all.*cannot be loaded"):
        registry.connect("pigeon://roof")
