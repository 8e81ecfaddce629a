"""Does anything move? A fabric with work that nobody does is reported, not waited for in silence.

A long task is no stall: its worker says in each beat that rows run. Nor is work that nothing can
run: that has its own warnings. What is reported is what the laws of the scheduler rule out, and
what therefore only a mistake of ours, or a worker that lost its rows, can bring about:

  - tasks are unfinished and workers are there, but for `stall_s` nothing ended, nothing was
    submitted, and no worker says that it runs a row;
  - a worker is thought to hold rows, and for `stall_s` has said that it holds none.

It looks and changes nothing. Sleep of the broker's own does not count.
"""

from __future__ import annotations

from zfabric.config import Settings
from zfabric.core.scheduler import Scheduler
from zfabric.core.tasks import ASSIGNED, READY, UNFINISHED, WAITING, TaskRecord


class Watchdog:
    """Looks at a scheduler once per tick."""

    __slots__ = ("_barked", "_beats", "_empty_since", "_mark", "_settings", "_since")

    def __init__(self, settings: Settings, now: float) -> None:
        self._settings = settings
        self._mark: tuple[int, ...] = ()
        self._since = now
        self._barked = False
        self._beats: dict[int, int] = {}
        self._empty_since: dict[int, tuple[float, int]] = {}
        """Workers that say that they hold nothing of what they are thought to hold: since when,
        and which of their beats was the first to say so."""

    def stalled_s(self, now: float) -> float:
        """Seconds for which a stall that was reported has lasted; 0.0 when none is."""
        return now - self._since if self._barked else 0.0

    def look(self, scheduler: Scheduler, now: float, asleep_s: float = 0.0) -> str:
        """What is wrong, once per stall; "" while nothing is.

        asleep_s: how much of the time since the last look this process did not run.
        """
        if asleep_s:
            self._since += asleep_s
            self._empty_since = {
                number: (at + asleep_s, n) for number, (at, n) in self._empty_since.items()
            }
        table = scheduler.table
        mark = (table.n_done, table.n_failed, table.n_submitted, table.n_stale, len(table.workers))
        works = self._works(scheduler)
        if works or mark != self._mark:
            self._mark = mark
            self._since = now
            self._barked = False
        lost = self._lost_rows(scheduler, now)
        if lost or self._barked:
            return lost
        if now - self._since < self._settings.stall_s:
            return ""
        n = sum(_should_move(scheduler, task) for task in table.tasks.values())
        if not n:
            self._since = now
            return ""
        self._barked = True
        return f"no progress for {now - self._since:.0f} s: {n} tasks are unfinished and none runs"

    def _works(self, scheduler: Scheduler) -> bool:
        """Whether a worker has said since the last look that it runs a row, or there is none."""
        before, self._beats = self._beats, {n: w.n_beats for n, w in scheduler.workers.items()}
        return not self._beats or any(
            len(worker.load) > 1 and worker.load[1] > 0 and worker.n_beats != before.get(number)
            for number, worker in scheduler.workers.items()
        )

    def _lost_rows(self, scheduler: Scheduler, now: float) -> str:
        empty_since: dict[int, tuple[float, int]] = {}
        lost = ""
        for worker in scheduler.workers.values():
            if worker.rows and worker.load and worker.load[0] == 0:
                at, n_beats = self._empty_since.get(worker.number, (now, worker.n_beats))
                if worker.last_done > at:
                    at, n_beats = worker.last_done, worker.n_beats
                # A beat may be older than the row; one that says so again and again is not.
                if now - at >= self._settings.stall_s and worker.n_beats >= n_beats + 2:
                    lost = (
                        f"worker {worker.name} is thought to hold {len(worker.rows)} rows, and has "
                        f"said for {now - at:.0f} s that it holds none"
                    )
                    at, n_beats = now, worker.n_beats
                empty_since[worker.number] = at, n_beats
        self._empty_since = empty_since
        return lost


def _should_move(scheduler: Scheduler, task: TaskRecord) -> bool:
    """Whether it is unfinished for another reason than that no worker fits, or that it waits for
    a worker or for a task that is unfinished itself."""
    if task.state == READY:
        return scheduler.placer.fits_any(task)
    if task.state == WAITING:
        if task.id in scheduler.table.in_doubt:
            return False
        return all(dep.state not in UNFINISHED for dep in task.deps)
    return task.state == ASSIGNED
