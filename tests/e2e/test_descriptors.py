"""Clients and workers that may have few descriptors handle many values all the same."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, resource, sys
import numpy as np
import zfabric

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (160, hard))

def make(n, nbytes):
    return np.full(nbytes, n % 251, "u1")

def total(array):
    return int(array.sum())

with zfabric.Client(slots=1) as client:
    for nbytes in (120, 20_000, 100_000):
        data = [make(n, nbytes) for n in range(400)]
        there = client.scatter(data)
        assert client.gather(client.map(total, there)) == [int(each.sum()) for each in data]
        del there
        held = client.gather(client.map(make, range(400), [nbytes] * 400))
        assert all(np.array_equal(a, b) for a, b in zip(held, data, strict=True))
        held[399][0] = 7  # whoever gathers may write to it, copied or not
    print("open:", len(os.listdir("/proc/self/fd")) < 160)
    assert client.submit(abs, -1).result(20) == 1
print("done")
"""


ONE_TASK = """
import resource
import numpy as np
import zfabric
from zfabric.launch.local import LocalFabric

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

def make(n):
    return np.full(100_000, n % 251, "u1")

def total(arrays):
    return sum(int(array[0]) for array in arrays)

with LocalFabric(1, slots=1) as fabric, zfabric.Client(fabric) as client:
    data = client.map(make, range(400))
    whole = client.submit(total, data)
    print(whole.result(60) == sum(n % 251 for n in range(400)))
"""


def test_a_task_over_more_values_than_its_worker_may_open() -> None:
    """It gets copies of them. Values had been called lost, and were made again for ever."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_TASK], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-3000:]
    assert "lost" not in done.stderr


def test_more_values_than_descriptors() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (0, "open: True\ndone\n"), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
