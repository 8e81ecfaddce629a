"""How much memory there is to use, and how much a process does."""

from __future__ import annotations

import os
from pathlib import Path


def usual_limit() -> int:
    """Bytes: six tenths of this host's memory, or of what its container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            total = min(total, int(file.read()))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return total * 6 // 10


CGROUP = Path("/sys/fs/cgroup")


def available_share(cgroup: Path = CGROUP) -> float:
    """Of this host's memory, or of what its container may use: how much is to be had, 0 to 1.

    Caches of files count as free, as the kernel gives them up.  cgroup: where the container's
    figures are.
    """
    share = 1.0
    try:
        with open("/proc/meminfo") as file:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
        share = kib["MemAvailable"] / kib["MemTotal"]
    except (OSError, ValueError, IndexError, KeyError):
        pass
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        for line in (cgroup / "memory.stat").read_text().splitlines():
            name, _, nbytes = line.partition(" ")
            if name in ("active_file", "inactive_file"):  # shared memory is in neither
                used -= int(nbytes)
        share = min(share, max(0.0, 1 - used / limit))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        pass
    return share


def family(pid: int) -> list[int]:
    """A process and all its descendants, as far as the kernel tells of them."""
    found = [pid]
    for one in found:
        try:
            for thread in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{thread}/children") as file:
                    found += map(int, file.read().split())
        except OSError:  # it is gone, or the kernel was built without this
            continue
    return found


def proportional(pid: int) -> tuple[int, int]:
    """Resident bytes of a process, of which those shared with others count in proportion; and how
    many of these are shared memory. Zeros when it is gone."""
    kib = {"Pss": 0, "Pss_Shmem": 0}
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in kib:
                    kib[name] = int(rest.split()[0])
    except (OSError, ValueError, IndexError):
        pass
    return kib["Pss"] * 1024, kib["Pss_Shmem"] * 1024


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
