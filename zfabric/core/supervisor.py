"""The worker's machine: which rows wait, which run in which slot, and what the broker hears.

No I/O and no clock: events come in as calls with `now`, what is to be done comes out of
`effects()`, what is to be said out of `messages()`, both once per turn.

A row's way. It arrives in a Run and waits until all its values are here: those that ride along
are, those in the store are, a REMOTE one is fetched, and a LOCAL one may still have to be made by
a row that is here too (the successor rule: the broker sends a row before its input exists, if
the row that makes the input is at the same worker). Then it is ready, and goes to a slot in the
order of arrival. Slots hold rows ahead of need, a few milliseconds of work. When a slot stands
idle while another has rows that it has not begun, some of those are taken back.

A row that waits for nothing but rows in one slot may follow them there before they have run: the
slot keeps their results for it. So a chain of short rows never leaves its slot.

Rows whose input will not come. When a row ends here without a value (it raised, killed its
process, was dropped or given back), every row that waits for it here is given back in a Returned
behind the Done that tells of the end, and so on. So is a row that comes with a LOCAL value that
is nowhere here: its input ended while the row was on its way. Inline values made here are kept
until the broker has acknowledged the Done that carried them: until then it may still send rows
that call them LOCAL. Those that the broker gave are kept until it frees them.

A slot that waits for a future of its own is blocked: the rows behind it come back and another
slot runs in its place, so that parents which wait never keep their children from running.

A row that is dropped while it runs goes on; its outcome is reported as CANCELLED, without a value.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from math import inf
from typing import Any

from msgpack import packb

from zfabric.config import DEFAULTS, Settings
from zfabric.core.pace import Pace
from zfabric.core.supervisor_effects import (
    SKIPPED,
    Effect,
    FetchValue,
    ForgetFunctions,
    FreeValues,
    KeepValue,
    PeekSlot,
    SendRows,
    StartSlot,
    StopSlot,
    TakeBack,
)
from zfabric.core.supervisor_rows import (
    NOWHERE,
    SCATTERED,
    STUCK_S,
    Entry,
    Linked,
    SlotRecord,
)
from zfabric.errors import InternalError, RemoteProtocolError
from zfabric.messages import (
    CANCELLED,
    DIED,
    INLINE,
    LOCAL,
    STORED,
    VALUE,
    Done,
    Give,
    Holds,
    Message,
    Missing,
    Returned,
    Run,
)

SLOT_NBYTES = 64 * 1024
"""Payload bytes in a slot's socket, above which only a single row is added: half its buffer."""

STEAL_S = 0.001
"""Work that another slot must have before an idle one takes some of it: taking back costs two
hops of 50 us and stops the flow to that slot meanwhile."""

FOLLOW_S = 0.0005
"""Rows follow others into their slot only if they are shorter: for longer ones the hop that it
saves is nothing, and the place that it takes is something."""

MAX_SPARES = 8
"""Parked slots kept for the next time that a parent waits. Trees of tasks block and go on all
the time, and a slot that has to be started costs more than most tasks; an idle one only memory."""

MAX_PEEK_PAUSE_S = 0.05

CREDIT_S = 0.02
"""Between two looks whether the credit that was told last is still about right."""

MAX_FAILED_STARTS = 3

RETRY_START_S = 0.2


