"""What must hold between any two events of the scheduler, counted again from scratch.

`check` costs a walk over everything, so it runs in tests and simulators, and in a broker only
when somebody asks for it. It looks and changes nothing. What it finds is a bug of ours: an
InternalError whose story says which task or worker, in which state, beside which others.
"""

from __future__ import annotations

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
    UNFINISHED,
    WAITING,
    TaskRecord,
)
from zfabric.core.why import reasons
from zfabric.errors import InternalError


def check(scheduler: Scheduler) -> None:
    """Raise InternalError at the first thing that does not agree with the rest."""
    tasks = scheduler.tasks
    _check_counts(tasks)
    queued = {task for task in scheduler.table.ready.entries() if task.state == READY}
    if scheduler.table.ready.n < len(queued):
        raise InternalError("the ready queue counts fewer entries than are ready")
    for queue in scheduler.table.restricted.values():
        queued.update(queue)
    for key, at in scheduler.table.later.items():
        task = tasks.get(key)
        if task is None or task.state != READY:
            raise InternalError(f"task {key:x} waits for a retry though it has ended")
        if (at, key) not in scheduler.table.due:
            raise _broken("waits for a retry that nobody will make", task)
        queued.add(task)
    for key, task in tasks.items():
        if task.id != key:
            raise _broken("is filed under another id", task)
        _check_place(scheduler, task, task in queued)
        if task.state in UNFINISHED and not _explained(scheduler, task):
            raise _broken("has no reason for not having ended", task)
        _check_needed(scheduler, task)
    for number, worker in scheduler.workers.items():
        if worker.number != number:
            raise InternalError(f"worker {worker.name} is filed under {number}")
        _check_worker(scheduler, worker)
    _check_turn(scheduler)
    _check_bytes(scheduler)


def _check_bytes(scheduler: Scheduler) -> None:
    """What is counted for each client that is here is what there is of it."""
    found = dict.fromkeys(scheduler.clients.values(), 0)
    for task in scheduler.tasks.values():
        if task.owner in found:
            found[task.owner] += task.own_nbytes
    for client, nbytes in found.items():
        if client.task_nbytes != nbytes:
            text = f"{client.task_nbytes} bytes are counted of client {client.name}, not {nbytes}"
            raise InternalError(text)
        # Queues may hold on to tasks that are gone, and these to their functions.
        if client.blob_nbytes < sum(len(fn.blob) for fn in client.functions.values()):
            raise InternalError(f"some functions of client {client.name} are not counted")


def _explained(scheduler: Scheduler, task: TaskRecord) -> bool:
    """Whether there is a reason, in words, why it has not ended."""
    found = reasons(scheduler.placer, task, lambda number: 0.0)
    return bool(found) and all(code and text for code, text in found)


def check_empty(scheduler: Scheduler) -> None:
    """Raise InternalError unless everything that clients ever asked for has been let go."""
    check(scheduler)
    for task in scheduler.tasks.values():
        raise _broken("is still here though nobody holds anything", task)
    if any(task.state == READY for task in scheduler.table.ready.entries()):
        raise InternalError("a task that is not in the table is ready to run")
    for worker in scheduler.workers.values():
        if worker.rows or worker.values or any(worker.used.values()):
            raise InternalError(
                f"worker {worker.name} is still thought to hold something",
                [f"rows {list(worker.rows)}", f"values {sorted(worker.values)}"],
            )


def _check_place(scheduler: Scheduler, task: TaskRecord, queued: bool) -> None:
    """The task is where its state says, and nowhere else."""
    state, worker, holders = task.state, task.worker, task.holders
    if state == ASSIGNED:
        if worker is None:
            raise _broken("is on no worker", task)
        if scheduler.workers.get(worker.number) is not worker:
            raise _broken("is on a worker that left", task)
        if worker.rows.get(task.id) is not task:
            raise _broken("is not among its worker's rows", task)
        if task.attempt < 1:
            raise _broken("runs as no attempt", task)
    elif worker is not None:
        raise _broken("is on a worker though its state says no", task)
    if state in UNFINISHED:
        if holders or task.value is not None:
            raise _broken("has no value yet but holders or bytes of it", task)
        if task.fn is None:
            raise _broken("is data but has no value", task)
        _check_inputs(task, queued, task.id in scheduler.table.in_doubt)
    elif state == DONE:
        if task.value is None and not holders and not scheduler.settling:
            raise _broken("has no value anywhere", task)
        if task.value is not None and task.nbytes != len(task.value):
            raise _broken("has another size than its value", task)
    else:
        if holders:
            raise _broken("has holders though it has no value", task)
        if task.dependents:
            raise _broken("is waited for in vain", task, task.dependents)
        if state == RELEASED and (task.value is not None or task.fn is None):
            raise _broken("is released but has a value, or cannot be made again", task)
    for holder in holders or ():
        if scheduler.workers.get(holder.number) is not holder:
            raise _broken("is held by a worker that left", task)
        if task.id not in holder.values:
            raise _broken(f"is not among the values of {holder.name}", task)


