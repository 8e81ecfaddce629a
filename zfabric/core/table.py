"""The broker's table of tasks, and every change of a task's state.

`core.tasks` draws the states; here are the ways between them. Whoever needs a value is counted:
its client (`wanted`), unfinished tasks that take it (`dependents`), and results that would need
it to be made again (`lineage`). One function, `let_go`, drops what nobody needs; it is called at
the end of each event that may have left something unneeded.

What is to be told to peers collects in their records, and in `said` where its order matters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush
from operator import attrgetter
from typing import Any

from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core import placement, retry
from zfabric.core.outbound import Outgoing
from zfabric.core.outcomes import killed_payload, read_text, stored_payload, text_payload
from zfabric.core.placement import WorkerRecord
from zfabric.core.ready import ReadyQueue
from zfabric.core.tasks import (
    ASSIGNED,
    DONE,
    FAILED,
    NOT_LOST,
    READY,
    RELEASED,
    UNFINISHED,
    WAITING,
    ClientRecord,
    TaskRecord,
    Try,
)
from zfabric.messages import DIED, ERROR, STORED, VALUE

MAX_STRIKES = 3
"""Failed fetches of a value until its copies are taken for unreachable and it is made again."""


class TaskTable:
    """Tasks, clients and workers, and what this turn has left to say."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tasks: dict[int, TaskRecord] = {}
        self.clients: dict[int, ClientRecord] = {}
        self.workers: dict[int, WorkerRecord] = {}
        self.ready = ReadyQueue()
        self.restricted: dict[Any, deque[TaskRecord]] = {}
        """READY tasks that only some workers may run, by (-priority, what they ask for)."""
        self.n_done = 0
        self.n_failed = 0
        self.n_stale = 0
        self.n_submitted = 0
        self.ahead: deque[TaskRecord] = deque()
        """WAITING tasks that the successor rule may place now."""
        self.unneeded: list[TaskRecord] = []
        """Tasks that perhaps nobody needs any more; let_go() finds out."""
        self.dirty_clients: dict[ClientRecord, None] = {}
        self.dirty_workers: dict[WorkerRecord, None] = {}
        self.said: list[Outgoing] = []
        self.strikes: dict[int, int] = {}
        self.lost: dict[int, tuple[int, int]] = {}
        """For unfinished tasks whose worker was lost: its attempt, and the task's number then. If
        the task still has that number, nobody has been given it since; see core.resync. After a
        restart there is -n in place of the attempt: any may be had but those up to n, which are
        known to have ended."""
        self.least_attempt = 0
        """Attempts that began under this broker have numbers above this."""
        self.later: dict[int, float] = {}
        """READY tasks that failed and wait for their next try, by id: until when. They are in no
        queue."""
        self.in_doubt: dict[int, tuple[float, str]] = {}
        """Tasks that may run once at most, and whose worker may only be cut off: until when they
        wait for it, and what happened to it. They are WAITING, with one in `n_waiting` for this."""
        self.due: list[tuple[float, int]] = []
        """A heap of the same; entries that `later` does not confirm mean nothing."""
        self.failed: list[TaskRecord] | None = None
        """Where a journal is written: tasks that ended without a value, for it to take."""
        self.tried: list[tuple[int, Try]] = []
        """The same: ends of attempts that gave no value, with their tasks; NOT_LOST takes the last
        one back."""
        self.begun: list[int] = []
        """The same: tasks that may not run twice and were sent to a worker."""
        self.must_place = False
        """Something may be placed that could not be before."""

    def link(self, task: TaskRecord, dep_ids: Iterable[int]) -> None:
        """Count a new task's inputs."""
        deps = []
        for id_ in dep_ids:
            dep = self.tasks.get(id_)
            if dep is None or dep is task:
                text = f"{task.name} takes a value that the broker does not know; was it released?"
                task.fn = None  # a retry would miss the value as well
                self.fail(task, m.LOST, text_payload(text))
                return
            deps.append(dep)
        task.deps = tuple(dict.fromkeys(deps)) if len(set(dep_ids)) != len(deps) else tuple(deps)
        self.need_inputs(task)

    def need_inputs(self, task: TaskRecord) -> None:
        """Ask for each input; make the task WAITING or READY, or fail it with a failed one."""
        n_waiting = 0
        failed = None
        for dep in task.deps:
            if dep.dependents is None:
                dep.dependents = {}
            dep.dependents[task] = None
            if dep.state == FAILED:
                failed = dep
            elif dep.state != DONE:
                n_waiting += 1
        task.n_waiting = n_waiting
        task.worker = None
        task.state = WAITING
        if failed is not None:
            self.fail(task, failed.status, failed.value or b"")
            return
        for dep in task.deps:
            if dep.state == RELEASED:
                self.make_again(dep)
        if task.state != WAITING:
            return
        if task.n_waiting:
            self.ahead.append(task)
        else:
            self.make_ready(task)

    def make_again(self, task: TaskRecord) -> None:
        """A RELEASED, FAILED or lost task runs again: it needs its inputs again."""
        task.state = WAITING
        stack = [task]
        while stack:
            again = stack.pop()
            if again.state != WAITING:
                continue  # failed meanwhile, with an input of its own
            again.set_value(None)
            again.nbytes = 0
            again.worker = None
            again.attempt = max(again.attempt, self.least_attempt)
            if self.lost:
                self.lost.pop(again.id, None)
            again.n_waiting = 0
            failed = None
            for dep in again.deps:
                dep.lineage -= 1
                if dep.dependents is None:
                    dep.dependents = {}
                dep.dependents[again] = None
                if dep.state == FAILED:
                    failed = dep
                elif dep.state != DONE:
                    again.n_waiting += 1
                    if dep.state == RELEASED:
                        # WAITING from now on, so that no other path takes it up as well.
                        dep.state = WAITING
                        stack.append(dep)
            if failed is not None:
                self.fail(again, failed.status, failed.value or b"")
            elif again.n_waiting == 0:
                self.make_ready(again)
        self.must_place = True

    def make_ready(self, task: TaskRecord, front: bool = False) -> None:
        task.state = READY
        self.must_place = True
        if self.later:
            self.later.pop(task.id, None)
        if task.options is not m.DEFAULT_OPTIONS and is_restricted(task):
            key = (-task.options.priority, placement.signature(task.options))
            queue = self.restricted.setdefault(key, deque())
            if front:
                queue.appendleft(task)
            else:
                queue.append(task)
        elif front:
            self.ready.push_front(task)
        elif task.deps:
            self.ready.push_hot(task)
        else:
            self.ready.push(task)

    def wake(self, task: TaskRecord) -> None:
        """A value is there: whoever waited only for it can run."""
        assert task.dependents is not None
        for dependent in task.dependents:
            if dependent.state == WAITING:
                dependent.n_waiting -= 1
                if dependent.n_waiting == 0:
                    self.make_ready(dependent)
                else:
                    self.ahead.append(dependent)

    def stored(self, worker: WorkerRecord, task: TaskRecord, nbytes: int) -> None:
        """A task's value is in its worker's store."""
        self.leave_worker(task)
        if self.later:
            self.later.pop(task.id, None)
        task.state = DONE
        task.status = STORED
        task.nbytes = nbytes
        task.holders = {worker}
        worker.values.add(task.id)
        if task.wanted:
            self.tell(task)
        self.drop_inputs(task, keep_recipe=True)
        if task.dependents:
            self.wake(task)
        elif not task.wanted:
            self.unneeded.append(task)

    def raised(
        self, worker: WorkerRecord, task: TaskRecord, status: int, payload: bytes, now: float
    ) -> None:
        """An attempt failed: the task raised, or was killed by one of its limits."""
        what = "raised" if status == ERROR else read_text(payload)
        self.blame(task, status, f"on {worker.name}: {what}")
        n_failed = sum(one.how in retry.FAILURES for one in task.history or ())
        if n_failed <= task.options.retries and retry.is_wanted(task.options, status, payload):
            self.requeue(task, now + retry.pause_s(n_failed, task.id, self.settings))
        else:
            self.ended(task, status, payload)

    def died(self, worker: WorkerRecord, task: TaskRecord, text: str) -> None:
        self.blame(task, DIED, f"on {worker.name}: {text}")
        if not task.options.idempotent:
            self.ended(task, m.UNKNOWN, unknown(task, text))
        elif count(task, DIED) >= self.settings.max_deaths:
            self.ended(task, m.KILLED, killed(task, "killed its process"))
        else:
            self.requeue(task)

    def ended(self, task: TaskRecord, status: int, payload: bytes) -> None:
        """An attempt ended by itself, and with it the task."""
        self.leave_worker(task)
        task.state = WAITING  # on no worker, so that none is told to drop it
        self.fail(task, status, payload)

    def blame(self, task: TaskRecord, how: int, text: str) -> None:
        """An attempt ended in that way, and gave no value."""
        one = Try(how, text, task.attempt)
        if task.history is None:
            task.history = []
        task.history.append(one)
        if self.failed is not None:
            self.tried.append((task.id, one))

    def forgive(self, task: TaskRecord, attempt: int) -> None:
        """If that attempt, its last one, was said to be lost with its worker: it was not."""
        last = task.history[-1] if task.history else None
        if last is not None and last.how == m.LOST and last.attempt == attempt:
            assert task.history is not None
            task.history.pop()
            if self.failed is not None:
                self.tried.append((task.id, Try(NOT_LOST, "", task.attempt)))

    def requeue(self, task: TaskRecord, at: float = 0.0) -> None:
        """An assigned task is the broker's again; its attempt is over.

        at: when it may run again.

        Successors that went to the same worker ahead of it come back by themselves: the worker
        returns what waits for a row that ended without a value.
        """
        self.leave_worker(task)
        task.attempt = max(task.attempt, self.least_attempt)
        task.n_waiting = sum(dep.state != DONE for dep in task.deps)
        if task.n_waiting:
            task.state = WAITING
            self.ahead.append(task)
        elif at:
            task.state = READY
            self.later[task.id] = at
            heappush(self.due, (at, task.id))
        else:
            self.make_ready(task, front=True)

    def doubt(self, task: TaskRecord, until: float, text: str) -> None:
        """An assigned task that may run once at most: its worker is gone, and may come back with
        it."""
        self.leave_worker(task)
        task.attempt = max(task.attempt, self.least_attempt)
        task.state = WAITING
        task.n_waiting = 1 + sum(dep.state != DONE for dep in task.deps)
        self.in_doubt[task.id] = until, text

    def end_doubts(self, now: float) -> None:
        """Workers that have not come back in time will not."""
        for id_, (until, _) in list(self.in_doubt.items()):
            if until <= now and id_ in self.in_doubt:  # not taken along by another's end
                self.end_doubt(id_)

    def end_doubt(self, id_: int, why: str = "") -> None:
        """Nobody will tell what became of that task."""
        task, text = self.tasks[id_], self.in_doubt[id_][1]
        self.fail(task, m.UNKNOWN, unknown(task, text, why))

    def pause_retries(self, now: float) -> None:
        """After a restart: tasks that failed and are to be tried again wait for that, as they did;
        how much of their pause was over before is not known."""
        paused = set()
        for task in self.tasks.values():
            if task.state == READY and task.history and task.history[-1].how in retry.FAILURES:
                n_failed = sum(one.how in retry.FAILURES for one in task.history)
                at = now + retry.pause_s(n_failed, task.id, self.settings)
                self.later[task.id] = at
                heappush(self.due, (at, task.id))
                paused.add(task)
        if paused:
            self.ready.take_out(paused)
            for key, queue in list(self.restricted.items()):
                self.restricted[key] = deque(task for task in queue if task not in paused)

    def wake_due(self, now: float) -> None:
        """Tasks that waited for their next try are ready."""
        due, later = self.due, self.later
        while due and due[0][0] <= now:
            at, id_ = heappop(due)
            if later.get(id_) == at:
                task = self.tasks[id_]
                if task.state == READY:
                    self.make_ready(task, front=True)
                else:
                    del later[id_]

    def leave_worker(self, task: TaskRecord) -> None:
        worker = task.worker
        if worker is not None:
            worker.rows.pop(task.id, None)
            self.must_place = True
            worker.occupy(task.options.resources, -1)
            task.worker = None

    def abandon(self, task: TaskRecord) -> None:
        """An assigned task is not wanted any more: its worker is to end it. What it occupies is
        only free when it has ended: two tasks must not share a device because one is dying."""
        worker = task.worker
        assert worker is not None
        resources = task.options.resources
        if resources:
            worker.ending[task.id, task.attempt] = resources
            worker.occupy(resources, 1)
        self.leave_worker(task)
        worker.drops.append(task.id)
        self.dirty_workers[worker] = None

    def really_ended(self, worker: WorkerRecord, id_: int, attempt: int) -> None:
        """A worker tells of the end of an attempt that it was told to drop."""
        resources = worker.ending.pop((id_, attempt), None)
        if resources is not None:
            worker.occupy(resources, -1)
            self.must_place = True
        elif (id_, attempt) in worker.unclear:
            worker.unclear.remove((id_, attempt))
            if not worker.unclear:
                worker.occupy(worker.reserved, -1)
                worker.reserved = {}
                self.must_place = True

    def fail(self, task: TaskRecord, status: int, payload: bytes) -> None:
        """A task ends without a value, and with it every task that waits for it."""
        stack = [task]
        while stack:
            failed = stack.pop()
            if failed.state == FAILED:
                continue
            if failed.state == ASSIGNED:
                self.abandon(failed)
            if self.later:
                self.later.pop(failed.id, None)
            if self.in_doubt:
                self.in_doubt.pop(failed.id, None)
            failed.state = FAILED
            failed.status = status
            failed.set_value(payload)
            self.n_failed += 1
            if self.failed is not None:
                self.failed.append(failed)
            if failed.wanted:
                self.tell(failed)
            else:
                self.unneeded.append(failed)
            self.drop_inputs(failed, keep_recipe=True)
            if failed.dependents:
                stack.extend(reversed(failed.dependents))
                failed.dependents = None

    def value_lost(self, task: TaskRecord, text: str) -> None:
        """The last copy of a stored value is gone."""
        self.strikes.pop(task.id, None)
        task.holders = None
        needed = task.wanted or bool(task.dependents)
        if not task.can_repeat:
            if needed or task.lineage:
                task.state = RELEASED
                for dep in task.deps:
                    dep.lineage -= 1  # counted when the value was stored; fail() counts it again
                what = "scattered data" if task.fn is None else "its value, not to be made again,"
                self.fail(task, m.LOST, text_payload(f"{what} is gone: {text}"))
            else:
                self.unneeded.append(task)
            return
        if not needed:
            task.state = RELEASED
            self.unneeded.append(task)
            return
        for dependent in task.dependents or ():
            if dependent.state == WAITING:
                dependent.n_waiting += 1
            elif dependent.state == READY:
                dependent.state = WAITING
                dependent.n_waiting = 1
                self.later.pop(dependent.id, None)
        self.make_again(task)

    def strike(self, task: TaskRecord, who: str) -> None:
        """Somebody could not fetch a stored value. Once may be chance; in the end its copies are
        taken for unreachable."""
        if task.state != DONE or task.value is not None:
            return
        if not task.can_repeat and task.holders:
            return  # what cannot be made again is lost only with its last holder
        strikes = self.strikes[task.id] = self.strikes.get(task.id, 0) + 1
        if strikes >= MAX_STRIKES or not task.holders:
            self.free_copies(task)
            self.value_lost(task, f"{who} could not fetch it from anywhere")

    def drop_inputs(self, task: TaskRecord, keep_recipe: bool) -> None:
        """A task has its outcome and needs its inputs no more, but perhaps their recipes: a
        stored value can be lost and a failed task tried again."""
        for dep in task.deps:
            dependents = dep.dependents
            if dependents is not None:
                dependents.pop(task, None)
            if keep_recipe:
                dep.lineage += 1
            if not dependents and not dep.wanted:
                self.unneeded.append(dep)
        if not keep_recipe:
            task.deps = ()

    def let_go(self) -> None:
        """Delete what nobody wants, waits for, or would be made again from."""
        unneeded = self.unneeded
        tasks = self.tasks
        while unneeded:
            task = unneeded.pop()
            if task.wanted or task.dependents or tasks.get(task.id) is not task:
                continue
            state = task.state
            if state == DONE and task.lineage and (not task.can_repeat or task.value is not None):
                continue  # small, or not to be made again: the value itself is the recipe
            self.free_copies(task)
            if state == DONE:
                task.state = RELEASED
            elif state == ASSIGNED:
                self.abandon(task)
            if state in UNFINISHED:
                self.in_doubt.pop(task.id, None)
                self.later.pop(task.id, None)
                # Its inputs count it as a dependent until now, and by lineage from now on.
                task.state = RELEASED
                self.drop_inputs(task, keep_recipe=True)
            if task.lineage:
                continue
            for dep in task.deps:
                dep.lineage -= 1
                if not dep.wanted and not dep.dependents:
                    unneeded.append(dep)
            task.deps = ()
            del tasks[task.id]
            task.owner.task_nbytes -= task.own_nbytes
            if self.strikes:
                self.strikes.pop(task.id, None)
            if self.lost:
                self.lost.pop(task.id, None)
            if self.in_doubt:
                self.in_doubt.pop(task.id, None)

    def free_copies(self, task: TaskRecord) -> None:
        if task.holders:
            for worker in sorted(task.holders, key=attrgetter("number")):
                worker.values.discard(task.id)
                worker.frees.append(task.id)
                self.dirty_workers[worker] = None
        task.holders = None

    def stale(self, worker: WorkerRecord, task: TaskRecord | None, id_: int, status: int) -> None:
        """A row of an attempt that is over. Its value, if it left one, is garbage, unless a
        newer attempt makes the same value on the same worker."""
        self.n_stale += 1
        if status == STORED and (
            task is None or (task.worker is not worker and worker not in (task.holders or ()))
        ):
            worker.frees.append(id_)
            self.dirty_workers[worker] = None

    def tell(self, task: TaskRecord) -> None:
        """Tell a task's client how it ended."""
        if task.state == FAILED or task.value is not None:
            status = task.status if task.state == FAILED else VALUE
            payload = task.value or b""
        else:
            status = STORED
            holders = sorted((h.number, h.data_address) for h in task.holders or ())
            payload = stored_payload(task.nbytes, holders)
        self.say_row(task.owner, task.id, status, payload)

    def say_row(self, client: ClientRecord, id_: int, status: int, payload: bytes) -> None:
        if client.number in self.clients:
            client.ids.append(id_)
            client.statuses.append(status)
            client.payloads.append(payload)
            self.dirty_clients[client] = None


def count(task: TaskRecord, what: int) -> int:
    """Attempts of a task that ended in this way."""
    return sum(one.how == what for one in task.history or ())


def killed(task: TaskRecord, what: str) -> bytes:
    """The payload of a KILLED row: all attempts, oldest first."""
    attempts = [one.text for one in task.history or ()]
    text = f"task {task.name} {what} on {len(attempts)} tries; the last one: {attempts[-1]}"
    return killed_payload(text, attempts)


def unknown(task: TaskRecord, why: str, then: str = "") -> bytes:
    """The payload of an UNKNOWN row. why: what happened where nobody was blamed for it.
    then: what happened after that."""
    last = task.history[-1].text if task.history else why
    text = f"task {task.name} may have run, and must not run twice; {last}"
    return text_payload(f"{text}; {then}" if then else text)


def is_restricted(task: TaskRecord) -> bool:
    """Whether only some workers may run it."""
    return bool(task.options.workers or task.options.resources)
