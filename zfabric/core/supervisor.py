"""The worker's machine: which rows wait, which run in which slot, and what the broker hears.

No I/O and no clock: events come in as calls with `now`, what is to be done comes out of
`effects()`, what is to be said out of `messages()`, both once per turn.

A row's way. It arrives in a Run and waits until all its values are here: those that ride along
are, those in the store are, a REMOTE one is fetched, and a LOCAL one may still have to be made by
a row that is here too (the successor rule: the broker sends a row before its input exists, if
the row that makes the input is at the same worker). Then it is ready, and goes to a slot in the
order of arrival. Which slot, and whether it comes back from there, `core.supervisor_slots` decides.

Rows whose input will not come. When a row ends here without a value (it raised, killed its
process, was dropped or given back), every row that waits for it here is given back in a Returned
behind the Done that tells of the end, and so on. So is a row that comes with a LOCAL value that
is nowhere here: its input ended while the row was on its way. Inline values made here are kept
until the broker has acknowledged the Done that carried them: until then it may still send rows
that call them LOCAL. Those that the broker gave are kept until it frees them.

A slot that waits for a future of its own is blocked: the rows behind it come back and another
slot runs in its place, so that parents which wait never keep their children from running.

A row that is dropped while it runs ends with its slot, which is killed and replaced; in a slot
that is a thread it goes on. Either way it is reported as CANCELLED, without a value, once it has
ended; a dropped row that had not begun is returned. So the broker hears of the end of every row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from msgpack import packb

from zfabric.config import DEFAULTS, Settings
from zfabric.core.pace import Pace
from zfabric.core.rejoin import ended_again, inventory
from zfabric.core.supervisor_effects import (
    SKIPPED,
    Effect,
    FetchValue,
    ForgetFunctions,
    FreeValues,
    KeepValue,
    StopSlot,
)
from zfabric.core.supervisor_rows import Entry, Linked
from zfabric.core.supervisor_slots import SlotCrew
from zfabric.core.supervisor_table import RowTable
from zfabric.errors import InternalError, RemoteProtocolError
from zfabric.ids import counter_of, try_of
from zfabric.messages import (
    CANCELLED,
    DIED,
    INLINE,
    LOCAL,
    OVERSIZE,
    STORED,
    VALUE,
    Done,
    Give,
    Holds,
    Inventory,
    Message,
    Missing,
    Returned,
    Run,
)

CREDIT_S = 0.02
"""Between two looks whether the credit that was told last is still about right."""


class Supervisor:
    """See above.

    n_slots: rows that run at a time.  start_at: when to start the first slots; default: now.
    table, crew: its two halves, for who explains what stands here.
    can_kill: whether slots can be killed.
    The rest of what slots say (slot_started, slot_reset, slot_settled, taken_back, row_age) and
    wake_at are SlotCrew's own methods.
    """

    def __init__(
        self,
        n_slots: int,
        *,
        settings: Settings = DEFAULTS,
        now: float,
        start_at: float | None = None,
        can_kill: bool = True,
    ) -> None:
        self._settings = settings
        self.table = table = RowTable()
        pace = Pace(settings.lookahead_s, settings.max_rows)
        self.crew = crew = SlotCrew(
            table, n_slots, pace, now if start_at is None else start_at, can_kill
        )
        self.slot_reset = crew.reset
        self.slot_settled = crew.settled
        self.row_age = crew.row_age
        self.slot_started = crew.started
        self.taken_back = crew.taken_back
        self.wake_at = crew.wake_at

        self._recall_asked = False
        self._forgotten: set[int] = set()
        """Functions that the broker took away, but that a row here still calls."""
        self._unacked: deque[tuple[int, Done]] = deque()
        self._done: tuple[list[int], list[int], bytearray, list[bytes]] = ([], [], bytearray(), [])
        self._missing: list[int] = []
        self._full = False
        self._leaving = False
        self._copied: list[int] = []
        self._credit_told = pace.credit(n_slots, ())
        self._credit_at = now
        self._blocked_changed = False

    # --- what the broker says -----------------------------------------------------------------

    def run(self, message: Run) -> None:
        """Rows to run. Raises RemoteProtocolError for a function that was never sent."""
        table = self.table
        functions, rows = table.functions, table.rows
        for function in message.functions:
            functions[function[0]] = (function[0], function[1], function[2])
            self._forgotten.discard(function[0])
        if not functions.keys() >= set(message.fns):
            raise RemoteProtocolError("function", "a row calls a function that was not sent")
        if not rows.keys().isdisjoint(message.ids):
            # A new attempt of a row that is still here: the old one is not wanted.
            self.drop([id_ for id_ in message.ids if id_ in rows])
        entries: Iterable[Entry] = zip(
            message.ids, message.attempts, message.fns, message.payloads, strict=True
        )
        if not message.deps and not message.limits:
            entries = list(entries)
            rows.update(zip(message.ids, entries, strict=True))
            table.ready.extend(entries)
            return
        deps, limits = dict(message.deps), dict(message.limits)
        if limits:
            self.crew.has_limits = True
        for index, entry in enumerate(entries):
            if index in deps or index in limits:
                self._link(entry, deps.get(index, ()), limits.get(index, 0.0))
            else:
                rows[entry[0]] = entry
                table.ready.append(entry)

    def _link(self, row: Entry, deps: Sequence[tuple[int, int, Any]], limit_s: float) -> None:
        """Take in a row with dependencies, or a time limit in seconds."""
        table = self.table
        linked = Linked()
        linked.limit_s = limit_s
        entry = (*row, linked)
        waits: list[tuple[int, int]] = []
        for index, (dep, kind, info) in enumerate(deps):
            value: Any = None
            if kind == INLINE:
                value = info
            elif dep in table.held:
                value = (dep,)
            elif dep in table.inline:
                value = table.inline[dep]
            elif dep in table.given:
                value = table.given[dep]
            elif kind == LOCAL:
                if dep not in table.rows and dep not in table.fetching:
                    table.hand_back(row)  # It ended without a value, and that is on its way.
                    return
                waits.append((dep, index))
            else:
                if dep not in table.fetching:
                    nbytes, sources = info
                    table.fetching.add(dep)
                    places = [(number, address) for number, address in sources]
                    table.effects.append(FetchValue(dep, nbytes, places))
                waits.append((dep, index))
            linked.deps.append(dep)
            linked.values.append(value)
        table.rows[entry[0]] = entry
        linked.need = len(waits)
        for dep, index in waits:
            table.waiters.setdefault(dep, []).append((entry, index))
        if not waits:
            table.ready.append(entry)

    def recall(self, ids: Iterable[int]) -> None:
        """Give these back unless they have begun."""
        table = self.table
        self._recall_asked = True
        wanted = table.rows.keys() & set(ids)
        table.recalled |= wanted
        for entry in self._withdraw(wanted):
            table.recalled.discard(entry[0])
            table.give_back(entry)

    def leave(self) -> None:
        """This worker is about to go: give back whatever has not begun, and take nothing more."""
        self._leaving = True
        self.recall(list(self.table.rows))

    def drop(self, ids: Iterable[int]) -> None:
        """Forget these; one that runs is killed. Those that wait for them are given back."""
        table = self.table
        entries = [entry for id_ in ids if (entry := table.rows.pop(id_, None)) is not None]
        wanted = {entry[0] for entry in entries}
        table.recalled -= wanted
        in_slots = {
            (entry[0], entry[1])
            for slot in self.crew.slots.values()
            for entry in slot.sent
            if entry[0] in wanted
        }
        for entry in entries:
            if (entry[0], entry[1]) in in_slots:
                table.dropped.add((entry[0], entry[1]))
            else:
                table.hand_back(entry)
        self._withdraw(wanted)
        for id_ in wanted:
            table.return_waiters(id_)

    def free(self, ids: Iterable[int]) -> None:
        """Forget values."""
        table = self.table
        gone = [id_ for id_ in ids if table.held.pop(id_, None) is not None]
        if gone:
            table.effects.append(FreeValues(gone))
        if table.given:
            for id_ in ids:
                table.given.pop(id_, None)

    def give(self, message: Give) -> None:
        """Keep small values until they are freed."""
        self.table.given.update(zip(message.ids, message.payloads, strict=True))

    def forget(self, fns: Iterable[int]) -> None:
        """Forget functions, each as soon as no row here calls it."""
        table = self.table
        called = {entry[2] for entry in table.rows.values()}
        for slot in self.crew.slots.values():
            called.update([entry[2] for entry in slot.sent])
        asked = set(fns) | self._forgotten
        self._forgotten = asked & called
        gone = asked - called
        for fn in gone:
            table.functions.pop(fn, None)
        for slot in self.crew.slots.values():
            known = sorted(slot.functions & gone)
            if known:
                slot.functions.difference_update(known)
                table.effects.append(ForgetFunctions(slot.number, known))

    def done_posted(self, message: Done, seq: int) -> None:
        """A Done from messages() got this number in the session."""
        if message.ids:
            self._unacked.append((seq, message))

    def acked(self, seq: int) -> None:
        """The broker has everything up to this number."""
        unacked, inline = self._unacked, self.table.inline
        while unacked and unacked[0][0] <= seq:
            for id_ in unacked.popleft()[1].ids:
                inline.pop(id_, None)

    def rejoin(self, now: float) -> list[Inventory]:
        """The broker knows this worker no more: what to tell it first when it takes us again.

        Rows go on and values stay, until it says which of them it does not want. The ends that
        it may not have heard of are told again behind the inventory, in which their rows count as
        running: an end counts only for an attempt that the broker has, or has taken back.
        """
        table = self.table
        done = ended_again([message for _, message in self._unacked], self._done)
        self._unacked.clear()
        self._done = done
        self._missing.clear()
        self._copied.clear()
        self._recall_asked = False
        # Rows given back are the broker's again in any case, and what it lent us it forgot.
        table.returned = ([], [])
        table.recalled.clear()
        table.given.clear()
        self.forget(list(table.functions))
        return inventory(done, table, self._new_credit(now), self._settings.batch_rows)

    def _withdraw(self, ids: set[int]) -> list[Entry]:
        """Take rows out of line; returns those that were in no slot.

        Those in slots are asked for; taken_back() then finds out which were got.
        """
        table = self.table
        if not ids:
            return []
        found: list[Entry] = []
        if any(entry[0] in ids for entry in table.ready):
            kept: deque[Entry] = deque()
            for entry in table.ready:
                (found if entry[0] in ids else kept).append(entry)
            table.ready = kept
        for slot in self.crew.slots.values():
            for position, entry in enumerate(slot.sent):
                if entry[0] in ids:
                    self.crew.take_back(slot, len(slot.sent) - position)
                    break
        for id_ in ids:
            waiting = table.rows.get(id_)
            if waiting and len(waiting) > 4 and waiting[4].need and not waiting[4].sent:
                found.append(waiting)
        return found

    # --- what slots say -----------------------------------------------------------------------

    def slot_done(
        self,
        number: int,
        statuses: bytes,
        payloads: Sequence[Any],
        busy_s: float,
        now: float,
        ids: list[int] | None = None,
    ) -> None:
        """Rows ended, in the order in which they were sent.

        payloads: blobs; for STORED a value that will be in the store after a KeepValue.
        busy_s: seconds that they took, 0.0 if unknown.
        ids: as the slot itself names them. Order alone would do, but the price of a mistake in it
        would be a wrong value under a right name; so a difference is an InternalError.
        """
        table = self.table
        slot = self.crew.slots[number]
        sent, n_rows = slot.sent, len(statuses)
        if n_rows > len(sent):
            raise InternalError(f"slot {number} reports {n_rows} rows of {len(sent)}")
        if ids is not None and [entry[0] for entry in islice(sent, n_rows)] != ids:
            story = [f"sent {entry[:2]}" for entry in islice(sent, n_rows)]
            raise InternalError(f"slot {number} reports other rows: {ids}", story)
        if busy_s:
            self.crew.pace.sample(busy_s, n_rows)
        slot.nbytes *= 1.0 - n_rows / len(sent)
        slot.heard(now)
        if slot.parked:
            self.crew.changed = True
        rows, waiters, inline, next_entry = table.rows, table.waiters, table.inline, sent.popleft
        ids, attempts, outcomes, blobs = self._done
        for status, payload in zip(statuses, payloads, strict=True):
            entry = next_entry()
            id_ = entry[0]
            if rows.get(id_) is not entry:
                dropped = table.was_dropped(entry)
                if status == SKIPPED:
                    if dropped:
                        table.hand_back(entry)
                    continue
                status, payload = CANCELLED, b""
            elif status == VALUE:
                del rows[id_]
                inline[id_] = payload
                if id_ in waiters:
                    table.resolve(id_, payload)
            elif status == SKIPPED:
                self.crew.unsend(entry)
                continue
            else:
                del rows[id_]
                if status == STORED:
                    table.effects.append(KeepValue(id_, payload))
                    table.held[id_] = payload.nbytes
                    payload = payload.nbytes.to_bytes(8, "little")
                    table.resolve(id_, (id_,))
                else:
                    table.return_waiters(id_)
            ids.append(id_)
            attempts.append(entry[1])
            outcomes.append(status)
            blobs.append(payload)
        if slot.doomed is not None:
            self.crew.spared(slot)

    def slot_died(self, number: int, text: str, running: bool, now: float) -> None:
        """The slot is gone. What it had finished was reported by slot_done() before.

        text: how it died.  running: its first row had begun: that row is blamed, and no other.
        """
        slot = self.crew.lost(number, text, now)
        if running and slot.sent:
            entry = slot.sent.popleft()
            status = CANCELLED
            if self.table.rows.get(entry[0]) is entry:
                status = DIED
                if slot.doomed is entry and slot.verdict is not None:
                    status, text = slot.verdict[0], f"{slot.verdict[1]}; {text}"
                del self.table.rows[entry[0]]
                self.table.return_waiters(entry[0])
            self.table.was_dropped(entry)
            ids, attempts, outcomes, blobs = self._done
            ids.append(entry[0])
            attempts.append(entry[1])
            outcomes.append(status)
            blobs.append(b"" if status == CANCELLED else packb([text]))
        self.crew.put_back(slot, list(reversed(slot.sent)))

    def slot_too_large(self, number: int, running: bool, text: str, now: float) -> None:
        """The slot's process has more memory than it may.

        running: its first row has begun, and is what took it.  text: how much, for people. An idle
        one is replaced: what it keeps would be blamed on its next row.
        """
        slot = self.crew.slots[number]
        if slot.sent and running:
            self.crew.doom(slot, (OVERSIZE, text), now)
        elif not slot.sent and slot.started:
            del self.crew.slots[number]
            self.crew.changed = True
            self.table.effects.append(StopSlot(number))

    def first_row(self, number: int) -> int:
        """The id of the first row in a slot that has not been reported; 0 if there is none."""
        sent = self.crew.slots[number].sent
        return sent[0][0] if sent else 0

    def row_at(self, number: int, place: int) -> tuple[int, int] | None:
        """Id and attempt of the row at a place among those that a slot has not reported."""
        slot = self.crew.slots.get(number)
        if slot is None or not 0 <= place < len(slot.sent):
            return None
        entry = slot.sent[place]
        return entry[0], entry[1]

    def running_in(self, number: int) -> str:
        """For people: the call in front in a slot, and which try it is; "" if there is none."""
        sent = self.crew.slots[number].sent
        if not sent:
            return ""
        id_, attempt, fn = sent[0][:3]
        name = self.table.functions[fn][1] if fn in self.table.functions else "task"
        return f"{name}-{counter_of(id_)}, try {try_of(attempt)}"

    def is_doomed(self, number: int) -> bool:
        """Whether a slot was to be killed because nobody wants its row."""
        slot = self.crew.slots[number]
        return slot.doomed is not None and slot.verdict is None

    def slot_blocked(self, number: int) -> None:
        """The slot's row waits for other rows; it needs no processor meanwhile."""
        slot = self.crew.slots[number]
        slot.blocked = True
        self._tell_blocked()
        self.crew.changed = True
        if len(slot.sent) > 1:
            self.crew.take_back(slot, len(slot.sent) - 1)

    def slot_unblocked(self, number: int) -> None:
        """The slot's row goes on."""
        self.crew.slots[number].blocked = False
        self._tell_blocked()
        self.crew.changed = True

    def _tell_blocked(self) -> None:
        """The broker must hear of it even if no row ends: a row that waits needs another one."""
        self._blocked_changed = True
        self._credit_at = 0.0

    # --- what the store says ------------------------------------------------------------------

    def value_fetched(self, id_: int, nbytes: int) -> None:
        """A FetchValue ended well: the value is in the store."""
        table = self.table
        table.fetching.discard(id_)
        if id_ in table.held:
            return  # a row made it here meanwhile
        if not any(table.is_waiting(entry) for entry, _ in table.waiters.get(id_, ())):
            table.waiters.pop(id_, None)
            table.effects.append(FreeValues([id_]))
            return
        table.held[id_] = nbytes
        self._copied.append(id_)
        table.resolve(id_, (id_,))

    def fetch_failed(self, id_: int) -> None:
        """No source had the value."""
        self.table.fetching.discard(id_)
        self._missing.append(id_)
        for entry, _ in self.table.waiters.pop(id_, ()):
            if self.table.is_waiting(entry):
                self.table.give_back(entry)

    def value_lost(self, id_: int) -> None:
        """A value that was in the store cannot be read any more: rows that need it are given back
        when their turn comes, and the broker looks for another holder or has it made again."""
        if self.table.held.pop(id_, None) is not None:
            self._missing.append(id_)

    def set_full(self, full: bool) -> None:
        """Whether the store has no memory for the results of more rows. Those that run go on; what
        had been handed to slots ahead of that comes back, and waits here."""
        if full is not self._full:
            self._full = full
            self.crew.hold(full)
            self._tell_blocked()

    def value_put(self, id_: int, nbytes: int) -> None:
        """Somebody put a value into the store, on no row's account."""
        self.table.held[id_] = nbytes

    # --- what is to be done -------------------------------------------------------------------

    def effects(self, now: float) -> list[Effect]:
        """What to do, in this order. Call again after performing it, until there is nothing."""
        table = self.table
        if self.crew.changed:
            self.crew.keep_enough(now)
        if table.ready or table.waiters:
            self.crew.assign(now)
        if not table.ready:
            self.crew.steal(now)
        self.crew.look(now)
        effects, table.effects = table.effects, []
        return effects

    # --- what is to be said -------------------------------------------------------------------

    def messages(self, now: float) -> list[Message]:
        """What to post to the broker. Tell done_posted() the number of each Done."""
        messages: list[Message] = []
        if self._missing:
            messages.append(Missing(self._missing))
            self._missing = []
        if self._done[0]:
            if self._forgotten:
                self.forget(self._forgotten)
            self._flush_done(messages, self._new_credit(now))
        if self.table.returned[0] or self._recall_asked:
            self._recall_asked = False
            messages.append(Returned(*self.table.returned, self._new_credit(now)))
            self.table.returned = ([], [])
        if self._copied:
            messages.append(Holds(self._copied))
            self._copied = []
        if not messages and now >= self._credit_at:
            # Somebody waits inside a task, or a long row began: no row may end for a while.
            told = self._credit_told
            if not told / 2 < self.credit(now) <= 2 * told or self._blocked_changed:
                messages.append(Done([], [], b"", [], self._new_credit(now)))
            self._credit_at = now + CREDIT_S
        return messages

    def _new_credit(self, now: float) -> int:
        self._blocked_changed = False
        self._credit_told = self.credit(now)
        return self._credit_told

    def _flush_done(self, messages: list[Message], credit: int) -> None:
        """One Done, or several where one would be too large for a frame."""
        ids, attempts, statuses, payloads = self._done
        self._done = ([], [], bytearray(), [])
        limit, most = self._settings.batch_bytes, self._settings.batch_rows
        if len(ids) <= most and sum(map(len, payloads)) <= limit:
            messages.append(Done(ids, attempts, bytes(statuses), payloads, credit))
            return
        start = nbytes = 0
        for index, payload in enumerate(payloads):
            if index > start and (nbytes + len(payload) > limit or index - start >= most):
                part = slice(start, index)
                messages.append(
                    Done(ids[part], attempts[part], bytes(statuses[part]), payloads[part], credit)
                )
                start, nbytes = index, 0
            nbytes += len(payload)
        part = slice(start, len(ids))
        messages.append(
            Done(ids[part], attempts[part], bytes(statuses[part]), payloads[part], credit)
        )

    def credit(self, now: float) -> int:
        """Rows that this worker is willing to hold now, running and blocked ones included."""
        if self._leaving:
            return 0
        slots = self.crew.slots.values()
        n_blocked = sum(slot.blocked for slot in slots)
        if self._full:
            return n_blocked
        quiet = [now - s.quiet_since for s in slots if s.sent and not s.blocked]
        return n_blocked + self.crew.pace.credit(self.crew.n_slots, quiet[: self.crew.n_slots])

    def answers_soon(self, within_s: float) -> bool:
        """Whether a few short rows run and nothing else is to be done: a slot will report at
        once, where many would be reported after 1 ms of work."""
        return (
            0.0 < self.crew.pace.row_s < within_s / 2
            and 0 < len(self.table.rows) <= self.crew.n_slots
            and not self.table.ready
            and self.n_running > 0
        )

    @property
    def failure(self) -> str:
        """Why no slot can be started, once that is certain, else ""."""
        return self.crew.failure

    @property
    def n_rows(self) -> int:
        """Rows held."""
        return len(self.table.rows)

    @property
    def n_running(self) -> int:
        """Slots that have something to do."""
        return sum(bool(slot.sent) for slot in self.crew.slots.values())

    @property
    def n_slots(self) -> int:
        """Slots there are, spare and blocked ones included."""
        return len(self.crew.slots)

    def is_idle(self) -> bool:
        """Whether nothing is here to be done or told."""
        return not (
            self.table.rows or self._done[0] or self.table.returned[0] or self.table.fetching
        )
