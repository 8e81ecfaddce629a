"""The broker's machine: which task is where, and what to tell whom.

Events come in as method calls with a batch of rows each (`on_message`, `client_joined`,
`worker_left`, ...). They change the table (`core.table`) and append rows to the records of the
peers concerned. `flush` then has the placer (`core.placer`) place what is ready, and returns the
turn's messages, a few per peer.
There is no I/O here, no clock and no randomness: the same events give the same messages.

The laws that it keeps (`core.invariants` checks them after each step in the simulator):

  - A task is in exactly one state, and in exactly the places that its state names.
  - An assignment has an attempt number; a row counts only if it names the live one. So a worker
    may be given up, dropped rows may end, and messages may come late: nothing counts twice.
  - Whoever needs a value is counted: its client (`wanted`), unfinished tasks that take it
    (`dependents`), and results that would need it to be made again (`lineage`). One function,
    `TaskTable.let_go`, drops what nobody needs.
  - The broker alone repairs. A worker only says what it has and has not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from math import inf
from operator import attrgetter
from typing import Any

from zfabric import messages as m
from zfabric.config import DEFAULTS, Settings
from zfabric.core import resync
from zfabric.core.outbound import Outgoing, to_client, to_worker
from zfabric.core.outcomes import read_text, text_payload
from zfabric.core.placement import WorkerRecord
from zfabric.core.placer import Placer
from zfabric.core.quota import Quota
from zfabric.core.retry import FAILURES
from zfabric.core.table import TaskTable, count, killed, unknown
from zfabric.core.tasks import (
    ASSIGNED,
    DONE,
    FAILED,
    INPUT_NBYTES,
    READY,
    STATE_NAMES,
    TASK_NBYTES,
    UNFINISHED,
    WAITING,
    ClientRecord,
    FunctionRecord,
    TaskRecord,
)
from zfabric.errors import RemoteProtocolError
from zfabric.ids import COUNTER_BITS, MAX_COUNTER
from zfabric.messages import DIED, STORED, VALUE

MAX_LOSSES = 10
"""Workers that a task may lose. They rarely are its fault, and whether one died or was only cut off
nobody can tell, so it takes more than deaths of slots; but a task that takes whole machines down
must end."""

SETTLED_S = 1.0
"""Seconds without a new worker after which what none of them can run is refused."""

MAX_UNREAD = 100_000
"""Rows that a client may be due beyond twice the tasks that there are."""

_state = attrgetter("state")


class Scheduler:
    """Tasks, clients and workers of one broker."""

    def __init__(self, settings: Settings = DEFAULTS, now: float = 0.0) -> None:
        self.settings = settings
        self.quota = Quota(settings)
        self.table = table = TaskTable(settings)
        self.placer = Placer(table)
        self.tasks = table.tasks
        self.clients = table.clients
        self.workers = table.workers
        self.has_surplus = self.placer.has_surplus
        self._last_joined = now
        self._postponed: list[tuple[int, m.Message]] = []

    @property
    def settling(self) -> bool:
        """After a restart, until the workers are back: nothing is placed, nobody is told where a
        value is."""
        return self.placer.settling

    @settling.setter
    def settling(self, settling: bool) -> None:
        self.placer.settling = settling

    # --- peers come and go ------------------------------------------------------------------------

    def client_joined(self, number: int, name: str, depth: int = 0, user: str = "") -> ClientRecord:
        """A new client session."""
        client = self.clients[number] = ClientRecord(number, name, depth, user)
        return client

    def client_left(self, number: int) -> None:
        """A client is gone: nobody wants its tasks any more."""
        client = self.clients.pop(number)
        self.table.dirty_clients.pop(client, None)
        for task in [t for t in self.tasks.values() if t.owner is client]:
            if task.wanted:
                task.wanted = False
                self.table.unneeded.append(task)
        self.table.let_go()
        client.functions.clear()
        self.quota.left(client)

    def worker_joined(self, worker: WorkerRecord, now: float) -> None:
        """A new worker session, which holds nothing."""
        self.workers[worker.number] = worker
        self._last_joined = now
        self.table.must_place = True

    def worker_left(
        self, number: int, why: str, now: float, *, may_return: bool = False
    ) -> WorkerRecord:
        """A worker is gone: its rows run elsewhere, its values are made again. Returns its record,
        whose `former` is what has to be known of its rows if it comes back.

        may_return: it did not say so, and may only be cut off. For `dead_s` what only it could run
        waits for it, and does not end as NoWorkerFits; so does what it may have begun and may not
        run again.
        """
        worker = self.workers.pop(number)
        if may_return:
            self.placer.away.append((now + self.settings.dead_s, worker))
        text = f"worker {worker.name} ({worker.host}, pid {worker.pid}) was lost: {why}"
        rows = list(worker.rows.values())
        if worker.unclear:
            worker.former = None
        if worker.former is not None:
            worker.former.update(worker.ending)
            for row in rows:
                if row.options.resources or not row.options.idempotent:
                    worker.former[row.id, row.attempt] = row.options.resources
        if may_return:  # who says good-bye is nobody's victim
            # Only the first rows can have been running; the others had not started.
            for row in rows[: worker.slots]:
                self.table.blame(row, m.LOST, text)
        for row in rows:
            # One that fails takes along those that wait for it, here as well.
            if row.options.idempotent or row.state != ASSIGNED or row.worker is not worker:
                continue
            if may_return:
                attempt = row.attempt
                self.table.doubt(row, now + self.settings.dead_s, text)
                self.table.lost[row.id] = (attempt, row.attempt)
            else:
                self.table.ended(row, m.UNKNOWN, unknown(row, text))
        for row in reversed(rows):
            if row.state == ASSIGNED and row.worker is worker:
                if row.history and count(row, m.LOST) >= MAX_LOSSES:
                    self.table.fail(row, m.KILLED, killed(row, "was lost with its worker"))
                else:
                    attempt = row.attempt
                    self.table.requeue(row)
                    self.table.lost[row.id] = (attempt, row.attempt)
        for id_ in sorted(worker.values):
            task = self.tasks.get(id_)
            if task is not None and task.holders and worker in task.holders:
                task.holders.discard(worker)
                if not task.holders and task.value is None:
                    self.table.value_lost(task, text)
        self.table.let_go()
        # What was to be said to it, to drop its rows for instance, has nobody to hear it.
        self.table.dirty_workers.pop(worker, None)
        return worker

    # --- messages ---------------------------------------------------------------------------------

    def on_message(self, number: int, message: m.Message, now: float) -> None:
        """Rows from a peer. Raises RemoteProtocolError when they make no sense from it."""
        client = self.clients.get(number)
        if client is not None:
            if len(client.ids) > MAX_UNREAD and len(client.ids) > 2 * len(self.tasks):
                raise RemoteProtocolError("unread", "it asks, and does not read the answers")
            handle = _CLIENT_HANDLERS.get(type(message))
            if handle is None:
                raise RemoteProtocolError("role", f"a client sent {type(message).__name__}")
            handle(self, client, message, now)
            return
        worker = self.workers.get(number)
        if worker is not None:
            handle = _WORKER_HANDLERS.get(type(message))
            if handle is None:
                raise RemoteProtocolError("role", f"a worker sent {type(message).__name__}")
            handle(self, worker, message, now)

    def submit(self, client: ClientRecord, message: m.Submit, now: float) -> None:
        """New tasks, oldest first."""
        nbytes = TASK_NBYTES * len(message.ids) + sum(map(len, message.payloads))
        if not self.settling:
            # With the functions, which count for themselves when they are taken in.
            blobs = sum(len(blob) for _, _, blob in message.functions)
            refusal = self.quota.why_not(client, nbytes + blobs)
            if refusal:
                self._refuse(client, message, refusal)
                return
        client.task_nbytes += nbytes
        functions = client.functions
        for fn_id, name, blob in message.functions:
            functions.pop(fn_id, None)
            functions[fn_id] = FunctionRecord(fn_id, name, blob, client)
        if client.counter is not None:
            _count(client, message.ids)
        tasks = self.tasks
        number = client.number
        deps = dict(message.deps) if message.deps else _NONE
        options = dict(message.options) if message.options else _NONE
        fresh: list[TaskRecord] = []
        row = 0
        for id_, fn_id, payload in zip(message.ids, message.fns, message.payloads, strict=True):
            fn = functions.get(fn_id)
            if fn is None or id_ >> COUNTER_BITS != number or id_ in tasks:
                raise RemoteProtocolError("submit", "an unknown function, or an id twice")
            task = tasks[id_] = TaskRecord(id_, fn, payload, client)
            if options and row in options:
                task.options = options[row]
                task.extra = task.options.nbytes
            if deps and row in deps:
                task.extra += INPUT_NBYTES * len(deps[row])
            client.task_nbytes += task.extra
            if deps and row in deps:
                self.table.link(task, deps[row])
            elif task.options is m.DEFAULT_OPTIONS:
                fresh.append(task)
            else:
                self.table.make_ready(task)
            row += 1
        # Only now: the rows may name functions that those which came with them push out.
        while len(functions) > m.MAX_FUNCTIONS:
            del functions[next(iter(functions))]
        self.table.n_submitted += row
        if fresh:
            self.table.ready.extend(client, fresh)
        self.table.must_place = True
        if self.table.unneeded:
            self.table.let_go()

    def _refuse(self, client: ClientRecord, message: m.Submit, text: str) -> None:
        """There is no room for these. They leave no trace but their functions, as the client will
        not send those again."""
        for fn_id, name, blob in message.functions:
            client.functions.pop(fn_id, None)
            client.functions[fn_id] = FunctionRecord(fn_id, name, blob, client)
        while len(client.functions) > m.MAX_FUNCTIONS:
            del client.functions[next(iter(client.functions))]
        payload = text_payload(text)
        self.quota.refused += len(message.ids)
        for id_ in message.ids:
            self.table.say_row(client, id_, m.FULL, payload)
            self._note_refused(client, id_, payload)

    def _note_refused(self, client: ClientRecord, id_: int, payload: bytes) -> None:
        """For a journal: one that replays the message takes no notice of quotas."""
        if self.table.failed is not None:
            client.refused[id_] = payload
            refused = TaskRecord(id_, None, b"", client)
            refused.state, refused.status, refused.value = FAILED, m.FULL, payload
            self.table.failed.append(refused)

    def release(self, client: ClientRecord, message: m.Release, now: float) -> None:
        """The client no longer wants these. Unknown ones were released before."""
        tasks = self.tasks
        unneeded = self.table.unneeded
        lost = self.table.lost
        nbytes = 0
        for id_ in message.ids:
            task = tasks.get(id_)
            if task is None or task.owner is not client:
                client.refused.pop(id_, None)
                continue
            task.wanted = False
            if task.dependents:
                continue
            if task.state == DONE and not task.lineage and not task.deps and not task.holders:
                del tasks[id_]
                nbytes += task.own_nbytes
                if lost:
                    lost.pop(id_, None)
            else:
                unneeded.append(task)
        client.task_nbytes -= nbytes
        if unneeded:
            self.table.let_go()

    def cancel(self, client: ClientRecord, message: m.Cancel, now: float) -> None:
        """End these and whatever waits for them. Finished ones stay finished."""
        for id_ in message.ids:
            task = self.tasks.get(id_)
            if task is not None and task.owner is client and task.state in UNFINISHED:
                self.table.fail(task, m.CANCELLED, b"")
        self.table.let_go()

    def retry(self, client: ClientRecord, message: m.Retry, now: float) -> None:
        """Run failed tasks again, with a clean record."""
        for id_ in message.ids:
            task = self.tasks.get(id_)
            if task is None:
                text = text_payload("the broker never had room for it; submit it again")
                self.table.say_row(client, id_, m.FULL, text)
                continue
            if task.owner is not client or task.state in UNFINISHED:
                continue
            if task.state != FAILED or task.fn is None:
                # It ended well before the client's Cancel came, and the client forgot that; or
                # it takes what cannot be had.
                self.table.tell(task)
                continue
            task.history = None
            task.set_value(None)
            task.status = 0
            self.table.make_again(task)
        self.table.let_go()

    def register(self, client: ClientRecord, message: m.Register, now: float) -> None:
        """Values that a client has put into workers' stores."""
        if client.counter is not None:
            _count(client, message.ids)
        needed = TASK_NBYTES * len(message.ids)
        refusal = "" if self.settling else self.quota.why_not(client, needed)
        for id_, nbytes, numbers in zip(message.ids, message.sizes, message.holders, strict=True):
            if id_ >> COUNTER_BITS != client.number or id_ in self.tasks:
                raise RemoteProtocolError("register", "an id twice, or another session's")
            holders = {self.workers[n] for n in numbers if n in self.workers}
            if refusal:  # whoever takes it is told that it is not here
                for worker in holders:
                    worker.frees.append(id_)
                    self.table.dirty_workers[worker] = None
                self._note_refused(client, id_, text_payload(refusal))
                continue
            task = self.tasks[id_] = TaskRecord(id_, None, b"", client)
            client.task_nbytes += TASK_NBYTES
            task.nbytes = nbytes
            if holders or self.settling:
                task.state = DONE
                task.status = STORED
                task.holders = holders
                for worker in holders:
                    worker.values.add(id_)
            else:
                text = "its worker was lost before the value could be used; scatter it again"
                self.table.fail(task, m.LOST, text_payload(text))

    def ask(self, client: ClientRecord, message: m.Ask, now: float) -> None:
        """A question. "locate" says that a value could not be fetched from where it was said to
        be; it is answered by Results rows, now or once the value has been made again.
        "cancel_waiting" ends those of these tasks that no worker has; Results rows tell which."""
        if message.what == "locate" and self.settling:
            self._postponed.append((client.number, message))
        elif message.what == "locate":
            for id_ in message.about:
                task = self.tasks.get(id_)
                if task is None or task.owner is not client:
                    self.table.say_row(
                        client, id_, m.LOST, text_payload("the broker does not know it")
                    )
                    continue
                self.table.strike(task, f"client {client.name}")
                if task.state in (DONE, FAILED):
                    self.table.tell(task)
            self.table.let_go()
        elif message.what == "cancel_waiting":
            for id_ in message.about:
                task = self.tasks.get(id_)
                if task is not None and task.owner is client and task.state in (WAITING, READY):
                    self.table.fail(task, m.CANCELLED, b"")
            self.table.let_go()
        elif message.what != "info":
            raise RemoteProtocolError("ask", f"nobody can tell {message.what!r}")

    def done(self, worker: WorkerRecord, message: m.Done, now: float) -> None:
        """Attempts that ended."""
        worker.credit = min(message.credit, self.settings.max_rows)
        worker.last_done = now
        self.table.must_place = True
        get = self.tasks.get
        rows = worker.rows
        dirty = self.table.dirty_clients
        n_done = 0
        for id_, attempt, status, payload in zip(
            message.ids, message.attempts, message.statuses, message.payloads, strict=True
        ):
            task = get(id_)
            if (
                task is None
                or task.worker is not worker
                or task.attempt != attempt
                or task.state != ASSIGNED
            ):
                if worker.ending or worker.unclear:
                    self.table.really_ended(worker, id_, attempt)
                self.table.stale(worker, task, id_, status)
                continue
            if status == VALUE:
                del rows[id_]
                task.state = DONE
                task.worker = None
                task.owner.task_nbytes += len(payload) - len(task.payload)
                task.payload = b""
                task.value = payload
                task.nbytes = len(payload)
                n_done += 1
                if task.wanted:
                    owner = task.owner
                    owner.ids.append(id_)
                    owner.statuses.append(VALUE)
                    owner.payloads.append(payload)
                    dirty[owner] = None
                # Most rows have neither inputs nor anybody who waits: no call for them.
                if task.options is not m.DEFAULT_OPTIONS:
                    worker.occupy(task.options.resources, -1)
                if task.deps:
                    self.table.drop_inputs(task, keep_recipe=False)
                if task.dependents:
                    self.table.wake(task)
                elif not task.wanted:
                    self.table.unneeded.append(task)
            elif status == STORED:
                n_done += 1
                self.table.stored(worker, task, int.from_bytes(payload, "little"))
            elif status in FAILURES:
                self.table.raised(worker, task, status, payload, now)
            elif status == DIED:
                self.table.died(worker, task, read_text(payload))
            else:
                self.table.ended(task, m.CANCELLED, b"")
        worker.n_done += n_done
        self.table.n_done += n_done
        if self.table.unneeded:
            self.table.let_go()

    def returned(self, worker: WorkerRecord, message: m.Returned, now: float) -> None:
        """Rows that were not started."""
        worker.credit = min(message.credit, self.settings.max_rows)
        worker.recall_sent = False
        worker.last_done = now
        self.table.must_place = True
        for id_, attempt in zip(reversed(message.ids), reversed(message.attempts), strict=True):
            task = self.tasks.get(id_)
            if (
                task is not None
                and task.worker is worker
                and task.attempt == attempt
                and task.state == ASSIGNED
            ):
                self.table.requeue(task)
            elif worker.ending or worker.unclear:
                self.table.really_ended(worker, id_, attempt)
        self.table.let_go()

    def missing(self, worker: WorkerRecord, message: m.Missing, now: float) -> None:
        """Values that a worker could not fetch from anywhere."""
        for id_ in message.ids:
            task = self.tasks.get(id_)
            if task is not None:
                self.table.strike(task, f"worker {worker.name}")
        self.table.let_go()

    def holds(self, worker: WorkerRecord, message: m.Holds, now: float) -> None:
        """Copies that a worker has made for itself."""
        for id_ in message.ids:
            task = self.tasks.get(id_)
            if task is not None and task.state == DONE and task.value is None:
                assert task.holders is not None
                task.holders.add(worker)
                worker.values.add(id_)
            elif task is None or not (task.worker is worker or worker in (task.holders or ())):
                worker.frees.append(id_)
                self.table.dirty_workers[worker] = None

    def worker_came_back(self, worker: WorkerRecord, message: m.Inventory, now: float) -> None:
        """What a worker has kept from a session before this one."""
        resync.worker_came_back(self.table, worker, message)

    def client_was_never_told(self, number: int) -> None:
        """A restored client whose first Welcome was lost with the broker before: it takes this one
        for the first, and will not say what it has heard, which is nothing."""
        client = self.clients.get(number)
        if client is not None:
            client.held_back = False
            if client.ids:
                self.table.dirty_clients[client] = None

    def client_came_back(self, client: ClientRecord, message: m.Inventory, now: float) -> None:
        """What a client has yet to hear of."""
        if self.settling:
            self._postponed.append((client.number, message))
        else:
            resync.client_came_back(self.table, client, message)

    def settled(self, now: float) -> None:
        """The workers that were here before a restart are back, or will not come."""
        self.settling = False
        self.table.must_place = True
        self._last_joined = now
        postponed, self._postponed = self._postponed, []
        for number, message in postponed:
            if number in self.clients:
                self.on_message(number, message, now)

    # --- the end of a turn ------------------------------------------------------------------------

    def flush(self) -> list[Outgoing]:
        """Place what can be placed. Returns (session number, message) pairs, in order."""
        if (self.table.must_place or self.table.ahead) and not self.settling:
            self.table.must_place = False
            self.placer.place()
        said = self.table.said
        if self.table.dirty_workers:
            for worker in self.table.dirty_workers:
                to_worker(worker, said, self.settings)
            self.table.dirty_workers.clear()
        if self.table.dirty_clients:
            more: dict[ClientRecord, None] = {}
            for client in self.table.dirty_clients:
                if not (client.held_back or client.is_full):
                    to_client(client, said, self.settings)
                    if client.ids:
                        more[client] = None
            self.table.dirty_clients = more
        self.table.said = []
        return said

    def tick(self, now: float) -> None:
        """What takes time to become true: rows stuck behind a long one, tasks that fit nowhere."""
        self.quota.recount(self.clients.values())
        self.placer.recall(now)
        if self.table.due:
            self.table.wake_due(now)
        if self.table.in_doubt:
            self.table.end_doubts(now)
            self.table.let_go()
        if self.workers and self.table.restricted and now - self._last_joined >= SETTLED_S:
            self.placer.refuse_unfit(now)

    @property
    def due_at(self) -> float:
        """When to call tick() though nothing happens: the next retry; infinity for never."""
        return self.table.due[0][0] if self.table.due else inf

    def set_suspect(self, number: int, suspect: bool) -> None:
        """A suspect worker gets no new rows until it is heard again."""
        worker = self.workers.get(number)
        if worker is not None and worker.suspect is not suspect:
            worker.suspect = suspect
            self.table.must_place = True

    def set_full(self, number: int, is_full: bool) -> None:
        """A peer has yet to take in what was said to it, or has done so: a worker gets no new rows
        meanwhile, and what a client is to hear waits."""
        worker = self.workers.get(number)
        if worker is not None:
            worker.is_full = is_full
            self.table.must_place = True
            return
        client = self.clients.get(number)
        if client is not None:
            client.is_full = is_full
            if client.ids and not is_full:
                self.table.dirty_clients[client] = None

    def info(self) -> dict[str, Any]:
        """Figures for people: plain values only."""
        counts = Counter(map(_state, self.tasks.values()))
        by_name = {name: counts.get(state, 0) for state, name in enumerate(STATE_NAMES)}
        return {
            "tasks": {
                **by_name,
                "total_done": self.table.n_done,
                "total_failed": self.table.n_failed,
                "submitted": self.table.n_submitted,
                "stale": self.table.n_stale,
            },
            "settling": self.settling,
            "unfit": self.placer.unfit() if self.workers else [],
            "clients": len(self.clients),
            "bytes": self.quota.nbytes,
            "refused": self.quota.refused,
            "workers": [_worker_info(w) for w in self.workers.values()],
        }


