"""glibc's allocator, where it was told not to adapt.

distributed's nanny sets MALLOC_TRIM_THRESHOLD_, and then glibc no longer learns that blocks of the
size of our chunks come and go: each chunk that ZeroMQ receives is fresh memory from the kernel,
128 page faults that cost as much as the copies (1.5 instead of 0.9 s of processor time per GiB).
"""

from __future__ import annotations

import ctypes
import os
import sys

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h

REUSED = 1024 * 1024
"""Bytes. Smaller blocks come from memory that was used before; glibc itself goes up to 32 MiB."""


def reuse_chunks() -> bool:
    """Let malloc reuse the memory of chunks where it would not learn that by itself.

    Returns whether something was changed. An own choice (MALLOC_MMAP_THRESHOLD_) is respected.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, REUSED))
