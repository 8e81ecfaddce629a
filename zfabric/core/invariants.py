"""What must hold between any two events of the scheduler, counted again from scratch.

`check` costs a walk over everything, so it runs in tests and simulators, and in a broker only
when somebody asks for it. It looks and changes nothing. What it finds is a bug of ours: an
InternalError whose story says which task or worker, in which state, beside which others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from zfabric.core.placement import WorkerRecord
from zfabric.core.scheduler import Scheduler
from zfabric.core.tasks import (
    ASSIGNED,
    DONE,
    FAILED,
    READY,
    RELEASED,
    STATE_NAMES,
    WAITING,
    TaskRecord,
)
from zfabric.errors import InternalError

UNFINISHED = frozenset((WAITING, READY, ASSIGNED))


def check(scheduler: Scheduler) -> None:
    """Raise InternalError at the first thing that does not agree with the rest."""
    tasks = scheduler.tasks
    _check_counts(tasks)
    queued = set(map(id, scheduler.ready.entries()))
    if scheduler.ready.n < sum(1 for t in scheduler.ready.entries() if t.state == READY):
        raise InternalError("the ready queue counts fewer entries than are ready")
    for queue in scheduler.restricted.values():
        queued.update(map(id, queue))
    for key, task in tasks.items():
        _must(task.id == key, "is filed under another id", task)
        _check_place(scheduler, task, id(task) in queued)
        _check_needed(scheduler, task)
    for number, worker in scheduler.workers.items():
        if worker.number != number:
            raise InternalError(f"worker {worker.name} is filed under {number}")
        _check_worker(scheduler, worker)
    _check_turn(scheduler)


def check_empty(scheduler: Scheduler) -> None:
    """Raise InternalError unless everything that clients ever asked for has been let go."""
    check(scheduler)
    for task in scheduler.tasks.values():
        _must(False, "is still here though nobody holds anything", task)
    if any(task.state == READY for task in scheduler.ready.entries()):
        raise InternalError("a task that is not in the table is ready to run")
    for worker in scheduler.workers.values():
        if worker.rows or worker.values or any(worker.used.values()):
            raise InternalError(
                f"worker {worker.name} is still thought to hold something",
                [f"rows {list(worker.rows)}", f"values {sorted(worker.values)}"],
            )


def _check_place(scheduler: Scheduler, task: TaskRecord, queued: bool) -> None:
    """The task is where its state says, and nowhere else."""
    state, worker = task.state, task.worker
    if state == ASSIGNED:
        _must(worker is not None, "is on no worker", task)
        assert worker is not None
        _must(scheduler.workers.get(worker.number) is worker, "is on a worker that left", task)
        _must(worker.rows.get(task.id) is task, "is not among its worker's rows", task)
        _must(task.attempt > 0, "runs as no attempt", task)
    else:
        _must(worker is None, "is on a worker though its state says no", task)
    if state in UNFINISHED:
        _must(not task.holders, "has no value yet but holders of it", task)
        _must(task.value is None, "has no value yet but bytes of it", task)
        _must(task.fn is not None, "is data but has no value", task)
        missing = [dep for dep in task.deps if dep.state != DONE]
        if state == WAITING:
            agrees = task.n_waiting == len(missing) > 0
            _must(agrees, f"counts {task.n_waiting} missing inputs", task, missing)
        elif state == READY:
            _must(not missing, "is ready without its inputs", task, missing)
            _must(queued, "is ready but in no queue", task)
        for dep in missing:
            _must(dep.state in UNFINISHED, "waits for what nobody will make", task, [dep])
    elif state == DONE:
        _must(task.value is not None or bool(task.holders), "has no value anywhere", task)
        if task.value is not None:
            _must(task.nbytes == len(task.value), "has another size than its value", task)
    else:
        _must(not task.holders, "has holders though it has no value", task)
        _must(not task.dependents, "is waited for in vain", task, task.dependents or ())
        if state == RELEASED:
            _must(task.value is None, "is released but has a value", task)
            _must(task.fn is not None, "is released and cannot be made again", task)
    for holder in task.holders or ():
        _must(scheduler.workers.get(holder.number) is holder, "is held by a worker that left", task)
        _must(task.id in holder.values, f"is not among the values of {holder.name}", task)


def _check_needed(scheduler: Scheduler, task: TaskRecord) -> None:
    """Somebody needs the task, and what is kept of it is what they need."""
    if task.wanted:
        owner = scheduler.clients.get(task.owner.number)
        _must(owner is task.owner, "is wanted by a client that left", task)
        _must(task.state != RELEASED, "is wanted but was let go", task)
        return
    if task.dependents:
        return
    _must(task.lineage > 0, "is kept though nobody needs it", task)
    kept_whole = task.fn is None or task.value is not None
    right = task.state in (RELEASED, FAILED) or (task.state == DONE and kept_whole)
    _must(right, "is needed only as a recipe but kept as a value", task)


def _check_counts(tasks: dict[int, TaskRecord]) -> None:
    """Who needs whom, counted from the side of those who need."""
    lineage: Counter[int] = Counter()
    dependents: dict[int, set[TaskRecord]] = {}
    for task in tasks.values():
        for dep in task.deps:
            _must(tasks.get(dep.id) is dep, "takes an input that is not in the table", task, [dep])
            if task.state in UNFINISHED:
                dependents.setdefault(dep.id, set()).add(task)
            else:
                lineage[dep.id] += 1
        _must(len(set(task.deps)) == len(task.deps), "counts an input twice", task)
    nobody: set[TaskRecord] = set()
    for key, task in tasks.items():
        needing = dependents.get(key, nobody)
        has = task.dependents.keys() if task.dependents else nobody
        _must(has == needing, "is needed by others than it knows", task, needing ^ set(has))
        counted = lineage[key]
        _must(task.lineage == counted, f"counts {task.lineage} heirs, has {counted}", task)


def _check_worker(scheduler: Scheduler, worker: WorkerRecord) -> None:
    """A worker's rows, values, credit and resources agree with its tasks."""
    used: Counter[str] = Counter()
    for key, row in worker.rows.items():
        _must(scheduler.tasks.get(key) is row, f"is a row of {worker.name} only", row)
        _must(row.state == ASSIGNED and row.worker is worker, f"is a row of {worker.name}", row)
        used.update(row.options.resources)
    for key in worker.values:
        task = scheduler.tasks.get(key)
        if task is None or worker not in (task.holders or ()):
            raise InternalError(f"worker {worker.name} holds value {key:x}, which nobody knows")
    for name, amount in worker.used.items():
        if abs(used[name] - amount) > 1e-6:
            raise InternalError(f"worker {worker.name} counts {amount} {name}, uses {used[name]}")
    for name, amount in used.items():
        if amount > worker.resources.get(name, 0) + 1e-6:
            raise InternalError(f"worker {worker.name} is overbooked: {amount} {name}")
    if worker.credit < 0:
        raise InternalError(f"worker {worker.name} has a credit of {worker.credit}")


