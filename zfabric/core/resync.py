"""A peer comes back to a broker that had given it up, or that is a new one with an old journal.

It says what it has (`messages.Inventory`), and the broker keeps of that what still counts:

  - A row goes on where it is if its task has not been given to anybody since: the worker's attempt
    is taken back under its own number. In all other cases the row is dropped: the task has ended,
    was released or cancelled, or is another worker's under a later number, and two attempts never
    count. An attempt that the broker has heard the end of is not taken back.
    What a dropped row occupies, such as a device, is free only when the worker tells of its end.
  - A value is a copy more of a value that is known, or the end of a task that has none yet.
  - A client is told how those tasks ended of which it has not heard.

`TaskTable.lost` remembers which attempts may be taken back.
"""

from __future__ import annotations

from zfabric import messages as m
from zfabric.core.placement import WorkerRecord
from zfabric.core.table import TaskTable
from zfabric.core.tasks import ASSIGNED, DONE, FAILED, READY, WAITING, ClientRecord, TaskRecord


def worker_came_back(table: TaskTable, worker: WorkerRecord, message: m.Inventory) -> None:
    """Keep or drop each row and value. The answer leaves at the end of the turn."""
    tasks = table.tasks
    for id_, nbytes in zip(message.values, message.sizes, strict=True):
        task = tasks.get(id_)
        if task is None or not _keep_value(table, worker, task, nbytes):
            worker.frees.append(id_)
    rows = list(zip(message.ids, message.attempts, strict=True))
    n_wanted = len(rows) - message.n_dropped
    for id_, attempt in rows[:n_wanted]:
        task = tasks.get(id_)
        if task is None or not _keep_row(table, worker, task, attempt):
            worker.drops.append(id_)
            _is_ending(worker, id_, attempt)
    for id_, attempt in rows[n_wanted:]:
        _is_ending(worker, id_, attempt)
    if message.credit:
        # What it has not told of has ended, and nobody will hear how.
        for id_, attempt in worker.former or ():
            if id_ in table.in_doubt and table.lost.get(id_, (0, 0))[0] == attempt:
                table.end_doubt(id_, "it came back without it")
        worker.former = {}
        if worker.unclear:
            worker.reserve()
    if worker.drops or worker.frees:
        table.dirty_workers[worker] = None
    worker.credit = message.credit
    table.must_place = True
    table.let_go()


def client_came_back(table: TaskTable, client: ClientRecord, message: m.Inventory) -> None:
    """Tell the ends of these tasks; others are told when they end."""
    told = set(client.ids)  # since it is back
    for id_ in message.ids:
        task = table.tasks.get(id_)
        if task is None and id_ in client.refused:
            table.say_row(client, id_, m.FULL, client.refused[id_])
        if task is None or task.owner is not client:
            continue  # its Submit is on its way behind this
        if task.state in (DONE, FAILED) and id_ not in told:
            table.tell(task)
    if message.credit:
        client.held_back = False
        if client.ids:
            table.dirty_clients[client] = None


def _keep_value(table: TaskTable, worker: WorkerRecord, task: TaskRecord, nbytes: int) -> bool:
    if task.state == DONE and task.value is None:
        assert task.holders is not None
        task.holders.add(worker)
        worker.values.add(task.id)
        return True
    if task.fn is None or task.state not in (READY, WAITING, ASSIGNED):
        return False
    other = task.worker
    if other is not None and other is not worker:
        other.drops.append(task.id)
        table.dirty_workers[other] = None
    table.later.pop(task.id, None)
    table.in_doubt.pop(task.id, None)
    table.stored(worker, task, nbytes)
    return True


def _keep_row(table: TaskTable, worker: WorkerRecord, task: TaskRecord, attempt: int) -> bool:
    lost = table.lost.get(task.id)
    if task.state not in (READY, WAITING) or lost is None or lost[1] != task.attempt:
        return False
    if attempt != lost[0] if lost[0] > 0 else attempt <= -lost[0]:
        return False
    del table.lost[task.id]
    table.later.pop(task.id, None)
    table.in_doubt.pop(task.id, None)
    table.forgive(task, attempt)
    task.attempt = attempt
    task.state = ASSIGNED
    task.worker = worker
    worker.rows[task.id] = task
    if task.options is not m.DEFAULT_OPTIONS:
        worker.occupy(task.options.resources, 1)
    if task.dependents:
        table.ahead.extend(task.dependents)
    return True


def _is_ending(worker: WorkerRecord, id_: int, attempt: int) -> None:
    """A row at a worker that is not kept: what it occupied stays so until it has ended."""
    if worker.former is None:
        if worker.resources:
            worker.unclear.add((id_, attempt))
        return
    resources = worker.former.get((id_, attempt))
    if resources and (id_, attempt) not in worker.ending:
        worker.ending[id_, attempt] = resources
        worker.occupy(resources, 1)
