"""A picture of a broker's state, as plain values: for a report, a file, a reader of both.

It holds ids, names, states and reasons; no arguments and no values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from zfabric.core.tasks import STATE_NAMES, UNFINISHED, TaskRecord
from zfabric.core.why import Silence, reasons

if TYPE_CHECKING:
    from zfabric.core.scheduler import Scheduler

MOST_TASKS = 1000
"""Unfinished tasks in a picture; it counts the others."""

MOST_IDS = 100
"""Ids per list."""


def picture(scheduler: Scheduler, silent_s: Silence) -> dict[str, Any]:
    """Workers, counts by state, and the unfinished tasks with their reasons, oldest first."""
    unfinished = [task for task in scheduler.tasks.values() if task.state in UNFINISHED]
    return {
        **scheduler.info(),
        "unfinished": len(unfinished),
        "unfinished_tasks": [_task(scheduler, task, silent_s) for task in unfinished[:MOST_TASKS]],
        "rows": {
            worker.name: [f"{id_:x}" for id_ in list(worker.rows)[:MOST_IDS]]
            for worker in scheduler.workers.values()
        },
    }


def _task(scheduler: Scheduler, task: TaskRecord, silent_s: Silence) -> dict[str, Any]:
    return {
        "id": f"{task.id:x}",
        "key": task.name,
        "owner": task.owner.name,
        "state": STATE_NAMES[task.state],
        "attempt": task.attempt,
        "worker": task.worker.name if task.worker else "",
        "inputs": _names(task.deps),
        "reasons": [text for _, text in reasons(scheduler.placer, task, silent_s)],
        "history": [one.text for one in task.history or ()],
    }


def _names(tasks: Iterable[TaskRecord]) -> list[str]:
    return [f"{task.name} ({STATE_NAMES[task.state]})" for task in tasks][:MOST_IDS]