def _check_inputs(task: TaskRecord, queued: bool, in_doubt: bool) -> None:
    """An unfinished task's inputs are there, or somebody makes them."""
    missing = [dep for dep in task.deps if dep.state != DONE]
    if task.state == WAITING:
        if not task.n_waiting == len(missing) + in_doubt > 0:
            raise _broken(f"counts {task.n_waiting} missing inputs", task, missing)
    elif task.state == READY:
        if missing:
            raise _broken("is ready without its inputs", task, missing)
        if not queued:
            raise _broken("is ready but in no queue", task)
    for dep in missing:
        if dep.state not in UNFINISHED:
            raise _broken("waits for what nobody will make", task, [dep])


def _check_needed(scheduler: Scheduler, task: TaskRecord) -> None:
    """Somebody needs the task, and what is kept of it is what they need."""
    if task.wanted:
        if scheduler.clients.get(task.owner.number) is not task.owner:
            raise _broken("is wanted by a client that left", task)
        if task.state == RELEASED:
            raise _broken("is wanted but was let go", task)
    elif not task.dependents:
        if task.lineage < 1:
            raise _broken("is kept though nobody needs it", task)
        kept_whole = not task.can_repeat or task.value is not None
        if task.state not in (RELEASED, FAILED) and not (task.state == DONE and kept_whole):
            raise _broken("is needed only as a recipe but kept as a value", task)


def _check_counts(tasks: dict[int, TaskRecord]) -> None:
    """Who needs whom, counted from the side of those who need."""
    lineage: dict[TaskRecord, int] = {}
    dependents: dict[TaskRecord, set[TaskRecord]] = {}
    for task in tasks.values():
        deps = task.deps
        if not deps:
            continue
        unfinished = task.state in UNFINISHED
        for dep in deps:
            if tasks.get(dep.id) is not dep:
                raise _broken("takes an input that is not in the table", task, [dep])
            if unfinished:
                dependents.setdefault(dep, set()).add(task)
            else:
                lineage[dep] = lineage.get(dep, 0) + 1
        if len(deps) > 1 and len(set(deps)) != len(deps):
            raise _broken("counts an input twice", task)
    nobody: set[TaskRecord] = set()
    for task in tasks.values():
        needing = dependents.get(task, nobody)
        if (task.dependents or needing) and (task.dependents or {}).keys() != needing:
            raise _broken("is needed by others than it knows", task, needing)
        if task.lineage != lineage.get(task, 0):
            raise _broken(f"counts {task.lineage} heirs, has {lineage.get(task, 0)}", task)


def _check_worker(scheduler: Scheduler, worker: WorkerRecord) -> None:
    """A worker's rows, values, credit and resources agree with its tasks."""
    used: dict[str, float] = {}
    for key, row in worker.rows.items():
        if scheduler.tasks.get(key) is not row:
            raise _broken(f"is a row of {worker.name} only", row)
        if row.state != ASSIGNED or row.worker is not worker:
            raise _broken(f"is a row of {worker.name} as well", row)
        for name, amount in row.options.resources.items():
            used[name] = used.get(name, 0.0) + amount
    for resources in (*worker.ending.values(), worker.reserved):
        for name, amount in resources.items():
            used[name] = used.get(name, 0.0) + amount
    for key in worker.values:
        task = scheduler.tasks.get(key)
        if task is None or worker not in (task.holders or ()):
            raise InternalError(f"worker {worker.name} holds value {key:x}, which nobody knows")
    for name, amount in worker.used.items():
        if round(used.get(name, 0.0) * 1_000_000) != amount:
            raise InternalError(
                f"worker {worker.name} counts {amount} millionths of {name}, uses {used.get(name)}"
            )
    for name, amount in used.items():
        if amount > worker.resources.get(name, 0) + 1e-6:
            raise InternalError(f"worker {worker.name} is overbooked: {amount} {name}")
    if worker.credit < 0:
        raise InternalError(f"worker {worker.name} has a credit of {worker.credit}")


def _check_turn(scheduler: Scheduler) -> None:
    """Nothing is left to be let go; what is to be said stands with peers that are here."""
    if scheduler.table.unneeded:
        raise InternalError("unneeded tasks were not let go", _stories(scheduler.table.unneeded))
    for worker in scheduler.workers.values():
        says = worker.ids or worker.drops or worker.frees or worker.gives
        if says and worker not in scheduler.table.dirty_workers:
            raise InternalError(f"what worker {worker.name} is to hear would never be said")
    for client in scheduler.clients.values():
        tells = bool(client.ids) and not (client.held_back or client.is_full)
        if tells and client not in scheduler.table.dirty_clients:
            raise InternalError(f"what client {client.name} is to hear would never be said")
    for key in scheduler.table.strikes:
        if key not in scheduler.tasks:
            raise InternalError(f"strikes are counted of value {key:x}, which is gone")


def _broken(text: str, task: TaskRecord, others: Iterable[TaskRecord] = ()) -> InternalError:
    story = [task.story(), _counts(task), *_stories(task.deps), *_stories(others)]
    return InternalError(f"task {task.name} ({STATE_NAMES[task.state]}) {text}", story)


def _counts(task: TaskRecord) -> str:
    return (
        f"wanted {task.wanted}, dependents {len(task.dependents or ())}, lineage {task.lineage}, "
        f"inputs {len(task.deps)}, waiting for {task.n_waiting}, "
        f"history {task.history or 'empty'}"
    )


def _stories(tasks: Iterable[TaskRecord]) -> list[str]:
    return sorted({task.story() for task in tasks})
