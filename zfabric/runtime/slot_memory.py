"""The memory limit of slots: who takes more is found by looking, now and then, at those that run.

RLIMIT_AS would count what is only reserved, and the limits of a cgroup need rights that few have.
What a look costs, 20 us per slot, is paid only where a limit was set and a task runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from zfabric.core.supervisor import Supervisor
from zfabric.runtime.host_memory import resident, shared
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
            used = resident(str(pid)) if pid else 0
            # Values that it keeps mapped for rows to come are no doing of the one that runs.
            if used > self.limit:
                used -= min(shared(str(pid)), slots.links[number].mappings.nbytes)
            if used > self.limit:
                mib = 2**20
                yield (
                    number,
                    f"it used {used / mib:.0f} MiB, more than its slot's limit of"
                    f" {self.limit / mib:.0f} MiB",
                )
