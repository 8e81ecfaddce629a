"""The broker's machine: which task is where, and what to tell whom.

Events come in as method calls with a batch of rows each (`on_message`, `client_joined`,
`worker_left`, ...). They change the table of tasks and append rows to the records of the peers
concerned. `flush` then places what is ready and returns the turn's messages, a few per peer.
There is no I/O here, no clock and no randomness: the same events give the same messages.

The laws that it keeps (`core.invariants` checks them after each step in the simulator):

  - A task is in exactly one state, and in exactly the places that its state names.
  - An assignment has an attempt number; a row counts only if it names the live one. So a worker
    may be given up, dropped rows may end, and messages may come late: nothing counts twice.
  - Whoever needs a value is counted: its client (`wanted`), unfinished tasks that take it
    (`dependents`), and results that would need it to be made again (`lineage`). One function,
    `_let_go`, drops what nobody needs.
  - The broker alone repairs. A worker only says what it has and has not.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from zfabric import messages as m
from zfabric.config import DEFAULTS, Settings
from zfabric.core import placement
from zfabric.core.outbound import Outgoing, to_client, to_worker
from zfabric.core.outcomes import killed_payload, read_text, stored_payload, text_payload
from zfabric.core.placement import WorkerRecord
from zfabric.core.ready import ReadyQueue
from zfabric.core.tasks import (
    ASSIGNED,
    DONE,
    FAILED,
    READY,
    RELEASED,
    STATE_NAMES,
    WAITING,
    ClientRecord,
    FunctionRecord,
    TaskRecord,
)
from zfabric.errors import RemoteProtocolError
from zfabric.ids import COUNTER_BITS
from zfabric.messages import DIED, ERROR, INLINE, LOCAL, REMOTE, STORED, VALUE, Dependency

MAX_KNOWN = 2048
"""Functions that a worker is trusted to remember before the oldest is taken from it."""

MAX_AHEAD_INPUTS = 16
"""The successor rule looks only at tasks with this many inputs or fewer: it looks at each input
again whenever one of them is placed."""

GIVE_LIMIT = 64 * 1024
"""Bytes of inline inputs above which they travel ahead of their row, in messages of their own."""

MAX_STRIKES = 3
"""Failed fetches of a value until its copies are taken for unreachable and it is made again."""

MAX_LOSSES = 10
"""Workers that a task may lose. They rarely are its fault, so it takes more than deaths of slots,
but a task that takes whole machines down must end."""

RECALL_AFTER_S = 0.05
"""Seconds without a finished row after which a worker's waiting rows go to an idle one."""

SETTLED_S = 1.0
"""Seconds without a new worker after which what none of them can run is refused."""

_state = attrgetter("state")


