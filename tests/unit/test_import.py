"""`import zfabric` is cheap, and its names appear when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import zfabric

HEAVY = "numpy click zmq blosc asyncio cloudpickle msgpack psutil multiprocessing".split()


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return {name.split(".")[0] for name in done.stdout.split()}


def test_import_loads_nothing_heavy() -> None:
    assert not loaded_by("import zfabric") & set(HEAVY)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        zfabric.Klient  # noqa: B018


def test_dir_shows_the_public_names() -> None:
    assert {"Client", "as_completed", "TaskFailed", "LocalFabric"} <= set(dir(zfabric))


def test_public_names_stay_what_they_are_when_modules_load() -> None:
    """A module of the same name would take the place of a function once it is imported."""
    import pkgutil
    from importlib import import_module
    from importlib.util import find_spec

    from zfabric import client

    # The doors of integrations need the libraries that they integrate.
    missing = [door for door in ("distributed", "joblib", "xarray") if find_spec(door) is None]
    for package in (zfabric, client):
        before = {name: getattr(package, name) for name in package.__all__}
        for module in pkgutil.iter_modules(package.__path__):
            if module.name in ("__main__", *missing):
                continue
            import_module(f"{package.__name__}.{module.name}")
        for name, value in before.items():
            assert getattr(package, name) is value
            assert callable(value) or name == "__version__", name
    client.progress([])
    zfabric.progress([])
    assert callable(client.progress) and callable(zfabric.progress)


def test_every_error_is_reexported() -> None:
    from zfabric import errors

    tree = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.ZFabricError)
    }
    assert tree <= set(zfabric.__all__), tree - set(zfabric.__all__)
