"""What a broker has to write down so that another one can go on after it, and how that one does.

The journal is a list of entries, (kind, bytes), in the order in which things happened:

    BEGIN     a client's session began, or goes on under another token
    END       a client's session is over
    MESSAGE   frames of a client that change its tasks, as they came
    ENDS      tasks that ended: [ids, statuses, payloads]
    JOINED    a worker's session began; LEFT: it is over
    STARTED   tasks that may run once at most were sent to a worker
    TRIED     attempts that gave no value: [[task, how, text, attempt], ...]

Replayed in that order into an empty scheduler they give the same table, but for what only workers
know: which rows they run and which values they hold. They tell that themselves when they come
back (`core.resync`). The scheduler is a pure function of its events, so nothing is written of
what follows from them, such as the deletion of what nobody needs any more. The same holds for
locks: who has one follows from who asked for it, in which order, and from the ends of sessions.

A value in a worker's store is journalled as an end without the value. Until its worker is back,
or was waited for in vain, it is a DONE task without a holder, and nothing is placed: that time is
`Scheduler.settling`.

`snapshot` gives entries that make the present table anew; written in place of all older ones it
keeps the file in proportion to what is alive. All entries are plain bytes: this module does no
I/O. `runtime.journal` writes them, before anything that follows from them leaves the broker.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from msgpack import packb, unpackb

from zfabric import messages as m
from zfabric import wire
from zfabric.core.locks import Locks
from zfabric.core.scheduler import Scheduler
from zfabric.core.table import TaskTable, unknown
from zfabric.core.tasks import (
    ASSIGNED,
    DONE,
    FAILED,
    NOT_LOST,
    READY,
    RELEASED,
    UNFINISHED,
    WAITING,
    TaskRecord,
    Try,
)
from zfabric.errors import RemoteProtocolError, ZFabricError
from zfabric.ids import TRY_BITS, session_of
from zfabric.messages import STORED, VALUE

Entry = tuple[int, bytes]

BEGIN, END, MESSAGE, ENDS, JOINED, LEFT, STARTED, TRIED = range(1, 9)

ROWS = 1024
"""Tasks per entry of a snapshot."""

LOGGED = frozenset((m.Submit, m.Release, m.Cancel, m.Retry, m.Register, m.Acquire, m.Unlock))

LOST_WITH_BROKER = "its worker did not come back after the broker had restarted"


class JournalDamaged(ZFabricError):
    """A journal's entries make no sense."""


class SavedSession(NamedTuple):
    """A client's session as the journal knows it."""

    token: int
    number: int
    name: str
    depth: int
    run: str
    received: int
    user: str
    """Whose key it came in with; "" without keys."""
    counter: int = 0
    """Of a run: beyond those of all tasks that it ever had."""


class Restored(NamedTuple):
    """What is known besides the scheduler's table."""

    sessions: list[SavedSession]
    workers: dict[int, int]
    """Tokens of the workers' sessions that had not ended, and their numbers."""
    next_number: int
    """The first session number that was never given."""
    started: set[int]
    """Tasks that may have run and may not run again."""


