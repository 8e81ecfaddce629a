"""Values behind a slow link: a network namespace, real processes, compression as measured."""

from __future__ import annotations

import pytest

from benchmarks.sampler.cells import Link, fabric, fetch
from benchmarks.sampler.network import missing

MiB = 2**20


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_slow_link_carries_what_shrinks_faster() -> None:
    with fabric(Link("100 Mbit", 100, 0)) as client:
        for mode in ("auto", "off"):  # the first contact
            fetch(client, mode, "random", MiB, 1)
        raw = fetch(client, "off", "smooth", 6 * MiB, 2)
        packed = fetch(client, "auto", "smooth", 6 * MiB, 2)
        assert packed < raw / 2
        links = {(link["at"], link["direction"]): link for link in client.links()}
    auto, off = links["auto", "out"], links["off", "out"]
    assert auto["verdicts"]["pays"] >= 2 and auto["saved_s"] > 0
    assert off["wire_nbytes"] == off["raw_nbytes"]
    # tbf lets a burst through before it throttles; the rate is of bytes, headers not included.
    assert 5e6 < auto["rate"] < 40e6
