"""A real fabric of processes keeps its accounts under all kinds of faults, for a minute."""

from __future__ import annotations

import os

import pytest

from zfabric.testing.soak.run import FAULTS, soak

pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.usefixtures("leaves_nothing"),
    pytest.mark.skipif("FAULT_SECONDS" not in os.environ, reason="a soak: `make faults` runs it"),
]

SECONDS = float(os.environ.get("FAULT_SECONDS", "60"))


@pytest.mark.timeout(SECONDS + 180)
def test_nothing_is_lost_or_kept_under_faults() -> None:
    report = soak(SECONDS, seed=2, every_s=1.0, faults=FAULTS)
    assert not report["failures"], report
    assert report["results"] > 50