class Scheduler:
    """Tasks, clients and workers of one broker."""

    def __init__(self, settings: Settings = DEFAULTS, now: float = 0.0) -> None:
        self.settings = settings
        self.tasks: dict[int, TaskRecord] = {}
        self.clients: dict[int, ClientRecord] = {}
        self.workers: dict[int, WorkerRecord] = {}
        self.ready = ReadyQueue()
        self.restricted: dict[Any, deque[TaskRecord]] = {}
        """READY tasks that only some workers may run, by what they ask for."""
        self.n_done = 0
        self.n_failed = 0
        self.n_stale = 0
        self.n_submitted = 0
        self._ahead: deque[TaskRecord] = deque()
        """WAITING tasks that the successor rule may place now."""
        self._unneeded: list[TaskRecord] = []
        self._dirty_clients: dict[ClientRecord, None] = {}
        self._dirty_workers: dict[WorkerRecord, None] = {}
        self._said: list[Outgoing] = []
        self._strikes: dict[int, int] = {}
        self._last_joined = now
        self._must_place = False

    # --- peers come and go --------------------------------------------------------------------

    def client_joined(self, number: int, name: str, depth: int = 0) -> ClientRecord:
        """A new client session."""
        client = self.clients[number] = ClientRecord(number, name, depth)
        return client

    def client_left(self, number: int) -> None:
        """A client is gone: nobody wants its tasks any more."""
        client = self.clients.pop(number)
        self._dirty_clients.pop(client, None)
        for task in [t for t in self.tasks.values() if t.owner is client]:
            if task.wanted:
                task.wanted = False
                self._unneeded.append(task)
        self._let_go()

    def worker_joined(self, worker: WorkerRecord, now: float) -> None:
        """A new worker session, which holds nothing."""
        self.workers[worker.number] = worker
        self._last_joined = now
        self._must_place = True

    def worker_left(self, number: int, why: str, now: float) -> None:
        """A worker is gone: its rows run elsewhere, its values are made again."""
        worker = self.workers.pop(number)
        text = f"worker {worker.name} ({worker.host}, pid {worker.pid}) was lost: {why}"
        rows = list(worker.rows.values())
        # Only the first rows can have been running; the others had not started.
        for row in rows[: worker.slots]:
            self._blame(row, m.LOST, text)
        for row in reversed(rows):
            if row.state == ASSIGNED and row.worker is worker:
                if row.history and _count(row, m.LOST) >= MAX_LOSSES:
                    self._fail(row, m.KILLED, _killed(row, "was lost with its worker"))
                else:
                    self._requeue(row)
        for id_ in sorted(worker.values):
            task = self.tasks.get(id_)
            if task is not None and task.holders and worker in task.holders:
                task.holders.discard(worker)
                if not task.holders and task.value is None:
                    self._value_lost(task, text)
        self._let_go()
        # What was to be said to it, to drop its rows for instance, has nobody to hear it.
        self._dirty_workers.pop(worker, None)

    # --- messages -----------------------------------------------------------------------------

    def on_message(self, number: int, message: m.Message, now: float) -> None:
        """Rows from a peer. Raises RemoteProtocolError when they make no sense from it."""
        client = self.clients.get(number)
        if client is not None:
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
        functions = client.functions
        for fn_id, name, blob in message.functions:
            functions.pop(fn_id, None)
            functions[fn_id] = FunctionRecord(fn_id, name, blob)
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
            if deps and row in deps:
                self._link(task, deps[row])
            elif task.options is m.DEFAULT_OPTIONS:
                fresh.append(task)
            else:
                self._make_ready(task)
            row += 1
        # Only now: the rows may name functions that those which came with them push out.
        while len(functions) > m.MAX_FUNCTIONS:
            del functions[next(iter(functions))]
        self.n_submitted += row
        if fresh:
            self.ready.extend(client, fresh)
        self._must_place = True
        if self._unneeded:
            self._let_go()

    def release(self, client: ClientRecord, message: m.Release, now: float) -> None:
        """The client no longer wants these. Unknown ones were released before."""
        tasks = self.tasks
        unneeded = self._unneeded
        for id_ in message.ids:
            task = tasks.get(id_)
            if task is None or task.owner is not client:
                continue
            task.wanted = False
            if task.dependents:
                continue
            if task.state == DONE and not task.lineage and not task.deps and not task.holders:
                del tasks[id_]
            else:
                unneeded.append(task)
        if unneeded:
            self._let_go()

    def cancel(self, client: ClientRecord, message: m.Cancel, now: float) -> None:
        """End these and whatever waits for them. Finished ones stay finished."""
        for id_ in message.ids:
            task = self.tasks.get(id_)
            if task is not None and task.owner is client and task.state in _UNFINISHED:
                self._fail(task, m.CANCELLED, b"")
        self._let_go()

    def retry(self, client: ClientRecord, message: m.Retry, now: float) -> None:
        """Run failed tasks again, with a clean record."""
        for id_ in message.ids:
            task = self.tasks.get(id_)
            if task is None or task.owner is not client or task.state in _UNFINISHED:
                continue
            if task.state != FAILED or task.fn is None:
                # It ended well before the client's Cancel came, and the client forgot that; or
                # it takes what cannot be had.
                self._tell(task)
                continue
            task.history = None
            task.value = None
            task.status = 0
            self._make_again(task)
        self._let_go()

    def register(self, client: ClientRecord, message: m.Register, now: float) -> None:
        """Values that a client has put into workers' stores."""
        for id_, nbytes, numbers in zip(message.ids, message.sizes, message.holders, strict=True):
            if id_ >> COUNTER_BITS != client.number or id_ in self.tasks:
                raise RemoteProtocolError("register", "an id twice, or another session's")
            task = self.tasks[id_] = TaskRecord(id_, None, b"", client)
            holders = {self.workers[n] for n in numbers if n in self.workers}
            task.nbytes = nbytes
            if holders:
                task.state = DONE
                task.status = STORED
                task.holders = holders
                for worker in holders:
                    worker.values.add(id_)
            else:
                text = "its worker was lost before the value could be used; scatter it again"
                self._fail(task, m.LOST, text_payload(text))

    def ask(self, client: ClientRecord, message: m.Ask, now: float) -> None:
        """A question. "locate" says that a value could not be fetched from where it was said to
        be; it is answered by Results rows, now or once the value has been made again."""
        if message.what == "locate":
            for id_ in message.about:
                task = self.tasks.get(id_)
                if task is None:
                    self._say_row(client, id_, m.LOST, text_payload("the broker does not know it"))
                    continue
                self._strike(task, f"client {client.name}")
                if task.state in (DONE, FAILED):
                    self._tell(task)
            self._let_go()
        elif message.what != "info":
            raise RemoteProtocolError("ask", f"nobody can tell {message.what!r}")

    def done(self, worker: WorkerRecord, message: m.Done, now: float) -> None:
        """Attempts that ended."""
        worker.credit = min(message.credit, self.settings.max_rows)
        worker.last_done = now
        self._must_place = True
        get = self.tasks.get
        rows = worker.rows
        dirty = self._dirty_clients
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
                self._stale(worker, task, id_, status)
                continue
            if status == VALUE:
                del rows[id_]
                task.state = DONE
                task.worker = None
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
                    self._drop_inputs(task, keep_recipe=False)
                if task.dependents:
                    self._wake(task)
                elif not task.wanted:
                    self._unneeded.append(task)
            elif status == STORED:
                n_done += 1
                self._stored(worker, task, int.from_bytes(payload, "little"))
            elif status == ERROR:
                self._raised(worker, task, payload)
            elif status == DIED:
                self._died(worker, task, read_text(payload))
            else:
                self._ended(task, m.CANCELLED, b"")
        worker.n_done += n_done
        self.n_done += n_done
        if self._unneeded:
            self._let_go()

    def returned(self, worker: WorkerRecord, message: m.Returned, now: float) -> None:
        """Rows that were not started."""
        worker.credit = min(message.credit, self.settings.max_rows)
        worker.recall_sent = False
        self._must_place = True
        for id_, attempt in zip(reversed(message.ids), reversed(message.attempts), strict=True):
            task = self.tasks.get(id_)
            if (
                task is not None
                and task.worker is worker
                and task.attempt == attempt
                and task.state == ASSIGNED
            ):
                self._requeue(task)
        self._let_go()

    def missing(self, worker: WorkerRecord, message: m.Missing, now: float) -> None:
        """Values that a worker could not fetch from anywhere."""
        for id_ in message.ids:
            task = self.tasks.get(id_)
            if task is not None:
                self._strike(task, f"worker {worker.name}")
        self._let_go()

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
                self._dirty_workers[worker] = None

    # --- the end of a turn --------------------------------------------------------------------

    def flush(self) -> list[Outgoing]:
        """Place what can be placed. Returns (session number, message) pairs, in order."""
        if self._must_place or self._ahead:
            self._must_place = False
            self._place()
        said = self._said
        if self._dirty_workers:
            for worker in self._dirty_workers:
                to_worker(worker, said, self.settings)
            self._dirty_workers.clear()
        if self._dirty_clients:
            for client in self._dirty_clients:
                to_client(client, said, self.settings)
            self._dirty_clients.clear()
        self._said = []
        return said

    def tick(self, now: float) -> None:
        """What takes time to become true: rows stuck behind a long one, tasks that fit nowhere."""
        self._recall(now)
        if self.workers and self.restricted and now - self._last_joined >= SETTLED_S:
            for queue in list(self.restricted.values()):
                task = _first_ready(queue)
                if task is not None and not self._fits_any(task):
                    for unfit in list(queue):
                        if unfit.state == READY:
                            self._fail(unfit, m.UNFIT, text_payload(self._why_unfit(unfit)))
            self._let_go()

    def has_surplus(self) -> bool:
        """Whether rows might have to be recalled before long."""
        workers = self.workers.values()
        return len(workers) > 1 and any(len(w.rows) > w.slots for w in workers)

    def set_suspect(self, number: int, suspect: bool) -> None:
        """A suspect worker gets no new rows until it is heard again."""
        worker = self.workers.get(number)
        if worker is not None and worker.suspect is not suspect:
            worker.suspect = suspect
            self._must_place = True

    def info(self) -> dict[str, Any]:
        """Figures for people: plain values only."""
        counts = Counter(map(_state, self.tasks.values()))
        by_name = {name: counts.get(state, 0) for state, name in enumerate(STATE_NAMES)}
        return {
            "tasks": {
                **by_name,
                "total_done": self.n_done,
                "total_failed": self.n_failed,
                "submitted": self.n_submitted,
                "stale": self.n_stale,
            },
            "clients": len(self.clients),
            "workers": [_worker_info(w) for w in self.workers.values()],
        }

    # --- placing ------------------------------------------------------------------------------

    def _place(self) -> None:
        if self._ahead:
            self._follow()
        if self.restricted:
            self._place_restricted()
        ready = self.ready
        if not ready.n:
            return
        open_ = [w for w in self.workers.values() if w.free > 0]
        if len(open_) == 1:
            worker = open_[0]
            # The successor rule may spend credit too, so it is looked up each time.
            while len(worker.rows) < worker.credit:
                task = ready.pop()
                if task is None:
                    break
                self._assign(worker, task)
                if self._ahead:
                    self._follow()
        elif open_:
            self._spread(open_)

    def _spread(self, open_: list[WorkerRecord]) -> None:
        """Ready tasks to several workers: to their inputs, or to the emptiest."""
        order = placement.EmptiestFirst(open_)
        while (idlest := order.first()) is not None:
            task = self.ready.pop()
            if task is None:
                return
            worker = placement.preferred(task, idlest) if task.deps else None
            self._assign(worker or idlest, task)
            if self._ahead:
                self._follow()

    def _place_restricted(self) -> None:
        for key, queue in list(self.restricted.items()):
            while (task := _first_ready(queue)) is not None:
                options = task.options
                worker = placement.emptiest(
                    w for w in self.workers.values() if w.can_run_now(options)
                )
                if worker is None:
                    break
                queue.popleft()
                self._assign(worker, task)
            if not queue:
                del self.restricted[key]

    def _follow(self) -> None:
        """The successor rule: a task whose missing inputs are all being made on one worker goes
        there at once, without waiting for the news that they are made."""
        ahead = self._ahead
        single = len(self.workers) == 1
        while ahead:
            task = ahead.popleft()
            if task.state != WAITING or len(task.deps) > MAX_AHEAD_INPUTS:
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
                if worker is not None and worker.free > 0 and not _is_restricted(task):
                    self._assign(worker, task)

    def _assign(self, worker: WorkerRecord, task: TaskRecord) -> None:
        fn = task.fn
        assert fn is not None
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
        if task.dependents:
            self._ahead.extend(task.dependents)
        self._dirty_workers[worker] = None

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
            dep = self.tasks[id_]
            if dep.holders is None:
                dep.holders = set()
            if worker not in dep.holders:
                dep.holders.add(worker)
                worker.values.add(id_)
                worker.gives.append((id_, data))
            ways[place] = (id_, LOCAL, len(data))

    def _recall(self, now: float) -> None:
        """Ask back rows that wait behind a long one while another worker has nothing."""
        idle = [w for w in self.workers.values() if not w.suspect and len(w.rows) < w.slots]
        if not idle or len(self.workers) < 2:
            return
        wanted = sum(w.slots - len(w.rows) for w in idle)
        for worker in self.workers.values():
            surplus = len(worker.rows) - worker.slots
            stuck = now - worker.last_done >= RECALL_AFTER_S
            if surplus > 0 and wanted > 0 and stuck and not worker.recall_sent:
                ids = list(worker.rows)[-min(surplus, wanted) :]
                wanted -= len(ids)
                worker.recall_sent = True
                self._said.append((worker.number, m.Recall(ids)))

    # --- states -------------------------------------------------------------------------------

    def _link(self, task: TaskRecord, dep_ids: Iterable[int]) -> None:
        """Count a new task's inputs."""
        deps = []
        for id_ in dep_ids:
            dep = self.tasks.get(id_)
            if dep is None or dep is task:
                text = f"{task.name} takes a value that the broker does not know; was it released?"
                task.fn = None  # a retry would miss the value as well
                self._fail(task, m.LOST, text_payload(text))
                return
            deps.append(dep)
        task.deps = tuple(dict.fromkeys(deps)) if len(set(dep_ids)) != len(deps) else tuple(deps)
        self._need_inputs(task)

    def _need_inputs(self, task: TaskRecord) -> None:
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
            self._fail(task, failed.status, failed.value or b"")
            return
        for dep in task.deps:
            if dep.state == RELEASED:
                self._make_again(dep)
        if task.state != WAITING:
            return
        if task.n_waiting:
            self._ahead.append(task)
        else:
            self._make_ready(task)

    def _make_again(self, task: TaskRecord) -> None:
        """A RELEASED, FAILED or lost task runs again: it needs its inputs again."""
        task.state = WAITING
        stack = [task]
        while stack:
            again = stack.pop()
            if again.state != WAITING:
                continue  # failed meanwhile, with an input of its own
            again.value = None
            again.nbytes = 0
            again.worker = None
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
                self._fail(again, failed.status, failed.value or b"")
            elif again.n_waiting == 0:
                self._make_ready(again)
        self._must_place = True

    def _make_ready(self, task: TaskRecord, front: bool = False) -> None:
        task.state = READY
        self._must_place = True
        if task.options is not m.DEFAULT_OPTIONS and _is_restricted(task):
            key = placement.signature(task.options)
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

    def _wake(self, task: TaskRecord) -> None:
        """A value is there: whoever waited only for it can run."""
        assert task.dependents is not None
        for dependent in task.dependents:
            if dependent.state == WAITING:
                dependent.n_waiting -= 1
                if dependent.n_waiting == 0:
                    self._make_ready(dependent)
                else:
                    self._ahead.append(dependent)

    def _stored(self, worker: WorkerRecord, task: TaskRecord, nbytes: int) -> None:
        """A task's value is in its worker's store."""
        self._leave_worker(task)
        task.state = DONE
        task.status = STORED
        task.nbytes = nbytes
        task.holders = {worker}
        worker.values.add(task.id)
        if task.wanted:
            self._tell(task)
        self._drop_inputs(task, keep_recipe=True)
        if task.dependents:
            self._wake(task)
        elif not task.wanted:
            self._unneeded.append(task)

    def _raised(self, worker: WorkerRecord, task: TaskRecord, payload: bytes) -> None:
        self._blame(task, ERROR, f"raised on {worker.name}")
        if _count(task, ERROR) <= task.options.retries:
            self._requeue(task)
        else:
            self._ended(task, ERROR, payload)

    def _died(self, worker: WorkerRecord, task: TaskRecord, text: str) -> None:
        self._blame(task, DIED, f"on {worker.name}: {text}")
        if _count(task, DIED) >= self.settings.max_deaths:
            self._ended(task, m.KILLED, _killed(task, "killed its process"))
        else:
            self._requeue(task)

    def _ended(self, task: TaskRecord, status: int, payload: bytes) -> None:
        """An attempt ended by itself, and with it the task."""
        self._leave_worker(task)
        task.state = WAITING  # on no worker, so that none is told to drop it
        self._fail(task, status, payload)

    def _blame(self, task: TaskRecord, what: int, text: str) -> None:
        if task.history is None:
            task.history = []
        task.history.append((what, text))

    def _requeue(self, task: TaskRecord) -> None:
        """An assigned task is the broker's again; its attempt is over.

        Successors that went to the same worker ahead of it come back by themselves: the worker
        returns what waits for a row that ended without a value.
        """
        self._leave_worker(task)
        task.n_waiting = sum(dep.state != DONE for dep in task.deps)
        if task.n_waiting:
            task.state = WAITING
            self._ahead.append(task)
        else:
            self._make_ready(task, front=True)

    def _leave_worker(self, task: TaskRecord) -> None:
        worker = task.worker
        if worker is not None:
            worker.rows.pop(task.id, None)
            self._must_place = True
            worker.occupy(task.options.resources, -1)
            task.worker = None

    def _fail(self, task: TaskRecord, status: int, payload: bytes) -> None:
        """A task ends without a value, and with it every task that waits for it."""
        stack = [task]
        while stack:
            failed = stack.pop()
            if failed.state == FAILED:
                continue
            if failed.state == ASSIGNED:
                worker = failed.worker
                assert worker is not None
                self._leave_worker(failed)
                worker.drops.append(failed.id)
                self._dirty_workers[worker] = None
            failed.state = FAILED
            failed.status = status
            failed.value = payload
            self.n_failed += 1
            if failed.wanted:
                self._tell(failed)
            else:
                self._unneeded.append(failed)
            self._drop_inputs(failed, keep_recipe=True)
            if failed.dependents:
                stack.extend(reversed(failed.dependents))
                failed.dependents = None

    def _value_lost(self, task: TaskRecord, text: str) -> None:
        """The last copy of a stored value is gone."""
        self._strikes.pop(task.id, None)
        task.holders = None
        needed = task.wanted or bool(task.dependents)
        if task.fn is None:
            if needed or task.lineage:
                task.state = RELEASED
                self._fail(task, m.LOST, text_payload(f"scattered data is gone: {text}"))
            else:
                self._unneeded.append(task)
            return
        if not needed:
            task.state = RELEASED
            self._unneeded.append(task)
            return
        for dependent in task.dependents or ():
            if dependent.state == WAITING:
                dependent.n_waiting += 1
            elif dependent.state == READY:
                dependent.state = WAITING
                dependent.n_waiting = 1
        self._make_again(task)

    def _strike(self, task: TaskRecord, who: str) -> None:
        """Somebody could not fetch a stored value. Once may be chance; in the end its copies are
        taken for unreachable."""
        if task.state != DONE or task.value is not None:
            return
        strikes = self._strikes[task.id] = self._strikes.get(task.id, 0) + 1
        if strikes >= MAX_STRIKES or not task.holders:
            self._free_copies(task)
            self._value_lost(task, f"{who} could not fetch it from anywhere")

    def _drop_inputs(self, task: TaskRecord, keep_recipe: bool) -> None:
        """A task has its outcome and needs its inputs no more, but perhaps their recipes: a
        stored value can be lost and a failed task tried again."""
        for dep in task.deps:
            dependents = dep.dependents
            if dependents is not None:
                dependents.pop(task, None)
            if keep_recipe:
                dep.lineage += 1
            if not dependents and not dep.wanted:
                self._unneeded.append(dep)
        if not keep_recipe:
            task.deps = ()

    def _let_go(self) -> None:
        """Delete what nobody wants, waits for, or would be made again from."""
        unneeded = self._unneeded
        tasks = self.tasks
        while unneeded:
            task = unneeded.pop()
            if task.wanted or task.dependents or tasks.get(task.id) is not task:
                continue
            state = task.state
            if state == DONE and task.lineage and (task.fn is None or task.value is not None):
                continue  # small, or not to be made again: the value itself is the recipe
            self._free_copies(task)
            if state == DONE:
                task.state = RELEASED
            elif state == ASSIGNED:
                worker = task.worker
                assert worker is not None
                self._leave_worker(task)
                worker.drops.append(task.id)
                self._dirty_workers[worker] = None
            if state in _UNFINISHED:
                # Its inputs count it as a dependent until now, and by lineage from now on.
                task.state = RELEASED
                self._drop_inputs(task, keep_recipe=True)
            if task.lineage:
                continue
            for dep in task.deps:
                dep.lineage -= 1
                if not dep.wanted and not dep.dependents:
                    unneeded.append(dep)
            task.deps = ()
            del tasks[task.id]
            if self._strikes:
                self._strikes.pop(task.id, None)

    def _free_copies(self, task: TaskRecord) -> None:
        if task.holders:
            for worker in sorted(task.holders, key=attrgetter("number")):
                worker.values.discard(task.id)
                worker.frees.append(task.id)
                self._dirty_workers[worker] = None
        task.holders = None

    def _stale(self, worker: WorkerRecord, task: TaskRecord | None, id_: int, status: int) -> None:
        """A row of an attempt that is over. Its value, if it left one, is garbage, unless a
        newer attempt makes the same value on the same worker."""
        self.n_stale += 1
        if status == STORED and (
            task is None or (task.worker is not worker and worker not in (task.holders or ()))
        ):
            worker.frees.append(id_)
            self._dirty_workers[worker] = None

    # --- telling ------------------------------------------------------------------------------

    def _tell(self, task: TaskRecord) -> None:
        """Tell a task's client how it ended."""
        if task.state == FAILED or task.value is not None:
            status = task.status if task.state == FAILED else VALUE
            payload = task.value or b""
        else:
            status = STORED
            holders = sorted((h.number, h.data_address) for h in task.holders or ())
            payload = stored_payload(task.nbytes, holders)
        self._say_row(task.owner, task.id, status, payload)

    def _say_row(self, client: ClientRecord, id_: int, status: int, payload: bytes) -> None:
        if client.number in self.clients:
            client.ids.append(id_)
            client.statuses.append(status)
            client.payloads.append(payload)
            self._dirty_clients[client] = None

    def _fits_any(self, task: TaskRecord) -> bool:
        return any(w.may_ever_run(task.options) for w in self.workers.values())

    def _why_unfit(self, task: TaskRecord) -> str:
        options = task.options
        have = "; ".join(
            f"{w.name} has {w.resources or 'no resources'}" for w in self.workers.values()
        )
        asked = []
        if options.resources:
            asked.append(f"resources {options.resources}")
        if options.workers:
            asked.append(f"one of the workers {', '.join(options.workers)}")
        return (
            f"{task.name} asks for {' on '.join(asked)}, and no worker has that: {have}. "
            "Start a worker with `--resources NAME=AMOUNT` or `--name`, or ask for less."
        )


