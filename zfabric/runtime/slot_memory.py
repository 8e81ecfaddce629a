"""The memory limit of slots: who takes more is found by looking, now and then, at those that run.

RLIMIT_AS would count what is only reserved, and the limits of a cgroup need rights that few have.
What a look costs, 0.1 ms per slot, is paid only where a limit was set and a task runs.

What a task's own processes take counts as well. Pages that they share with their parent since the
fork count once; finding that out takes the kernel a millisecond for each, so only when the sum is
too much.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from zfabric.core.supervisor import Supervisor
from zfabric.runtime.host_memory import family, proportional, resident, shared
from zfabric.runtime.slots import Slots

LOOK_S = 0.1
"""Between two looks: about 100 MB of fresh pages at the pace of a kernel that zeroes them."""


class MemoryWatch:
    """limit: bytes that a slot's process may have resident; 0: any."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._look_at = 0.0

    def look_at(self, machine: Supervisor) -> float:
        """When to call `over`; infinity while there is nothing to look at."""
        return self._look_at if self.limit and machine.n_running else inf

    def over(self, machine: Supervisor, slots: Slots, now: float) -> Iterator[tuple[int, str]]:
        """The slots that have too much, and what to say of it. Call it when look_at() has come."""
        self._look_at = now + LOOK_S
        for number in list(slots.links):
            pid = slots.pid(number)
            if not pid:
                continue
            used = self._used(pid, slots.links[number].mappings.nbytes)
            if used > self.limit:
                mib = 2**20
                yield (
                    number,
                    f"it used {used / mib:.0f} MiB, more than its slot's limit of"
                    f" {self.limit / mib:.0f} MiB",
                )

    def _used(self, pid: int, n_kept: int) -> int:
        """Bytes; exact where it is above the limit.  n_kept: of values that the slot keeps mapped
        for rows to come, which are no doing of the one that runs."""
        pids = family(pid)
        used = sum(resident(str(one)) for one in pids)
        if used <= self.limit:
            return used
        if len(pids) == 1:
            return used - min(shared(str(pid)), n_kept)
        pss = [proportional(one) for one in pids]
        return sum(all_ for all_, _ in pss) - min(sum(shm for _, shm in pss), n_kept)
