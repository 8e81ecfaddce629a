"""The sampler's benchmark: each kind of data is what it says, the verdicts read the right cells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.measure import Results
from benchmarks.sampler import cells, command, network
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
        "quarter": (0.23, 0.27),
    }.get(kind, (0.9, 1.1))
    assert low <= ratio <= high


def test_verdicts_by_the_rounds_own_ratios() -> None:
    results = Results()
    for cell, rounds in {
        # The second round was disturbed as a whole: no reason to think less of the choice.
        "1 Gbit, quarter": [(400.0, 100.0, 390.0), (40.0, 10.0, 39.0), (400.0, 100.0, 390.0)],
        "1 Gbit, random": [(100.0, 100.0, 130.0)],
        "loopback, zeros": [(970.0, 1000.0, 1000.0)],
    }.items():
        for speeds in rounds:
            for mode, value in zip(("auto", "off", "always"), speeds, strict=True):
                results.add(mode, cell, "MB/s", value, "MB/s", 1)
    near, loopback, noise, floats = command.verdicts(results)
    assert near.endswith("2 of 3 cells")
    assert "0.97" in loopback and "1.00" in noise and "4.00" in floats
    assert not command.misses(results, "1 Gbit, quarter")
    text = command.table(results)
    assert text.count("ok") == 1 and text.count("MISS") == 2
    assert "not near the better one" in text and "less than 0.98 of off" in text


def test_a_cell_that_would_miss_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def fabric(link: cells.Link) -> Iterator[Any]:
        yield SimpleNamespace(links=list)

    orders: list[str] = []

    def fetch(client: Any, mode: str, kind: str, nbytes: int, seed: int) -> float:
        orders.append(mode)
        return 1.0

    monkeypatch.setattr(cells, "fabric", fabric)
    monkeypatch.setattr(cells, "fetch", fetch)
    results, asked = Results(), []

    def is_met(cell: str) -> bool:
        asked.append(cell)
        return cell.endswith("zeros")

    effort = cells.Effort(rounds=2, cell_s=0.0, again=2)
    cells.measure(cells.LINKS[0], ["zeros", "text"], effort, results, is_met, lambda text: None)
    n = {cell: len(series[0].values) for (cell, _), series in results.rows().items()}
    assert n == {"10 Mbit, zeros": 2, "10 Mbit, text": 6}
    assert asked == ["10 Mbit, zeros", "10 Mbit, text", "10 Mbit, text"]
    assert orders[3:9] == ["auto", "off", "always", "off", "always", "auto"]


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.os, "geteuid", lambda: 1000)
    assert "root" in network.missing()