_NONE: dict[int, Any] = {}

_Handler = Callable[[Scheduler, Any, Any, float], None]


def _count(client: ClientRecord, ids: Iterable[int]) -> None:
    """Ids of a run are not used again, also when their tasks are long forgotten."""
    assert client.counter is not None
    client.counter = max(client.counter, (max(ids, default=0) & MAX_COUNTER) + 1)


_CLIENT_HANDLERS: dict[type, _Handler] = {
    m.Submit: Scheduler.submit,
    m.Release: Scheduler.release,
    m.Cancel: Scheduler.cancel,
    m.Retry: Scheduler.retry,
    m.Register: Scheduler.register,
    m.Ask: Scheduler.ask,
    m.Inventory: Scheduler.client_came_back,
}

_WORKER_HANDLERS: dict[type, _Handler] = {
    m.Done: Scheduler.done,
    m.Returned: Scheduler.returned,
    m.Missing: Scheduler.missing,
    m.Holds: Scheduler.holds,
    m.Inventory: Scheduler.worker_came_back,
}


def _worker_info(worker: WorkerRecord) -> dict[str, Any]:
    load = (*worker.load, *[0] * 11)[:11]
    return {
        "name": worker.name,
        "number": worker.number,
        "host": worker.host,
        "pid": worker.pid,
        "slots": worker.slots,
        "kind": "thread" if worker.threads else "process",
        "resources": worker.resources,
        "data_address": worker.data_address,
        "held": len(worker.rows),
        "running": min(len(worker.rows), worker.slots),
        "done": worker.n_done,
        "values": len(worker.values),
        "bytes": load[4],
        "shared": load[10],
        "memory": load[5],
        "spilled": load[6],
        "memory_limit": load[7],
        "full": bool(load[8]),
        "disk_fails": bool(load[9]),
        "suspect": worker.suspect,
        "credit": worker.credit,
    }
