"""Memory for chunks that come through ZeroMQ: glibc keeps it, rather than giving it back.

Each chunk lies in a block that ZeroMQ allocates. glibc learns by and by that such blocks come and
go, but gives the end of its heap back to the kernel whenever more than two of them are free. So
most chunks met fresh pages, whose faults cost as much as the two copies: 256 MB came by tcp at 1.5
GB/s, and at 2.1 GB/s without them.
"""

from __future__ import annotations

import os
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h."""

LARGEST = 32 * 2**20
"""Bytes of the largest block that is kept. Where glibc itself ends up in a process that once freed
such a block, as programs with arrays do; a lower one would be a loss to them."""

KEPT = 2 * LARGEST
"""Bytes that a heap keeps; again glibc's own choice there."""


@cache
def keep_chunks() -> bool:
    """From now on blocks of this process come from memory that was used before.

    Returns whether that is so: not where somebody has chosen otherwise by the environment
    (MALLOC_..., GLIBC_TUNABLES), nor with another allocator than glibc's.
    """
    if sys.platform != "linux" or any(
        name.startswith("MALLOC_") or (name == "GLIBC_TUNABLES" and "malloc" in value)
        for name, value in os.environ.items()
    ):
        return False
    import ctypes  # 3 ms, and many a process never gets here

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, KEPT))