class JournalWriter:
    """Collects a turn's entries.

    It is told of each client message before the scheduler is, and of each Done after that.
    """

    def __init__(self, table: TaskTable) -> None:
        self.trouble = ""
        """Why nothing can be written now. Messages that would have to be written are taken for
        lost on their way until it can: their senders send them again."""
        self._table = table
        self._failed: list[TaskRecord] = []
        table.failed = self._failed
        self._entries: list[Entry] = []
        self._ends: tuple[list[int], bytearray, list[bytes]] = ([], bytearray(), [])

    @property
    def pending(self) -> int:
        """Ends and other entries since the last `take`."""
        return len(self._ends[0]) + len(self._entries)

    def take(self) -> list[Entry]:
        """The entries since the last call, in order."""
        self._flush()
        if self._table.begun:
            self._entries.append((STARTED, packb(self._table.begun)))
            self._table.begun.clear()
        entries, self._entries = self._entries, []
        return entries

    def begin(self, saved: SavedSession) -> None:
        self._add(BEGIN, packb(saved))

    def end(self, token: int) -> None:
        self._add(END, packb([token]))

    def joined(self, token: int, number: int) -> None:
        self._add(JOINED, packb([token, number]))

    def left(self, token: int) -> None:
        self._add(LEFT, packb([token]))

    def message(self, frames: Sequence[bytes | memoryview]) -> None:
        """A client's message of one of the kinds in LOGGED, with its header."""
        self._add(MESSAGE, packb([bytes(frame) for frame in frames]))

    def in_its_place(self, token: int, message: m.Message) -> None:
        """A message that a client would have said, and did not."""
        self._add(*_message(token, message))

    def done(self, message: m.Done) -> None:
        """The scheduler has taken in a Done: note the ends that counted."""
        tasks = self._table.tasks
        ids, statuses, payloads = self._ends
        for id_, status in zip(message.ids, message.statuses, strict=True):
            if status <= STORED:
                task = tasks.get(id_)
                if task is not None and task.state == DONE:
                    ids.append(id_)
                    if task.value is not None:
                        statuses.append(VALUE)
                        payloads.append(task.value)
                    else:
                        statuses.append(STORED)
                        payloads.append(task.nbytes.to_bytes(8, "little"))

    def _add(self, kind: int, data: bytes) -> None:
        self._flush()
        self._entries.append((kind, data))

    def _flush(self) -> None:
        """Ends that were noted are an entry before whatever comes next."""
        if self._failed:
            for task in self._failed:
                is_here = self._table.tasks.get(task.id) is task
                if task.state == FAILED and (is_here or task.status == m.FULL):
                    self._ends[0].append(task.id)
                    self._ends[1].append(task.status)
                    self._ends[2].append(task.value or b"")
            self._failed.clear()
        if self._table.tried:
            self._entries.append((TRIED, _pack_tries(self._table.tried)))
            self._table.tried.clear()
        if self._ends[0]:
            self._entries.append((ENDS, _pack_ends(*self._ends)))
            self._ends = ([], bytearray(), [])


def replay(
    scheduler: Scheduler, locks: Locks, entries: Iterable[Entry], generation: int
) -> Restored:
    """Bring an empty scheduler, and no locks, to where the journal ends; it is `settling` then.

    generation: how often a broker began with this journal, from 1 on.
    Raises JournalDamaged when the entries make no sense.
    """
    table = scheduler.table
    scheduler.settling = True
    sessions: dict[int, SavedSession] = {}
    workers: dict[int, int] = {}
    started: set[int] = set()
    next_number = 1
    try:
        for kind, data in entries:
            if kind == MESSAGE:
                header, message = wire.decode(unpackb(data))
                saved = sessions[header.token]
                if header.epoch:  # else it is a snapshot's, and the peer never sent it
                    sessions[header.token] = saved._replace(received=header.seq)
                _happen(scheduler, locks, saved.number, message)
            elif kind == ENDS:
                for id_, status, payload in zip(*_unpack_ends(data), strict=True):
                    task = table.tasks.get(id_)
                    if status == m.FULL:
                        _refused(table, id_, payload)
                    if task is not None:
                        _end(table, task, status, payload)
                table.let_go()
            elif kind == BEGIN:
                saved = SavedSession(*unpackb(data))
                next_number = max(next_number, saved.number + 1)
                goes_on = saved.token in sessions  # without its run, perhaps
                for token in [t for t, s in sessions.items() if s.number == saved.number]:
                    del sessions[token]
                sessions[saved.token] = saved
                if saved.number not in table.clients:
                    scheduler.client_joined(saved.number, saved.name, saved.depth, saved.user)
                client = table.clients[saved.number]
                if not goes_on:
                    client.functions.clear()  # under another token it tells them anew
                if saved.run:
                    client.counter = max(saved.counter, client.counter or 0)
            elif kind == END:
                saved = sessions.pop(unpackb(data)[0])
                scheduler.client_left(saved.number)
                locks.session_ended(saved.number)
            elif kind == JOINED:
                token, number = unpackb(data)
                workers[token] = number
                next_number = max(next_number, number + 1)
            elif kind == LEFT:
                workers.pop(unpackb(data)[0], None)
            elif kind == STARTED:
                started.update(unpackb(data))
            elif kind == TRIED:
                for id_, how, text, attempt in unpackb(data):
                    task = table.tasks.get(id_)
                    if task is not None:
                        _tried(task, Try(how, text, attempt))
            else:
                raise JournalDamaged(f"an entry of the unknown kind {kind}")
    except (RemoteProtocolError, KeyError, ValueError, TypeError, AssertionError) as exc:
        raise JournalDamaged(f"an entry cannot be read: {exc!r}") from exc
    _begin_attempts(table, generation << TRY_BITS)
    for client in table.clients.values():
        # It will say what it waits for.
        client.held_back = True
        client.ids, client.statuses, client.payloads = [], bytearray(), []
    table.dirty_clients.clear()
    started.intersection_update(table.lost)
    return Restored(list(sessions.values()), workers, next_number, started)


