"""Why a task has not ended: in words for people, and never without any.

Each state of the table has its reasons (`core.tasks` draws the states):

    WAITING    which inputs are missing, and why the first of those is
    READY      no worker is there, none fits, or those that would are full
    ASSIGNED   the worker has it; only that one can say more (`core.explain`)

A reason is a (code, text) pair: the code for programs, the text for people. This only looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from zfabric.core.placement import WorkerRecord
from zfabric.core.placer import Placer
from zfabric.core.table import is_restricted
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
from zfabric.ids import try_of

Reason = tuple[str, str]

INPUTS_NAMED = 8
"""Missing inputs that a reason names; it counts the others."""

WORKERS_NAMED = 4

Silence = Callable[[int], float]
"""Seconds since the worker of that number was heard."""


def reasons(placer: Placer, task: TaskRecord, silent_s: Silence) -> list[Reason]:
    """Why this task has not ended, the nearest cause first; at least one."""
    state = task.state
    if state == WAITING and task.id in placer.table.in_doubt:
        text = placer.table.in_doubt[task.id][1]
        return [("doubt", f"{text}. It may have run, and must not run twice: it waits for it")]
    if state == WAITING:
        return _missing_inputs(placer, task, silent_s)
    if state == READY and task.id in placer.table.later:
        tries = len(task.history or ())
        return [("retry", f"it has failed {tries} times; it waits a little before the next try")]
    if state == READY and placer.settling:
        return [("settling", "settling: waiting for workers that were there before the restart")]
    if state == READY:
        return [_not_placed(placer, task)]
    if state == ASSIGNED:
        return [_with_worker(task, silent_s)]
    return [("ended", f"it has {_ENDED[state]}")]


_ENDED = {DONE: "finished", FAILED: "failed", RELEASED: "finished, and nobody wants its value"}


def _missing_inputs(placer: Placer, task: TaskRecord, silent_s: Silence) -> list[Reason]:
    missing = [dep for dep in task.deps if dep.state != DONE]
    named = ", ".join(f"{dep.name} ({STATE_NAMES[dep.state]})" for dep in missing[:INPUTS_NAMED])
    more = f" and {len(missing) - INPUTS_NAMED} more" if len(missing) > INPUTS_NAMED else ""
    found: list[Reason] = [
        ("inputs", f"waits for {len(missing)} of {len(task.deps)} inputs: {named}{more}")
    ]
    root = _root(task)
    if root is not task:
        found += [(code, f"{root.name}: {text}") for code, text in reasons(placer, root, silent_s)]
    return found


def _root(task: TaskRecord) -> TaskRecord:
    """Where the chain of missing inputs begins: a task that waits for no other. Inputs are older
    than what takes them, so the walk ends."""
    while task.state == WAITING:
        missing = next((dep for dep in task.deps if dep.state != DONE), None)
        if missing is None:
            break
        task = missing
    return task


def _with_worker(task: TaskRecord, silent_s: Silence) -> Reason:
    worker = task.worker
    assert worker is not None
    where = f"on worker {worker.name} as attempt {try_of(task.attempt)}"
    if worker.suspect:
        silent = silent_s(worker.number)
        return "suspect", f"{where}, which has been silent for {silent:.1f} s: perhaps it is lost"
    return "assigned", where


def _not_placed(placer: Placer, task: TaskRecord) -> Reason:
    workers = list(placer.table.workers.values())
    if not workers:
        return "no workers", "no worker is connected; start one with `zfabric worker`"
    fitting = [w for w in workers if w.may_ever_run(task.options)]
    if not fitting:
        return "no fit", placer.why_unfit(task)
    heard = [w for w in fitting if not w.suspect]
    if not heard:
        return "suspect", f"each worker that could run it is silent: {_names(fitting)}"
    free = [w for w in heard if w.free > 0]
    if not free:
        held = sum(len(w.rows) for w in heard)
        slots = sum(w.slots for w in heard)
        ahead = max(0, placer.table.ready.n - 1)
        return (
            "saturated",
            f"the {slots} slots that could run it are busy, with {held} rows in line at "
            f"{_names(heard)}; about {ahead} other tasks are ready as well",
        )
    if is_restricted(task) and task.options.resources:
        in_use = "; ".join(_in_use(w, task.options.resources) for w in free[:WORKERS_NAMED])
        return "resources", f"what it asks for is in use: {in_use}"
    return "placing", "it is about to be given to a worker"


def _in_use(worker: WorkerRecord, asked: Iterable[str]) -> str:
    amounts = ", ".join(
        f"{worker.used.get(name, 0) / 1e6:g} of {worker.resources.get(name, 0):g} {name}"
        for name in asked
    )
    return f"{worker.name} uses {amounts}"


def _names(workers: list[WorkerRecord]) -> str:
    names = ", ".join(w.name for w in workers[:WORKERS_NAMED])
    more = len(workers) - WORKERS_NAMED
    return f"{names} and {more} more" if more > 0 else names
