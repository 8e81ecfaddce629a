"""The sampler's benchmark: each kind of data is what it says, the verdicts read the right cells."""

from __future__ import annotations

import pytest

from benchmarks.measure import Results
from benchmarks.sampler import command, network
from benchmarks.sampler.data import KINDS, make
from zfabric.codec.compress import compressed_size
from zfabric.codec.sampler import flat_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_compresses_as_it_should(kind: str) -> None:
    value = make(kind, 400_000, 1)
    data = flat_bytes(value)
    assert abs(len(data) - 400_000) < 8
    assert bytes(flat_bytes(make(kind, 400_000, 1))) == bytes(data)
    ratio = compressed_size(bytes(data), 1 if kind == "text" else 8) / len(data)
    low, high = {
        "zeros": (0, 0.02),
        "arange": (0, 0.1),
        "smooth": (0.05, 0.3),
        "sparse": (0.1, 0.5),
        "text": (0.2, 0.9),
        "mixed": (0.7, 0.8),
    }.get(kind, (0.9, 1.1))
    assert low <= ratio <= high


def test_verdicts() -> None:
    results = Results()
    for cell, speeds in {
        "1 Gbit, smooth": (400.0, 100.0, 300.0),
        "1 Gbit, random": (100.0, 100.0, 130.0),
        "loopback, zeros": (990.0, 1000.0, 1000.0),
    }.items():
        for mode, value in zip(("auto", "off", "always"), speeds, strict=True):
            results.add(mode, cell, "MB/s", value, "MB/s", 1)
    lines = command.verdicts(results)
    assert lines[0].endswith("2 of 3 cells")
    assert "0.99" in lines[1] and "4.00" in lines[2] and "1.00" in lines[3]
    assert command.table(results).count("<-- worse") == 1


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.os, "geteuid", lambda: 1000)
    assert "root" in network.missing()