def settle(table: TaskTable, started: Iterable[int]) -> None:
    """Workers that are not back yet will not come: what only they had is lost.

    started: tasks that may have run, and may not run again unless a worker has them still.
    """
    for id_ in started:
        task = table.tasks.get(id_)
        # Who was back and is cut off again may come back once more: that doubt has its own time.
        if task is not None and task.state in (WAITING, READY) and id_ not in table.in_doubt:
            table.fail(task, m.UNKNOWN, unknown(task, LOST_WITH_BROKER))
    for task in list(table.tasks.values()):
        if task.state == DONE and task.value is None and not task.holders:
            table.value_lost(task, LOST_WITH_BROKER)
    table.let_go()


def snapshot(
    table: TaskTable,
    locks: Locks,
    sessions: Iterable[SavedSession],
    workers: Iterable[tuple[int, int]],
    started: Iterable[int] = (),
) -> Iterator[Entry]:
    """Entries that bring an empty scheduler to the present table. Dependencies come first, as
    they do in the table."""
    tokens: dict[int, int] = {}
    for saved in sessions:
        tokens[saved.number] = saved.token
        yield BEGIN, packb(saved)
    for token, number in workers:
        yield JOINED, packb([token, number])
    over: list[int] = []
    for owner in {task.owner.number: task.owner for task in table.tasks.values()}.values():
        if owner.number not in tokens:  # gone, but others need some of its tasks
            token = tokens[owner.number] = (1 << 63) | owner.number
            over.append(token)
            yield BEGIN, packb(SavedSession(token, owner.number, owner.name, 0, "", 0, ""))
    batch: list[TaskRecord] = []
    for task in table.tasks.values():
        if batch and (task.owner is not batch[0].owner or len(batch) >= ROWS):
            yield from _submitted(batch, tokens)
            batch = []
        batch.append(task)
    if batch:
        yield from _submitted(batch, tokens)
    for number, client in table.clients.items():
        # Its later rows may name these. Last, as the order in which they are forgotten counts.
        for fn in client.functions.values():
            yield _message(tokens[number], m.Submit([(fn.id, fn.name, fn.blob)], (), (), ()))
    begun = [
        task.id
        for task in table.tasks.values()
        if task.id in table.in_doubt or (task.state == ASSIGNED and not task.options.idempotent)
    ]
    if begun or started:
        yield STARTED, packb([*begun, *started])
    tries = [(task.id, one) for task in table.tasks.values() for one in task.history or ()]
    for start in range(0, len(tries), ROWS):
        yield TRIED, _pack_tries(tries[start : start + ROWS])
    for name, number, request in locks.requests():
        yield _message(tokens[number], m.Acquire(request, name, True))
    yield from _ended([task for task in table.tasks.values() if task.state == DONE])
    yield from _ended([task for task in table.tasks.values() if task.state == FAILED])
    for client in table.clients.values():
        if client.refused:
            refused = client.refused
            yield (
                ENDS,
                _pack_ends(list(refused), bytes([m.FULL]) * len(refused), [*refused.values()]),
            )
    unwanted: dict[int, list[int]] = {}
    for task in table.tasks.values():
        if not task.wanted and tokens[task.owner.number] not in over:
            unwanted.setdefault(tokens[task.owner.number], []).append(task.id)
    for token, ids in unwanted.items():
        yield _message(token, m.Release(ids))
    for token in over:
        yield END, packb([token])


# --- parts of it ----------------------------------------------------------------------------------


def _submitted(batch: list[TaskRecord], tokens: dict[int, int]) -> Iterator[Entry]:
    """Tasks of one client as it would submit them."""
    token = tokens[batch[0].owner.number]
    data = [task for task in batch if task.fn is None]
    if data:
        ids, sizes = [task.id for task in data], [task.nbytes for task in data]
        yield _message(token, m.Register(ids, sizes, [[] for _ in data]))
    rows = [task for task in batch if task.fn is not None]
    if not rows:
        return
    functions: dict[int, tuple[int, str, bytes]] = {}
    fns = []
    for task in rows:
        fn = task.fn
        assert fn is not None
        functions[fn.id] = (fn.id, fn.name, fn.blob)
        fns.append(fn.id)
    deps = [(n, [dep.id for dep in task.deps]) for n, task in enumerate(rows) if task.deps]
    options = [
        (n, task.options) for n, task in enumerate(rows) if task.options is not m.DEFAULT_OPTIONS
    ]
    yield _message(
        token,
        m.Submit(
            list(functions.values()),
            [task.id for task in rows],
            fns,
            [task.payload for task in rows],
            deps,
            options,
        ),
    )


