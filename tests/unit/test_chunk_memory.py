"""Blocks of a chunk's size are reused without asking the kernel for fresh pages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from zfabric.runtime.chunk_memory import keep_chunks

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        blocks = [bytearray(2 * 2**20) for _ in range(6)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_chunks()
faults(2)
print(int(kept), faults(8))
"""


def faults_of_a_process(**environment: str) -> tuple[bool, int]:
    """Whether chunks are kept there, and what 48 blocks of 2 MiB cost it in page faults."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    kept, count = map(int, done.stdout.split())
    return bool(kept), count


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_blocks_come_back_warm_and_a_choice_is_respected() -> None:
    kept, count = faults_of_a_process()
    if not kept:
        pytest.skip("another allocator than glibc's")
    assert count < 512, "fewer than one block's pages"
    assert not faults_of_a_process(MALLOC_TRIM_THRESHOLD_="65536")[0]
    assert not faults_of_a_process(GLIBC_TUNABLES="glibc.malloc.trim_threshold=65536")[0]
