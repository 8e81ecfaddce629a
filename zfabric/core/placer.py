"""Who runs what: ready tasks to workers with credit, and back where they are stuck.

Where a task goes is decided by `core.placement`; this is the loop around it, the successor rule,
and what an assignment needs to carry.
"""

from __future__ import annotations

from collections import deque
from operator import itemgetter

from zfabric import messages as m
from zfabric.core import placement
from zfabric.core.outbound import way_nbytes
from zfabric.core.outcomes import text_payload
from zfabric.core.placement import WorkerRecord
from zfabric.core.table import TaskTable, is_restricted
from zfabric.core.tasks import ASSIGNED, DONE, READY, WAITING, FunctionRecord, TaskRecord
from zfabric.messages import INLINE, LOCAL, REMOTE, Dependency

MAX_KNOWN = 2048
"""Functions that a worker is trusted to remember before the oldest is taken from it."""

MAX_AHEAD_INPUTS = 16
"""The successor rule looks only at tasks with this many inputs or fewer: it looks at each input
again whenever one of them is placed."""

GIVE_LIMIT = 64 * 1024
"""Bytes of inline inputs above which they travel ahead of their row, in messages of their own."""

MANY_INPUTS = 10_000
"""Inputs of a task from which on it is checked whether one message can name them all."""

MAX_WAYS_NBYTES = 3 * 1024 * 1024
"""Bytes of a Run that may tell where a row's inputs are; the largest frame is 4 MiB."""

RECALL_AFTER_S = 0.05
"""Seconds without a finished row after which a worker's waiting rows go to an idle one."""


