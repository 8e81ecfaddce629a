"""How much memory there is to use."""

from __future__ import annotations

import os


def usual_limit() -> int:
    """Bytes: six tenths of this host's memory, or of what its container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            total = min(total, int(file.read()))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return total * 6 // 10
