"""The client's machine: calls go in as rows, ends of tasks come out as settled outcomes.

User threads and the one I/O thread meet here without a lock, by three habits:

  - A user thread only *appends*: an outcome to the table, a row to `rows`, an id to `released`.
    Appending to a dict or a deque is atomic, and nothing on that way calls anybody.
  - Only the I/O thread *settles* an outcome, and only a PENDING one, so an end is final. Cancel
    and retry therefore are calls that the I/O thread makes on behalf of the user's.
  - Who waits adds a waiter first and looks at the status afterwards; the I/O thread writes the
    status first and looks for waiters afterwards. One of the two always sees the other.

What leaves is cut into messages by `next_message`. A Cancel or Retry keeps its place among the
rows: those queued before it may be the ones that it names, and those behind it may take what is
retried as an input. A Release has no such place; it follows all rows that were queued when it was
noticed. A flood of new rows cannot hold either up.

A task that was cancelled here may have ended at the broker just before, and either end is told by
a Results row. Until that has come nothing is retried, or the old end would pass for the new one.

A dropped future ends up here as an id in `released`. Its outcome leaves the table only with the
Release itself, so that an id in the table is an id that the broker knows or will know.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count, islice
from typing import Any, TypeAlias

import msgpack

from zfabric import ids
from zfabric.config import DEFAULTS, Settings
from zfabric.core.output import OutputShelf
from zfabric.messages import (
    CANCELLED,
    LOST,
    MAX_FUNCTIONS,
    QUERIES,
    STORED,
    Ask,
    Cancel,
    Inventory,
    Message,
    Output,
    Query,
    Register,
    Release,
    Results,
    Retry,
    Submit,
    TaskOptions,
)

PENDING = -1
"""An outcome's status before any of those in `messages`."""

KEPT_FUNCTIONS = 8 * MAX_FUNCTIONS

LOADED = 64
"""A status of the client's own: the value has been unpickled and lies in `outcome.value`."""

Row: TypeAlias = tuple[int, int, bytes, "Sequence[int] | None", "TaskOptions | None"]
"""(task id, function id, payload, ids of dependencies or None, options or None)."""

Waiter: TypeAlias = Callable[["Outcome"], object]
"""Called by the I/O thread, once or more, after its outcome was settled; quick, never raising."""


class Outcome:
    """What is known of one task until nobody wants it any more.

    fn: its function's id, 0 for scattered data.  payload: as `messages` tells for the status.
    """

    __slots__ = ("fn", "id", "payload", "status", "value", "waiters")

    def __init__(self, task: int, fn: int) -> None:
        self.id = task
        self.fn = fn
        self.status = PENDING
        self.payload: bytes | None = None
        self.value: Any = None
        self.waiters: list[Waiter] | None = None


