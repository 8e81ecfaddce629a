"""`zfabric links` as text."""

from __future__ import annotations

from zfabric.cli.links import render

LINK = {
    "at": "worker-1",
    "peer": "tcp://10.0.0.2:4000",
    "peer_name": "worker-2",
    "direction": "in",
    "rate": 118_000_000,
    "round_trip_s": 0.001,
    "raw_nbytes": 4 * 2**20,
    "wire_nbytes": 2**20,
    "verdicts": {"raw": 1, "packed": 9},
    "saved_s": 0.03,
}


def test_a_link_is_one_line() -> None:
    head, line = render([LINK]).splitlines()
    for word in ("worker-1", "<-", "worker-2", "118.0", "0.25", "0.03s", "9 packed, 1 raw"):
        assert word in line
    assert head.split() == ["at", "peer", "moved", "MB/s", "ratio", "saved", "verdicts"]


def test_nothing_moved() -> None:
    assert "no values" in render([{**LINK, "raw_nbytes": 0}])
    assert "no values" in render([])