class Supervisor:
    """See above.

    n_slots: rows that run at a time.  start_at: when to start the first slots; default: now.
    failure: why no slot can be started, once that is certain, else "".
    """

    def __init__(
        self,
        n_slots: int,
        *,
        settings: Settings = DEFAULTS,
        now: float,
        start_at: float | None = None,
    ) -> None:
        self._settings = settings
        self._n_slots = n_slots
        self._pace = Pace(settings.lookahead_s, settings.max_rows)
        self.failure = ""

        self._functions: dict[int, tuple[int, str, bytes]] = {}
        self._rows: dict[int, Entry] = {}
        """Every row that is here and wanted. One that is in a slot but not here was dropped, or
        what it waits for ended without a value."""
        self._ready: deque[Entry] = deque()
        self._waiters: dict[int, list[tuple[Entry, int]]] = {}
        """For a value that is not here: rows that need it, and as which of their values."""
        self._inline: dict[int, bytes] = {}
        self._given: dict[int, bytes] = {}
        """Small values that the broker sent ahead of the rows that need them."""
        self._held: dict[int, int] = {}
        """Values in the store, with their sizes."""
        self._fetching: set[int] = set()
        self._recalled: set[int] = set()
        self._recall_asked = False
        self._forgotten: set[int] = set()
        """Functions that the broker took away, but that a row here still calls."""
        self._unacked: deque[tuple[int, Sequence[int]]] = deque()

        self._slots: dict[int, SlotRecord] = {}
        self._slots_changed = True
        """Whether there may be too few or too many of them."""
        self._last_slot = 0
        self._failed_starts = 0
        self._start_at = now if start_at is None else start_at

        self._effects: list[Effect] = []
        self._done: tuple[list[int], list[int], bytearray, list[bytes]] = ([], [], bytearray(), [])
        self._returned: tuple[list[int], list[int]] = ([], [])
        self._missing: list[int] = []
        self._copied: list[int] = []
        self._credit_told = self._pace.credit(n_slots, ())
        self._credit_at = now
        self._blocked_changed = False

    # --- what the broker says -----------------------------------------------------------------

    def run(self, message: Run) -> None:
        """Rows to run. Raises RemoteProtocolError for a function that was never sent."""
        functions, rows = self._functions, self._rows
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
        if not message.deps:
            entries = list(entries)
            rows.update(zip(message.ids, entries, strict=True))
            self._ready.extend(entries)
            return
        deps = dict(message.deps)
        for index, entry in enumerate(entries):
            if index in deps:
                self._link(entry, deps[index])
            else:
                rows[entry[0]] = entry
                self._ready.append(entry)

    def _link(self, row: Entry, deps: Sequence[tuple[int, int, Any]]) -> None:
        """Take in a row with dependencies."""
        linked = Linked()
        entry = (*row, linked)
        waits: list[tuple[int, int]] = []
        for index, (dep, kind, info) in enumerate(deps):
            value: Any = None
            if kind == INLINE:
                value = info
            elif dep in self._held:
                value = (dep,)
            elif dep in self._inline:
                value = self._inline[dep]
            elif dep in self._given:
                value = self._given[dep]
            elif kind == LOCAL:
                if dep not in self._rows and dep not in self._fetching:
                    self._return(row)  # It ended without a value, and that is on its way.
                    return
                waits.append((dep, index))
            else:
                if dep not in self._fetching:
                    nbytes, sources = info
                    self._fetching.add(dep)
                    places = [(number, address) for number, address in sources]
                    self._effects.append(FetchValue(dep, nbytes, places))
                waits.append((dep, index))
            linked.deps.append(dep)
            linked.values.append(value)
        self._rows[entry[0]] = entry
        linked.need = len(waits)
        for dep, index in waits:
            self._waiters.setdefault(dep, []).append((entry, index))
        if not waits:
            self._ready.append(entry)

    def recall(self, ids: Iterable[int]) -> None:
        """Give these back unless they have begun."""
        self._recall_asked = True
        wanted = self._rows.keys() & set(ids)
        self._recalled |= wanted
        for entry in self._withdraw(wanted):
            self._recalled.discard(entry[0])
            self._give_back(entry)

    def drop(self, ids: Iterable[int]) -> None:
        """Forget these; one that has begun goes on. Those that wait for them are given back."""
        entries = [entry for id_ in ids if (entry := self._rows.pop(id_, None)) is not None]
        wanted = {entry[0] for entry in entries}
        self._recalled -= wanted
        self._withdraw(wanted)
        for id_ in wanted:
            self._return_waiters(id_)

    def free(self, ids: Iterable[int]) -> None:
        """Forget values."""
        gone = [id_ for id_ in ids if self._held.pop(id_, None) is not None]
        if gone:
            self._effects.append(FreeValues(gone))
        if self._given:
            for id_ in ids:
                self._given.pop(id_, None)

    def give(self, message: Give) -> None:
        """Keep small values until they are freed."""
        self._given.update(zip(message.ids, message.payloads, strict=True))

    def forget(self, fns: Iterable[int]) -> None:
        """Forget functions, each as soon as no row here calls it."""
        called = {entry[2] for entry in self._rows.values()}
        for slot in self._slots.values():
            called.update([entry[2] for entry in slot.sent])
        asked = set(fns) | self._forgotten
        self._forgotten = asked & called
        gone = asked - called
        for fn in gone:
            self._functions.pop(fn, None)
        for slot in self._slots.values():
            known = sorted(slot.functions & gone)
            if known:
                slot.functions.difference_update(known)
                self._effects.append(ForgetFunctions(slot.number, known))

    def done_posted(self, message: Done, seq: int) -> None:
        """A Done from messages() got this number in the session."""
        if message.ids:
            self._unacked.append((seq, message.ids))

    def acked(self, seq: int) -> None:
        """The broker has everything up to this number."""
        unacked, inline = self._unacked, self._inline
        while unacked and unacked[0][0] <= seq:
            for id_ in unacked.popleft()[1]:
                inline.pop(id_, None)

    def _withdraw(self, ids: set[int]) -> list[Entry]:
        """Take rows out of line; returns those that were in no slot.

        Those in slots are asked for; taken_back() then finds out which were got.
        """
        if not ids:
            return []
        found: list[Entry] = []
        if any(entry[0] in ids for entry in self._ready):
            kept: deque[Entry] = deque()
            for entry in self._ready:
                (found if entry[0] in ids else kept).append(entry)
            self._ready = kept
        for slot in self._slots.values():
            for position, entry in enumerate(slot.sent):
                if entry[0] in ids:
                    self._take_back(slot, len(slot.sent) - position)
                    break
        for id_ in ids:
            waiting = self._rows.get(id_)
            if waiting and len(waiting) > 4 and waiting[4].need and not waiting[4].sent:
                found.append(waiting)
        return found

    # --- what slots say -----------------------------------------------------------------------

    def slot_started(self, number: int, now: float) -> None:
        """The slot is ready for rows."""
        slot = self._slots[number]
        slot.started = True
        slot.heard(now)
        self._slots_changed = True
        self._failed_starts = 0

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
        slot = self._slots[number]
        sent, n_rows = slot.sent, len(statuses)
        if n_rows > len(sent):
            raise InternalError(f"slot {number} reports {n_rows} rows of {len(sent)}")
        if ids is not None and [entry[0] for entry in islice(sent, n_rows)] != ids:
            story = [f"sent {entry[:2]}" for entry in islice(sent, n_rows)]
            raise InternalError(f"slot {number} reports other rows: {ids}", story)
        if busy_s:
            self._pace.sample(busy_s, n_rows)
        slot.nbytes *= 1.0 - n_rows / len(sent)
        slot.heard(now)
        if slot.parked:
            self._slots_changed = True
        rows, waiters, inline, next_entry = self._rows, self._waiters, self._inline, sent.popleft
        ids, attempts, outcomes, blobs = self._done
        for status, payload in zip(statuses, payloads, strict=True):
            entry = next_entry()
            id_ = entry[0]
            if rows.get(id_) is not entry:
                if status == SKIPPED:
                    continue
                status, payload = CANCELLED, b""
            elif status == VALUE:
                del rows[id_]
                inline[id_] = payload
                if id_ in waiters:
                    self._resolve(id_, payload)
            elif status == SKIPPED:
                self._unsend(entry)
                continue
            else:
                del rows[id_]
                if status == STORED:
                    self._effects.append(KeepValue(id_, payload))
                    self._held[id_] = payload.nbytes
                    payload = payload.nbytes.to_bytes(8, "little")
                    self._resolve(id_, (id_,))
                else:
                    self._return_waiters(id_)
            ids.append(id_)
            attempts.append(entry[1])
            outcomes.append(status)
            blobs.append(payload)

    def slot_reset(self, number: int) -> None:
        """The slot knows that rows were taken back."""
        self._slots[number].resetting = False

    def slot_settled(self, number: int) -> None:
        """Part of the answer to a PeekSlot: it keeps nothing to itself, and will report when its
        running row ends."""
        self._slots[number].peek_at = inf

    def _take_back(self, slot: SlotRecord, most: int) -> None:
        slot.asked = True
        self._effects.append(TakeBack(slot.number, most))

    def taken_back(self, number: int, count: int) -> None:
        """The last `count` rows sent are not the slot's any more: the answer to a TakeBack."""
        slot = self._slots[number]
        slot.asked = False
        if count:
            slot.resetting = True
            back = [slot.sent.pop() for _ in range(count)]
            self._put_back(slot, back)
        # A slot that gave less than it has begins the row after: nothing more can be had.
        slot.bare = True
        if self._recalled:
            self._recalled.difference_update([entry[0] for entry in slot.sent])

    def _put_back(self, slot: SlotRecord, entries: list[Entry]) -> None:
        """Entries that a slot will not run, last one first, are in line again, in front."""
        recalled: list[Entry] = []
        for entry in entries:
            slot.nbytes = max(0.0, slot.nbytes - len(entry[3]))
            id_ = entry[0]
            if self._rows.get(id_) is not entry:
                if id_ not in self._rows:  # else it is another attempt that was recalled
                    self._recalled.discard(id_)
                continue
            if len(entry) > 4:
                entry[4].sent = False
            if id_ in self._recalled:
                self._recalled.discard(id_)
                recalled.append(entry)
            else:
                self._unsend(entry)
        for entry in reversed(recalled):
            self._give_back(entry)
        for entry in slot.followers:
            if not entry[4].sent:
                entry[4].home, entry[4].near = NOWHERE, 0
        slot.followers.clear()

    def _unsend(self, entry: Entry) -> None:
        """A row that a slot did not run after all is ready, or waits."""
        self._unplace(entry[0])
        if len(entry) > 4:
            linked = entry[4]
            linked.sent = False
            linked.home, linked.near = NOWHERE, 0
            if linked.need:
                return
        self._ready.appendleft(entry)

    def _unplace(self, id_: int) -> None:
        """Rows that would have followed this one must wait for it, wherever it runs."""
        for waiter, _ in self._waiters.get(id_, ()):
            if not waiter[4].sent:
                waiter[4].home, waiter[4].near = SCATTERED, 0

    def slot_died(self, number: int, text: str, running: bool, now: float) -> None:
        """The slot is gone. What it had finished was reported by slot_done() before.

        text: how it died.  running: its first row had begun: that row is blamed, and no other.
        """
        slot = self._slots.pop(number)
        self._slots_changed = True
        # What was to be done with it in this very turn is void.
        self._effects = [e for e in self._effects if getattr(e, "slot", None) != number]
        if not slot.started:
            self._failed_starts += 1
            self._start_at = now + RETRY_START_S * self._failed_starts
            if self._failed_starts >= MAX_FAILED_STARTS:
                self.failure = (
                    f"{self._failed_starts} slots in a row died before they were ready; the last: "
                    + text
                )
        if running and slot.sent:
            entry = slot.sent.popleft()
            status = CANCELLED
            if self._rows.get(entry[0]) is entry:
                status = DIED
                del self._rows[entry[0]]
                self._return_waiters(entry[0])
            ids, attempts, outcomes, blobs = self._done
            ids.append(entry[0])
            attempts.append(entry[1])
            outcomes.append(status)
            blobs.append(packb([text]) if status == DIED else b"")
        self._put_back(slot, list(reversed(slot.sent)))

    def slot_blocked(self, number: int) -> None:
        """The slot's row waits for other rows; it needs no processor meanwhile."""
        slot = self._slots[number]
        slot.blocked = True
        self._tell_blocked()
        self._slots_changed = True
        if len(slot.sent) > 1:
            self._take_back(slot, len(slot.sent) - 1)

    def slot_unblocked(self, number: int) -> None:
        """The slot's row goes on."""
        self._slots[number].blocked = False
        self._tell_blocked()
        self._slots_changed = True

    def _tell_blocked(self) -> None:
        """The broker must hear of it even if no row ends: a row that waits needs another one."""
        self._blocked_changed = True
        self._credit_at = 0.0

    # --- what the store says ------------------------------------------------------------------

    def value_fetched(self, id_: int, nbytes: int) -> None:
        """A FetchValue ended well: the value is in the store."""
        self._fetching.discard(id_)
        if id_ in self._held:
            return  # a row made it here meanwhile
        if not any(self._is_waiting(entry) for entry, _ in self._waiters.get(id_, ())):
            self._waiters.pop(id_, None)
            self._effects.append(FreeValues([id_]))
            return
        self._held[id_] = nbytes
        self._copied.append(id_)
        self._resolve(id_, (id_,))

    def fetch_failed(self, id_: int) -> None:
        """No source had the value."""
        self._fetching.discard(id_)
        self._missing.append(id_)
        for entry, _ in self._waiters.pop(id_, ()):
            if self._is_waiting(entry):
                self._give_back(entry)

    def value_put(self, id_: int, nbytes: int) -> None:
        """Somebody put a value into the store, on no row's account."""
        self._held[id_] = nbytes

    # --- rows that wait -----------------------------------------------------------------------

    def _is_waiting(self, entry: Entry) -> bool:
        return self._rows.get(entry[0]) is entry

    def _resolve(self, id_: int, value: Any) -> None:
        """A value is here: rows that only waited for it are ready, in front of those that came
        after them."""
        ready: list[Entry] = []
        for entry, index in self._waiters.pop(id_, ()):
            if self._rows.get(entry[0]) is not entry:
                continue
            linked = entry[4]
            linked.values[index] = value
            linked.need -= 1
            if linked.near:
                linked.near -= 1
            if not linked.need and not linked.sent:
                ready.append(entry)
        if ready:
            self._ready.extendleft(reversed(ready))

    def _return_waiters(self, id_: int) -> None:
        """A row ended without a value: those that wait for it are given back, and so on."""
        ended = [id_]
        while ended:
            for entry, _ in self._waiters.pop(ended.pop(), ()):
                if self._rows.get(entry[0]) is entry:
                    del self._rows[entry[0]]
                    self._return(entry)
                    ended.append(entry[0])

    def _return(self, row: Entry) -> None:
        """Tell the broker that this attempt will not run."""
        self._returned[0].append(row[0])
        self._returned[1].append(row[1])

    def _give_back(self, entry: Entry) -> None:
        """The broker gets a row back that has not begun, unless that vanished with another."""
        if self._rows.get(entry[0]) is not entry:
            return
        del self._rows[entry[0]]
        self._return(entry)
        self._return_waiters(entry[0])

    # --- what is to be done -------------------------------------------------------------------

    def effects(self, now: float) -> list[Effect]:
        """What to do, in this order. Call again after performing it, until there is nothing."""
        if self._slots_changed:
            self._keep_enough_slots(now)
        if self._ready or self._waiters:
            self._assign(now)
        if not self._ready:
            self._steal(now)
        for slot in self._slots.values():
            if len(slot.sent) > 1 and now >= slot.peek_at:
                slot.peek_pause = min(2 * slot.peek_pause, MAX_PEEK_PAUSE_S)
                slot.peek_at = now + slot.peek_pause
                self._effects.append(PeekSlot(slot.number))
        effects, self._effects = self._effects, []
        return effects

    def wake_at(self, now: float) -> float | None:
        """When to call effects() at the latest, though nothing happens; None: no need."""
        wake: float | None = None
        if self._start_at > now and self._n_active() < self._n_slots:
            wake = self._start_at
        for slot in self._slots.values():
            if len(slot.sent) > 1 and slot.peek_at < (inf if wake is None else wake):
                wake = slot.peek_at
        return wake

    def _n_active(self) -> int:
        return sum(not (slot.blocked or slot.parked) for slot in self._slots.values())

    def _keep_enough_slots(self, now: float) -> None:
        """As many slots that are not blocked as asked for: start, unpark, park, stop."""
        slots = self._slots
        self._slots_changed = False
        missing = self._n_slots - self._n_active()
        while missing > 0:
            missing -= 1
            parked = next((s for s in slots.values() if s.parked and not s.blocked), None)
            if parked is not None:
                parked.parked = False
            elif now >= self._start_at and not self.failure:
                self._last_slot += 1
                slots[self._last_slot] = SlotRecord(self._last_slot, now)
                self._effects.append(StartSlot(self._last_slot))
            else:
                self._slots_changed = True
        while missing < 0:
            missing += 1
            active = [s for s in slots.values() if not (s.blocked or s.parked)]
            min(active, key=lambda s: (len(s.sent), -s.number)).parked = True
        spares = [s for s in slots.values() if s.parked and not s.sent and s.started]
        for slot in spares[MAX_SPARES:]:
            del slots[slot.number]
            self._effects.append(StopSlot(slot.number))

    def _assign(self, now: float) -> None:
        """Share the ready rows among the slots that have room, the emptiest first."""
        depth = self._pace.depth()
        takers = [s for s in self._slots.values() if s.takes_rows and len(s.sent) < depth]
        if not takers:
            return
        takers.sort(key=lambda s: (len(s.sent), -s.quiet_since))
        in_slots = sum(len(s.sent) for s in takers)
        # All takers filled to one level, rounded up.
        level = min(depth, -(-(in_slots + len(self._ready)) // len(takers)))
        for slot in takers:
            room = level - len(slot.sent)
            if (room > 0 and self._ready) or slot.followers:
                self._send(slot, room, depth, now)

    def _send(self, slot: SlotRecord, room: int, depth: int, now: float) -> None:
        """Up to `room` ready rows into a slot, each with those that may follow it there."""
        ready, followers, waiters, known = (
            self._ready,
            slot.followers,
            self._waiters,
            slot.functions,
        )
        sent = slot.sent
        rows: list[Sequence[Any]] = []
        functions: list[tuple[int, str, bytes]] = []
        nbytes = slot.nbytes
        may_follow = 0.0 < self._pace.row_s < FOLLOW_S
        if not sent:
            slot.heard(now)
        while True:
            if followers:
                if len(sent) >= depth:
                    break
                entry = followers.popleft()
                if self._rows.get(entry[0]) is not entry or entry[4].sent or not entry[4].need:
                    continue
                if entry[4].home != slot.number:
                    continue
            elif room > 0 and ready:
                room -= 1
                entry = ready.popleft()
            else:
                break
            if len(entry) > 4 and not self._has_values(entry):
                self._give_back(entry)
                continue
            fn = entry[2]
            if fn not in known:
                known.add(fn)
                functions.append(self._functions[fn])
            keep = may_follow and entry[0] in waiters and self._place(entry[0], slot)
            sent.append(entry)
            if len(entry) > 4:
                rows.append(_linked_row(entry, keep))
                nbytes += sum(len(v) for v in entry[4].values if type(v) is bytes)
            elif keep:
                rows.append([*entry, (), True])
            else:
                rows.append(entry)
            nbytes += len(entry[3])
            if nbytes > SLOT_NBYTES:
                break
        slot.nbytes = nbytes
        if rows:
            slot.bare = False
            self._effects.append(SendRows(slot.number, functions, rows))

    def _has_values(self, entry: Entry) -> bool:
        """Whether its stored values are still here: the broker may have freed one because other
        workers could not fetch it, and will have it made again."""
        held = self._held
        return all(type(v) is not tuple or v[0] in held for v in entry[4].values)

    def _place(self, id_: int, slot: SlotRecord) -> bool:
        """A row is about to be sent: whether its result is to be kept for one that follows.

        Only for a sole waiter: several would run one after the other here, though other slots
        may stand idle.
        """
        waiting = self._waiters[id_]
        if len(waiting) > 1:
            for entry, _ in waiting:
                entry[4].home = SCATTERED
            return False
        entry = waiting[0][0]
        if self._rows.get(entry[0]) is not entry:
            return False
        linked = entry[4]
        if linked.home == NOWHERE:
            linked.home = slot.number
        elif linked.home != slot.number:
            linked.home = SCATTERED
            return False
        linked.near += 1
        if linked.near == linked.need:
            slot.followers.append(entry)
        return True

    def _steal(self, now: float) -> None:
        """An idle slot takes rows back from one that has many, or is stuck in a long row."""
        idle = False
        best: SlotRecord | None = None
        for slot in self._slots.values():
            if not slot.sent:
                idle = idle or slot.takes_rows
            elif len(slot.sent) > 1 and not slot.bare and not slot.asked:
                stuck = now - slot.quiet_since >= STUCK_S
                if stuck or len(slot.sent) * self._pace.row_s > STEAL_S:
                    if best is None or len(slot.sent) > len(best.sent):
                        best = slot
        if not idle or best is None:
            return
        if sum(len(entry) == 4 or not entry[4].need for entry in best.sent) > 1:
            stuck = now - best.quiet_since >= STUCK_S
            count = len(best.sent) - 1 if stuck else len(best.sent) // 2
            self._take_back(best, count)

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
        if self._returned[0] or self._recall_asked:
            self._recall_asked = False
            messages.append(Returned(*self._returned, self._new_credit(now)))
            self._returned = ([], [])
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
        slots = self._slots.values()
        n_blocked = sum(slot.blocked for slot in slots)
        quiet = [now - s.quiet_since for s in slots if s.sent and not s.blocked]
        return n_blocked + self._pace.credit(self._n_slots, quiet[: self._n_slots])

    def answers_soon(self, within_s: float) -> bool:
        """Whether a few short rows run and nothing else is to be done: a slot will report at
        once, where many would be reported after 1 ms of work."""
        return (
            0.0 < self._pace.row_s < within_s / 2
            and 0 < len(self._rows) <= self._n_slots
            and not self._ready
            and self.n_running > 0
        )

    @property
    def n_rows(self) -> int:
        """Rows held."""
        return len(self._rows)

    @property
    def n_running(self) -> int:
        """Slots that have something to do."""
        return sum(bool(slot.sent) for slot in self._slots.values())

    @property
    def n_slots(self) -> int:
        """Slots there are, spare and blocked ones included."""
        return len(self._slots)

    def is_idle(self) -> bool:
        """Whether nothing is here to be done or told."""
        return not (self._rows or self._done[0] or self._returned[0] or self._fetching)


def _linked_row(entry: Entry, keep: bool) -> list[Any]:
    """A row with dependencies as the slot reads it."""
    linked = entry[4]
    linked.sent = True
    values = linked.values
    if linked.need:
        values = [
            dep if value is None else value for dep, value in zip(linked.deps, values, strict=True)
        ]
    return [*entry[:4], list(values), keep]
