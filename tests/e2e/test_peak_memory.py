"""Moving a large value takes its own size at the receiver, and next to nothing at the sender."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from zfabric import Client, wait
from zfabric.launch.local import LocalFabric

MB = 2**20
NBYTES = 256 * MB


def peak(since_now: bool = False) -> int:
    """This process's highest resident memory, in bytes."""
    if since_now:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.slow
def test_peak_memory_of_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZFABRIC_SHARED_MEMORY", "off")
    monkeypatch.setenv("ZFABRIC_COMPRESSION", "off")
    with LocalFabric(1, slots=1, scheme="tcp") as fabric, Client(fabric.address) as client:
        made = client.submit(np.full, NBYTES, 7, "u1")
        wait([made])
        before = peak(since_now=True)
        array = client.gather(made)
        assert array.nbytes == NBYTES and (array[:: 64 * 1024] == 7).all()
        assert peak() - before <= 1.1 * NBYTES, "at the receiver"
        before = peak(since_now=True)
        sent = client.scatter([array[: NBYTES // 2], array[NBYTES // 2 :]])
        assert peak() - before <= 64 * MB, "at the sender"
        assert client.submit(len, sent[1]).result(60) == NBYTES // 2