class Placer:
    """Places the tasks of a table."""

    def __init__(self, table: TaskTable) -> None:
        self.table = table
        self.settling = False
        """After a restart, until the workers are back: nothing is placed."""
        self.away: list[tuple[float, WorkerRecord]] = []
        """Workers that may only be cut off, and until when they are waited for."""

    def place(self) -> None:
        if self.table.ahead:
            self._follow()
        if self.table.restricted:
            self._place_restricted()
        ready = self.table.ready
        if not ready.n:
            return
        open_ = [w for w in self.table.workers.values() if w.free > 0]
        if len(open_) == 1:
            worker = open_[0]
            # The successor rule may spend credit too, so it is looked up each time.
            while len(worker.rows) < worker.credit:
                task = ready.pop()
                if task is None:
                    break
                self._assign(worker, task)
                if self.table.ahead:
                    self._follow()
        elif open_:
            self._spread(open_)

    def _spread(self, open_: list[WorkerRecord]) -> None:
        """Ready tasks to several workers: to their inputs, or to the emptiest."""
        order = placement.EmptiestFirst(open_)
        while (idlest := order.first()) is not None:
            task = self.table.ready.pop()
            if task is None:
                return
            worker = placement.preferred(task, idlest) if task.deps else None
            self._assign(worker or idlest, task)
            if self.table.ahead:
                self._follow()

    def _place_restricted(self) -> None:
        for key, queue in sorted(self.table.restricted.items(), key=itemgetter(0)):
            while (task := _first_ready(queue)) is not None:
                options = task.options
                worker = placement.emptiest(
                    w for w in self.table.workers.values() if w.can_run_now(options)
                )
                if worker is None:
                    break
                queue.popleft()
                self._assign(worker, task)
            if not queue:
                del self.table.restricted[key]

    def _follow(self) -> None:
        """The successor rule: a task whose missing inputs are all being made on one worker goes
        there at once, without waiting for the news that they are made."""
        ahead = self.table.ahead
        single = len(self.table.workers) == 1
        while ahead:
            task = ahead.popleft()
            if task.state != WAITING or len(task.deps) > MAX_AHEAD_INPUTS:
                continue
            if task.id in self.table.in_doubt:
                continue
            worker: WorkerRecord | None = None
            for dep in task.deps:
                if dep.state == ASSIGNED:
                    if worker is not None and dep.worker is not worker:
                        break
                    worker = dep.worker
                    # A fan-out wants many workers, not the one where it begins.
                    assert worker is not None and dep.dependents is not None
                    if not single and len(dep.dependents) > worker.slots:
                        break
                elif dep.state != DONE:
                    break
            else:
                if worker is not None and worker.free > 0 and not is_restricted(task):
                    self._assign(worker, task)

    def _assign(self, worker: WorkerRecord, task: TaskRecord) -> None:
        fn = task.fn
        assert fn is not None
        if len(task.deps) > MANY_INPUTS and self._refuse_too_many(worker, task):
            return
        if self.table.later:
            # An entry of before, of a row that its worker kept after all, may still be in line.
            self.table.later.pop(task.id, None)
        task.state = ASSIGNED
        task.worker = worker
        task.attempt += 1
        worker.rows[task.id] = task
        if fn.id not in worker.known:
            self._teach(worker, fn)
        worker.ids.append(task.id)
        worker.attempts.append(task.attempt)
        worker.fns.append(fn.id)
        worker.payloads.append(task.payload)
        if task.deps:
            worker.deps.append((len(worker.ids) - 1, self._ways(worker, task)))
        if task.options is not m.DEFAULT_OPTIONS:
            worker.occupy(task.options.resources, 1)
            if self.table.failed is not None and not task.options.idempotent:
                self.table.begun.append(task.id)
            if task.options.timeout_s:
                worker.limits.append((len(worker.ids) - 1, task.options.timeout_s))
        if task.dependents:
            self.table.ahead.extend(task.dependents)
        self.table.dirty_workers[worker] = None

    def _refuse_too_many(self, worker: WorkerRecord, task: TaskRecord) -> bool:
        """End a task whose inputs cannot be named in one message."""
        nbytes = sum(map(way_nbytes, self._ways(worker, task)))
        if nbytes <= MAX_WAYS_NBYTES:
            return False
        text = (
            f"{task.name} takes {len(task.deps)} values; to say where they are takes "
            f"{nbytes} bytes, more than a message holds. Combine them in a tree of tasks."
        )
        self.table.fail(task, m.UNFIT, text_payload(text))
        return True

    def _teach(self, worker: WorkerRecord, fn: FunctionRecord) -> None:
        worker.known[fn.id] = None
        if fn.id in worker.forgets:
            worker.forgets.remove(fn.id)  # it was not told yet, so it still has it
        else:
            worker.functions.append((fn.id, fn.name, fn.blob))
        if len(worker.known) > MAX_KNOWN:
            oldest = next(iter(worker.known))
            del worker.known[oldest]
            worker.forgets.append(oldest)

    def _ways(self, worker: WorkerRecord, task: TaskRecord) -> list[Dependency]:
        """How each input of a task reaches a worker."""
        ways: list[Dependency] = []
        inline = 0
        for dep in task.deps:
            if dep.state != DONE or (dep.holders and worker in dep.holders):
                ways.append((dep.id, LOCAL, dep.nbytes))
            elif dep.value is not None:
                inline += len(dep.value)
                ways.append((dep.id, INLINE, dep.value))
            else:
                assert dep.holders is not None
                places = sorted((h.number, h.data_address) for h in dep.holders)
                if len(places) > 1:  # readers of one value do not all begin with the same holder
                    first = worker.number % len(places)
                    places = places[first:] + places[:first]
                ways.append((dep.id, REMOTE, [dep.nbytes, [list(p) for p in places]]))
        if inline > GIVE_LIMIT:
            self._give_ahead(worker, task, ways)
        return ways

    def _give_ahead(self, worker: WorkerRecord, task: TaskRecord, ways: list[Dependency]) -> None:
        """Turn inline inputs into values at the worker, so that a row with ten thousand inputs
        is not one huge message."""
        for place, (id_, way, data) in enumerate(ways):
            if way != INLINE:
                continue
            assert isinstance(data, bytes)
            dep = self.table.tasks[id_]
            if dep.holders is None:
                dep.holders = set()
            if worker not in dep.holders:
                dep.holders.add(worker)
                worker.values.add(id_)
                worker.gives.append((id_, data))
            ways[place] = (id_, LOCAL, len(data))

    def recall(self, now: float) -> None:
        """Ask back rows that wait behind a long one while another worker has nothing."""
        idle = [w for w in self.table.workers.values() if not w.suspect and len(w.rows) < w.slots]
        if not idle or len(self.table.workers) < 2:
            return
        wanted = sum(w.slots - len(w.rows) for w in idle)
        for worker in self.table.workers.values():
            surplus = len(worker.rows) - worker.slots
            stuck = now - worker.last_done >= RECALL_AFTER_S
            if surplus > 0 and wanted > 0 and stuck and not worker.recall_sent:
                movable = [
                    id_
                    for id_, task in worker.rows.items()
                    if not is_restricted(task) or any(w.may_ever_run(task.options) for w in idle)
                ]
                ids = movable[-min(surplus, wanted) :]
                if not ids:
                    continue
                wanted -= len(ids)
                worker.recall_sent = True
                self.table.said.append((worker.number, m.Recall(ids)))

    def has_surplus(self) -> bool:
        """Whether rows might have to be recalled before long."""
        workers = self.table.workers.values()
        return len(workers) > 1 and any(len(w.rows) > w.slots for w in workers)

    def fits_any(self, task: TaskRecord) -> bool:
        return any(w.may_ever_run(task.options) for w in self.table.workers.values())

    def _may_fit(self, task: TaskRecord) -> bool:
        """Whether a worker that was cut off could run it."""
        return any(worker.may_ever_run(task.options) for _, worker in self.away)

    def why_unfit(self, task: TaskRecord) -> str:
        """What it asks for, and what there is."""
        options = task.options
        workers = self.table.workers.values()
        asked = []
        if options.resources:
            asked.append(f"resources {options.resources}")
        if options.workers:
            asked.append(f"one of the workers {', '.join(options.workers)}")
        if options.workers and not any(w.name in options.workers for w in workers):
            have = f"the workers are {', '.join(w.name for w in workers)}"
        else:
            have = "; ".join(f"{w.name} has {w.resources or 'no resources'}" for w in workers)
        return (
            f"{task.name} asks for {' on '.join(asked)}, and no worker fits: {have}. "
            "Start one with `--resources NAME=AMOUNT` or `--name`, or ask for less."
        )

    def refuse_unfit(self, now: float) -> None:
        """End the tasks that no worker could ever run of those there are, or that may come back."""
        table = self.table
        self.away = [(until, worker) for until, worker in self.away if now < until]
        for queue in list(table.restricted.values()):
            task = _first_ready(queue)
            if task is not None and not self.fits_any(task) and not self._may_fit(task):
                for unfit in list(queue):
                    if unfit.state == READY and unfit.options.must_fit:
                        table.fail(unfit, m.UNFIT, text_payload(self.why_unfit(unfit)))
        table.let_go()

    def unfit(self) -> list[str]:
        """What waits because no worker there is could ever run it, one text per kind."""
        heads = (_first_ready(queue) for queue in self.table.restricted.values())
        return [
            f"waiting until a worker fits: {self.why_unfit(task)}"
            for task in heads
            if task is not None and not self.fits_any(task)
        ]


def _first_ready(queue: deque[TaskRecord]) -> TaskRecord | None:
    """The queue's first task that is still READY, left in its place."""
    while queue:
        if queue[0].state == READY:
            return queue[0]
        queue.popleft()
    return None