_NONE: dict[int, Any] = {}
_UNFINISHED = frozenset((WAITING, READY, ASSIGNED))

_Handler = Callable[[Scheduler, Any, Any, float], None]

_CLIENT_HANDLERS: dict[type, _Handler] = {
    m.Submit: Scheduler.submit,
    m.Release: Scheduler.release,
    m.Cancel: Scheduler.cancel,
    m.Retry: Scheduler.retry,
    m.Register: Scheduler.register,
    m.Ask: Scheduler.ask,
}

_WORKER_HANDLERS: dict[type, _Handler] = {
    m.Done: Scheduler.done,
    m.Returned: Scheduler.returned,
    m.Missing: Scheduler.missing,
    m.Holds: Scheduler.holds,
}


def _first_ready(queue: deque[TaskRecord]) -> TaskRecord | None:
    """The queue's first task that is still READY, left in its place."""
    while queue:
        if queue[0].state == READY:
            return queue[0]
        queue.popleft()
    return None


def _is_restricted(task: TaskRecord) -> bool:
    return bool(task.options.workers or task.options.resources)


def _count(task: TaskRecord, what: int) -> int:
    return sum(kind == what for kind, _ in task.history or ())


def _killed(task: TaskRecord, what: str) -> bytes:
    attempts = [text for _, text in task.history or ()]
    text = f"task {task.name} {what} on {len(attempts)} tries; the last one: {attempts[-1]}"
    return killed_payload(text, attempts)


def _worker_info(worker: WorkerRecord) -> dict[str, Any]:
    load = (*worker.load, 0, 0, 0, 0, 0, 0)[:6]
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
        "memory": load[5],
        "suspect": worker.suspect,
        "credit": worker.credit,
    }