def _ended(tasks: list[TaskRecord]) -> Iterator[Entry]:
    for start in range(0, len(tasks), ROWS):
        ids: list[int] = []
        statuses = bytearray()
        payloads: list[bytes] = []
        for task in tasks[start : start + ROWS]:
            ids.append(task.id)
            if task.state == FAILED:
                statuses.append(task.status)
                payloads.append(task.value or b"")
            elif task.value is not None:
                statuses.append(VALUE)
                payloads.append(task.value)
            else:
                statuses.append(STORED)
                payloads.append(task.nbytes.to_bytes(8, "little"))
        yield ENDS, _pack_ends(ids, statuses, payloads)


def _happen(scheduler: Scheduler, locks: Locks, number: int, message: m.Message) -> None:
    """A client said that. What made no sense then makes none now: it ended that session, as the
    journal goes on to tell."""
    try:
        if isinstance(message, m.Acquire):
            locks.acquire(number, message)
        elif isinstance(message, m.Unlock):
            locks.unlock(number, message)
        else:
            scheduler.on_message(number, message, 0.0)
    except RemoteProtocolError:
        scheduler.table.let_go()


def _tried(task: TaskRecord, one: Try) -> None:
    if one.how != NOT_LOST:
        task.history = [*(task.history or ()), one]
    elif task.history:
        task.history.pop()


def _pack_tries(tries: Iterable[tuple[int, Try]]) -> bytes:
    packed: bytes = packb([[id_, *one] for id_, one in tries])
    return packed


def _message(token: int, message: m.Message) -> Entry:
    body = wire.encode_body(message)
    header = wire.encode_header(body.kind, token, 0, 1, 0)
    return MESSAGE, packb([header, *[bytes(frame) for frame in body.frames]])


def _pack_ends(ids: Sequence[int], statuses: bytes | bytearray, payloads: Sequence[bytes]) -> bytes:
    packed: bytes = packb([array("Q", ids).tobytes(), bytes(statuses), payloads])
    return packed


def _unpack_ends(data: bytes) -> tuple[Sequence[int], bytes, list[bytes]]:
    column, statuses, payloads = unpackb(data)
    return memoryview(column).cast("Q").tolist(), statuses, payloads


def _end(table: TaskTable, task: TaskRecord, status: int, payload: bytes) -> None:
    """A task ended so before the restart."""
    if status <= STORED:
        if task.state not in UNFINISHED:
            return
        task.state = DONE
        task.status = status
        if status == VALUE:
            task.owner.task_nbytes -= len(task.payload)
            task.payload = b""
            task.set_value(payload)
            task.nbytes = len(payload)
        else:
            task.nbytes = int.from_bytes(payload, "little")
            task.holders = set()
        table.drop_inputs(task, keep_recipe=status == STORED)
        if task.dependents:
            table.wake(task)
        elif not task.wanted:
            table.unneeded.append(task)
        return
    if task.state == DONE:
        if task.fn is None:
            task.state = RELEASED
            task.holders = None
        else:
            table.make_again(task)
    if task.state == FAILED:
        task.status = status
        task.set_value(payload)
    else:
        table.fail(task, status, payload)
    if status == m.FULL:
        # It was never taken in, and its client may be gone without a Release for it.
        task.wanted = False
        table.unneeded.append(task)


def _refused(table: TaskTable, id_: int, payload: bytes) -> None:
    """There was no room for it, and perhaps its client has not heard that."""
    client = table.clients.get(session_of(id_))
    if client is not None:
        client.refused[id_] = payload


def _begin_attempts(table: TaskTable, least: int) -> None:
    """All that is to run may be running somewhere: whoever says so first has it."""
    table.least_attempt = least
    table.lost.clear()
    for task in table.tasks.values():
        task.attempt = least
        if task.state in UNFINISHED:
            ended = [one.attempt for one in task.history or () if one.how != m.LOST]
            table.lost[task.id] = (-max(ended, default=0), least)
