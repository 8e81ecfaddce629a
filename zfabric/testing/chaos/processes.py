"""Signals to processes, by a schedule that a seed makes: kill, or stop and go on after a while.

    with ProcessFaults(lambda: fabric.worker_pids(), seed=3, every_s=0.5) as faults:
        ...                                   # work that has to survive
    print(faults.done)

Processes are found by id each time a fault is due, so those that were started meanwhile take part.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from random import Random
from time import monotonic
from types import TracebackType
from typing import NamedTuple

KILL = "kill"
STOP = "stop"

KINDS = (KILL, STOP)


class Fault(NamedTuple):
    """at_s: since the start.  kind: "kill" or "stop".  pick: 0..1, which of the processes.
    stop_s: how long a stopped one stays so.  pid: whom it hit, 0 while it is only planned."""

    at_s: float
    kind: str
    pick: float
    stop_s: float
    pid: int = 0


def plan(
    seed: int,
    *,
    every_s: float,
    kinds: Sequence[str] = KINDS,
    stop_s: tuple[float, float] = (0.1, 1.0),
) -> Iterator[Fault]:
    """Faults without end, ascending; the same for the same arguments.

    every_s: between two, on average.  stop_s: shortest and longest stop.
    Raises ValueError for kinds that there are not, and for times that are none.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"no such kind of fault: {', '.join(sorted(unknown))}; there are {KINDS}")
    if not kinds:
        raise ValueError(f"which kinds of fault? there are {KINDS}")
    if not every_s > 0.0 or not 0.0 <= stop_s[0] <= stop_s[1]:
        raise ValueError("every_s is above 0, and stop_s a shortest and a longest time in seconds")
    return _faults(seed, every_s, list(kinds), stop_s)


def _faults(
    seed: int, every_s: float, kinds: list[str], stop_s: tuple[float, float]
) -> Iterator[Fault]:
    random = Random(f"{seed}/processes")
    at_s = 0.0
    while True:
        at_s += random.expovariate(1.0 / every_s)
        yield Fault(at_s, random.choice(kinds), random.random(), random.uniform(*stop_s))


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that stands still while inside (SIGSTOP), and goes on after, whatever happens."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


class ProcessFaults:
    """Does what `plan` says, in a thread, until it is closed; then lets all go on that it stopped.

    pids: who may be hit, asked each time; ids of others than our own processes are at your risk.
    Options: as of `plan`.  done: what was done, with the ids.
    An error of `pids` or of a signal ends the faults, and is raised where the `with` block ends.
    """

    def __init__(
        self,
        pids: Callable[[], Sequence[int]],
        seed: int,
        *,
        every_s: float,
        kinds: Sequence[str] = KINDS,
        stop_s: tuple[float, float] = (0.1, 1.0),
    ) -> None:
        self.done: list[Fault] = []
        self._pids = pids
        self._plan = plan(seed, every_s=every_s, kinds=kinds, stop_s=stop_s)
        self._still: dict[int, float] = {}
        """Stopped processes, and when they go on."""
        self._error: BaseException | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-processes", daemon=True)

    def __enter__(self) -> ProcessFaults:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        try:
            self._inject()
        except BaseException as exc:
            self._error = exc

    def _inject(self) -> None:
        start = monotonic()
        fault = next(self._plan)
        try:
            while True:
                now = monotonic() - start
                for pid in [pid for pid, until in self._still.items() if now >= until]:
                    self._go_on(pid)
                while now >= fault.at_s:
                    self._do(fault, now)
                    fault = next(self._plan)
                if self._end.wait(max(0.0, min([fault.at_s, *self._still.values()]) - now)):
                    return
        finally:
            for pid in list(self._still):
                self._go_on(pid)

    def _do(self, fault: Fault, now: float) -> None:
        pids = [pid for pid in self._pids() if pid not in self._still]
        if not pids:
            return
        pid = pids[int(fault.pick * len(pids))]
        try:
            os.kill(pid, signal.SIGKILL if fault.kind == KILL else signal.SIGSTOP)
        except ProcessLookupError:
            return
        if fault.kind == STOP:
            self._still[pid] = now + fault.stop_s
        self.done.append(fault._replace(pid=pid))

    def _go_on(self, pid: int) -> None:
        del self._still[pid]
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