def _check_turn(scheduler: Scheduler) -> None:
    """Nothing is left to be let go; what is to be said stands with peers that are here."""
    if scheduler._unneeded:
        raise InternalError("unneeded tasks were not let go", _stories(scheduler._unneeded))
    for worker in scheduler.workers.values():
        says = worker.ids or worker.drops or worker.frees or worker.gives
        if says and worker not in scheduler._dirty_workers:
            raise InternalError(f"what worker {worker.name} is to hear would never be said")
    for client in scheduler.clients.values():
        if client.ids and client not in scheduler._dirty_clients:
            raise InternalError(f"what client {client.name} is to hear would never be said")
    for key in scheduler._strikes:
        if key not in scheduler.tasks:
            raise InternalError(f"strikes are counted of value {key:x}, which is gone")


def _must(holds: bool, text: str, task: TaskRecord, others: Iterable[TaskRecord] = ()) -> None:
    if not holds:
        story = [task.story(), _counts(task), *_stories(task.deps), *_stories(others)]
        raise InternalError(f"task {task.name} ({STATE_NAMES[task.state]}) {text}", story)


def _counts(task: TaskRecord) -> str:
    return (
        f"wanted {task.wanted}, dependents {len(task.dependents or ())}, lineage {task.lineage}, "
        f"inputs {len(task.deps)}, waiting for {task.n_waiting}, "
        f"history {task.history or 'empty'}"
    )


def _stories(tasks: Iterable[TaskRecord]) -> list[str]:
    return sorted({task.story() for task in tasks})
