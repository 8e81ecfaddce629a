"""How much memory there is to use, and how much a process does."""

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


def resident(pid: str) -> int:
    """Resident bytes of a process, 0 when it is gone."""
    return _pages(pid, 1) * os.sysconf("SC_PAGESIZE")


def shared(pid: str) -> int:
    """Those of them that are files or shared memory, 0 when it is gone."""
    return _pages(pid, 2) * os.sysconf("SC_PAGESIZE")


def _pages(pid: str, field: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[field])
    except (OSError, ValueError, IndexError):
        return 0
