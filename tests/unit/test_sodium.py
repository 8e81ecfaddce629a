"""The start-up probe of encryption's speed."""

from __future__ import annotations

import zmq

from zfabric.transport import sodium


def test_it_measures_the_library_that_libzmq_uses() -> None:
    assert zmq.has("curve")
    found = sodium.speed(pieces=1)
    assert found is None or found > 1e6


def test_it_warns_below_300_megabytes_per_second() -> None:
    assert "82 MB/s" in sodium.warning(82e6)
    assert sodium.warning(sodium.SLOW) == sodium.warning(1.4e9) == sodium.warning(None) == ""


def test_a_library_that_is_not_loaded_is_not_found() -> None:
    assert sodium._loaded("libnobodyhasthis") is None