class Submitter:
    """All tasks of one client. Which thread may call what is said at each method."""

    def __init__(self, settings: Settings = DEFAULTS) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.rows: deque[Row] = deque()
        self.released: deque[int] = deque()
        self.functions: dict[int, tuple[int, str, bytes]] = {}
        self.number = 0
        """The session's number, 0 until the broker has given one."""
        self.n_submitted = 0
        self.n_settled = 0
        self.closed_text = ""
        """Why no task will ever end any more; "" while the client is open."""
        self._settings = settings
        self._counter = count()
        self._base = 0
        self._known: dict[int, None] = {}
        """Functions that the broker knows from this session, as first sent; see MAX_FUNCTIONS."""
        self._older: dict[int, tuple[int, str, bytes]] = {}
        """Functions that were not looked up for a long time; the next ones to be forgotten."""
        self._urgent: deque[Message] = deque()
        self._named: deque[tuple[int, Message]] = deque()
        """Messages that may name queued rows, each with how many rows are to leave before it."""
        self._n_taken = 0
        """Rows that have left the queue."""
        self._due_releases = 0
        self._releases_after = 0
        self._open: dict[int, Ask] = {}
        """Questions without an answer so far."""
        self.alarm = ""
        """Why the broker takes no work now."""
        self._aside: dict[int, Ask] = {}
        """Of the open questions those that were only put out of sequence so far."""
        self.output = OutputShelf()
        """What tasks have written."""
        self._cancelled: set[int] = set()
        """Tasks cancelled here of whose end the broker has yet to tell."""

    # --- any thread ---------------------------------------------------------------------------

    def new_outcome(self, fn: int) -> Outcome:
        """A pending outcome with a fresh id, in the table."""
        outcome = Outcome(self._base | next(self._counter), fn)
        self.outcomes[outcome.id] = outcome
        return outcome

    def new_outcomes(self, fn: int, n: int) -> list[Outcome]:
        """n pending outcomes with ascending ids, in the table."""
        base = self._base
        made = [Outcome(base | number, fn) for number in islice(self._counter, n)]
        self.outcomes.update([(outcome.id, outcome) for outcome in made])
        return made

    def learn(self, function: tuple[int, str, bytes]) -> None:
        """Keep a function's id, name and blob for the rows that are about to name it.

        A program that makes a new function for each call must not keep them all. Two generations
        leave thousands of calls between the moment when a function was looked up and its end.
        Callers take turns: of two that found the generation full, the second would throw away
        the one that was just kept.
        """
        if len(self.functions) >= KEPT_FUNCTIONS:
            self._older, self.functions = self.functions, {}
        self.functions[function[0]] = function

    def function_name(self, fn: int) -> str:
        """A function's name for people, "task" when it has been forgotten."""
        known = self.functions.get(fn) or self._older.get(fn)
        return known[1] if known else "task"

    def name_of(self, task: int) -> str:
        """A task's name for people."""
        outcome = self.outcomes.get(task)
        name = "task" if outcome is None else self.function_name(outcome.fn)
        return f"{name}-{ids.counter_of(task)}"

    def has_work(self, releasing: bool = True) -> bool:
        """Whether next_message(releasing) may give one."""
        return bool(
            self.rows
            or self._urgent
            or self._named
            or self._due_releases
            or (releasing and self.released)
        )

    # --- the I/O thread: what leaves ----------------------------------------------------------

    def next_message(self, releasing: bool = True) -> Message | None:
        """The next message for the broker, None when there is nothing to say.

        releasing: False leaves futures that were dropped just now for a later call.
        """
        if self._urgent:
            return self._urgent.popleft()
        if releasing and not self._due_releases:
            # In this order: whoever releases has queued the row before.
            self._due_releases = len(self.released)
            self._releases_after = self._n_taken + len(self.rows)
        named = self._named
        while True:
            most = self._settings.batch_rows
            if named:
                most = min(most, named[0][0] - self._n_taken)
                if most <= 0 and not self.is_held_up:
                    return named.popleft()[1]
            if self._due_releases and self._n_taken >= self._releases_after:
                release = self._take_releases()
                if release is not None:
                    return release
            if most <= 0 or not self.rows:
                return None
            message = self._take_rows(most)
            if message.ids:
                return message

    @property
    def is_held_up(self) -> bool:
        """Whether the next thing to be said is a Retry that has to wait for Results."""
        if not self._cancelled or not self._named:
            return False
        message = self._named[0][1]
        return type(message) is Retry and not self._cancelled.isdisjoint(message.ids)

    def _name(self, message: Message) -> None:
        """Queue a message that may name rows, behind those that are queued now."""
        self._named.append((self._n_taken + len(self.rows), message))

    def _take_rows(self, most: int) -> Submit:
        task_ids: list[int] = []
        fns: list[int] = []
        payloads: list[bytes] = []
        deps: list[tuple[int, Sequence[int]]] = []
        options: list[tuple[int, TaskOptions]] = []
        pop = self.rows.popleft
        room = self._settings.batch_bytes
        functions: list[tuple[int, str, bytes]] = []
        known = self._known
        row = 0
        for _ in range(min(len(self.rows), most)):
            task, fn, payload, row_deps, row_options = pop()
            self._n_taken += 1
            if task >> ids.COUNTER_BITS != self.number:
                # Made just when the session before this one was lost: its id means nothing now.
                self._lose_row(task, "its session was lost just then")
                continue
            function = None
            if fn not in known:
                function = self.functions.get(fn) or self._older.get(fn)
                if function is None:
                    self._lose_row(task, "its function was forgotten meanwhile; call it again")
                    continue
            task_ids.append(task)
            fns.append(fn)
            payloads.append(payload)
            room -= len(payload)
            if function is not None:
                known[fn] = None
                if len(known) > MAX_FUNCTIONS:
                    del known[next(iter(known))]
                functions.append(function)
                room -= 16 + 4 * len(function[1]) + len(function[2])
            if row_deps is not None:
                deps.append((row, row_deps))
                room -= 9 * len(row_deps)
            if row_options is not None:
                options.append((row, row_options))
                room -= row_options.nbytes
            row += 1
            if room <= 0 or len(functions) >= MAX_FUNCTIONS:
                break
        self.n_submitted += row
        return Submit(functions, task_ids, fns, payloads, deps, options)

    def _lose_row(self, task: int, text: str) -> None:
        outcome = self.outcomes.pop(task, None)
        if outcome is not None and outcome.status == PENDING:
            self._end_quietly(outcome, LOST, text)

    def _end_quietly(self, outcome: Outcome, status: int, text: str) -> None:
        """Settle one where hardly anybody can be waiting."""
        self._settle([outcome], status, msgpack.packb([text]))
        for waiter in outcome.waiters or ():
            waiter(outcome)

    def _take_releases(self) -> Release | None:
        pop = self.released.popleft
        n = min(self._due_releases, self._settings.batch_rows)
        self._due_releases -= n
        gone = []
        forget = self.outcomes.pop
        written = self.output
        for _ in range(n):
            task = pop()
            outcome = forget(task, None)
            if written.texts:
                written.drop(task)
            if outcome is not None:  # else released twice, or its session is over
                gone.append(task)
                self._cancelled.discard(task)
                if outcome.status == PENDING:
                    self._end_quietly(outcome, CANCELLED, "the future was released")
        return Release(gone) if gone else None

    # --- the I/O thread: what arrives ---------------------------------------------------------

    def welcomed(self, number: int, counter: int = 0) -> None:
        """A session has begun: ids are made from its number from now on.

        counter: where to count on, for a session that had tasks before.
        """
        self.number = number
        if counter:
            self._counter = count(counter)
        self._base = ids.task_id(number, 0)
        self._known.clear()

    def inventory(self) -> list[Inventory]:
        """After a restart of the broker: of which tasks we have yet to hear the end.

        Not of those whose Retry is still to leave: an end that is known now is the one before. But
        where that Retry waits for the end of what was cancelled, it waits for just that one.
        What the broker does not know yet it will get behind this.
        """
        waiting = {o.id for o in list(self.outcomes.values()) if o.status == PENDING}
        for _, message in self._named:
            if type(message) is Retry:
                waiting.difference_update(message.ids)
        waiting |= self._cancelled
        ids = sorted(waiting)
        most = self._settings.batch_rows
        parts = []
        for start in range(0, max(len(ids), 1), most):
            part = ids[start : start + most]
            parts.append(Inventory(part, [0] * len(part), [], [], 0))
        parts[-1] = parts[-1]._replace(credit=1)
        return parts

    def results(self, message: Results) -> list[Outcome]:
        """Settle what ended. Returns the outcomes that somebody waits for."""
        find = self.outcomes.get
        cancelled = self._cancelled
        awaited = []
        n_settled = 0
        for task, status, payload in zip(
            message.ids, message.statuses, message.payloads, strict=True
        ):
            outcome = find(task)
            if cancelled and task in cancelled:
                cancelled.discard(task)
                continue  # however it ended: the user was told that it is cancelled
            if outcome is None or outcome.status != PENDING:
                continue  # released meanwhile, or told twice
            outcome.payload = payload
            outcome.status = status
            n_settled += 1
            if outcome.waiters is not None:
                awaited.append(outcome)
        self.n_settled += n_settled
        return awaited

    def wrote(self, message: Output) -> list[tuple[int, int, bytes]]:
        """Keep what tasks wrote whose futures are still here. Returns what is new: the task, the
        bytes that are missing before, the text."""
        known, add = self.outcomes, self.output.add
        new = []
        for task, attempt, start, text in zip(*message, strict=True):
            missing = 0
            if task in known:
                missing, text = add(task, attempt, start, text)
            if text:
                new.append((task, missing, text))
        return new

    # --- the I/O thread: what users ask for ---------------------------------------------------

    def cancel(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """End the pending ones among these here and at the broker. Returns the awaited ones."""
        ended = [o for o in outcomes if o.status == PENDING]
        if ended:
            self._settle(ended, CANCELLED, b"")
            # Those whose Retry has not left have ended as far as the broker knows. A Cancel behind
            # that Retry would have it wait for an end that only the Cancel brings about.
            held = {o.id for o in ended} & self._queued_retries()
            if held:
                self._withdraw_retries(held)
            now = [o.id for o in ended if o.id not in held]
            if now:
                self._cancelled.update(now)
                self._name(Cancel(now))
        return [o for o in ended if o.waiters is not None]

    def retry(self, outcomes: Iterable[Outcome], failed: frozenset[int]) -> None:
        """Run those again whose status is one of `failed`."""
        again = [o for o in outcomes if o.status in failed and o.id in self.outcomes]
        for outcome in again:
            outcome.payload = None
            outcome.status = PENDING
        if again:
            self._name(Retry([o.id for o in again]))

    def _queued_retries(self) -> set[int]:
        retries = (message.ids for _, message in self._named if type(message) is Retry)
        return {id_ for ids in retries for id_ in ids}

    def _withdraw_retries(self, tasks: set[int]) -> None:
        self._named = deque(
            (after, Retry([id_ for id_ in message.ids if id_ not in tasks]))
            if type(message) is Retry
            else (after, message)
            for after, message in self._named
        )

    def locate(self, outcome: Outcome, request: int) -> None:
        """Its value is not where it was said to be: the broker shall tell, or make it again."""
        if outcome.status == STORED and outcome.id in self.outcomes:
            outcome.status = PENDING
            self._name(Ask(request, "locate", [outcome.id]))

    def cancel_waiting(self, outcomes: Iterable[Outcome], request: int) -> None:
        """Have the broker cancel those that no worker has yet; Results will tell which."""
        pending = [o.id for o in outcomes if o.status == PENDING]
        if pending:
            self._name(Ask(request, "cancel_waiting", pending))

    def register(
        self, outcomes: Sequence[Outcome], payloads: Sequence[bytes], message: Register
    ) -> None:
        """Values of ours lie in workers' stores now. payloads: as Results would bring them."""
        if any(outcome.status != PENDING for outcome in outcomes):
            return  # the session was lost meanwhile: the next one may not name them
        for outcome, payload in zip(outcomes, payloads, strict=True):
            outcome.payload = payload
            outcome.status = STORED
        self._urgent.append(message)

    def say(self, message: Message) -> None:
        """Send a message that is about no task."""
        self._urgent.append(message)

    def ask(self, request: int, what: str, about: Sequence[int] = (), text: str = "") -> None:
        """Put a question to the broker. About tasks: behind the rows that name them."""
        question = self._open[request] = Ask(request, what, about, text)
        if self.alarm and what in QUERIES:
            self._aside[request] = question
        else:
            self._queue(question)

    def _queue(self, question: Ask) -> None:
        if question.about:
            self._name(question)
        else:
            self._urgent.append(question)

    def answered(self, request: int) -> None:
        """A question needs no answer any more."""
        self._open.pop(request, None)
        self._aside.pop(request, None)

    def queries(self) -> list[Query]:
        """While there is an alarm: the open questions that are answered in spite of it. They may be
        lost, so they are put again now and then."""
        if not self.alarm:
            return []
        return [Query(*ask) for ask in list(self._open.values()) if ask.what in QUERIES]

    def alarmed(self, text: str) -> bool:
        """The broker raised an alarm, or ("") says that it is over. Whether that is news."""
        is_news = bool(text) is not bool(self.alarm)
        self.alarm = text
        if not text:
            for question in list(self._aside.values()):
                self._queue(question)
            self._aside.clear()
        return is_news

    def ask_again(self) -> list[Ask]:
        """After a restart of the broker: the questions that it may have taken in and forgotten."""
        self.alarm = ""
        self._aside.clear()
        queued = {id(message) for message in self._urgent}
        queued.update(id(message) for _, message in self._named)
        return [question for question in list(self._open.values()) if id(question) not in queued]

    # --- ends of everything -------------------------------------------------------------------

    def session_lost(self, text: str) -> list[Outcome]:
        """The broker no longer knows this session: what it held for us is gone.

        Values that had arrived stay. Returns the awaited outcomes among the lost.
        """
        table, self.outcomes = self.outcomes, {}
        self.rows.clear()
        for task in self.released:
            self.output.drop(task)
        self.released.clear()
        self._named.clear()
        self._urgent.clear()
        self._due_releases = 0
        self._cancelled.clear()
        self._open.clear()
        self._aside.clear()
        self.alarm = ""
        lost = [o for o in list(table.values()) if o.status == PENDING or o.status == STORED]
        self._settle(lost, LOST, msgpack.packb([text]))
        return [o for o in lost if o.waiters is not None]

    def closed(self, text: str) -> list[Outcome]:
        """The client closes: pending outcomes end as cancelled. Returns the awaited ones."""
        self.closed_text = text
        ended = [o for o in list(self.outcomes.values()) if o.status == PENDING]
        self._settle(ended, CANCELLED, msgpack.packb([text]))
        return [o for o in ended if o.waiters is not None]

    def _settle(self, outcomes: Sequence[Outcome], status: int, payload: bytes) -> None:
        for outcome in outcomes:
            outcome.payload = payload
            outcome.status = status
        self.n_settled += len(outcomes)
