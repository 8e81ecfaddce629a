"""The slots of one worker: how many there are, and which row goes into which of them.

The other half of the worker's machine; `core.supervisor` describes the whole. Ready rows are shared
out among the slots that have room, a few milliseconds of work each. When a slot stands idle while
another has rows that it has not begun, some of those are taken back.

A row that waits for nothing but rows in one slot may follow them there before they have run: the
slot keeps their results for it. So a chain of short rows never leaves its slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from zfabric.core.pace import Pace
from zfabric.core.supervisor_effects import (
    AgeOfRow,
    KillRow,
    PeekSlot,
    SendRows,
    StartSlot,
    StopSlot,
    TakeBack,
)
from zfabric.core.supervisor_rows import NOWHERE, SCATTERED, STUCK_S, Entry, SlotRecord
from zfabric.core.supervisor_table import RowTable
from zfabric.messages import LATE

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

KILL_AGAIN_S = 0.001
"""A row that is to be killed and has not quite begun will have by then; the pause doubles."""

MAX_KILL_PAUSE_S = 0.05

MAX_FAILED_STARTS = 3

RETRY_START_S = 0.2


class SlotCrew:
    """See above.

    n_slots: rows that run at a time.  start_at: when to start the next slots, seconds.
    failure: why no slot can be started, once that is certain, else "".
    changed: whether there may be too few or too many of them.
    can_kill: whether a row can be ended with its slot; a thread cannot.
    has_limits: whether there may be rows that must not run for ever.
    held: whether ready rows wait until `hold` says otherwise.
    """

    def __init__(
        self, table: RowTable, n_slots: int, pace: Pace, start_at: float, can_kill: bool
    ) -> None:
        self.can_kill = can_kill
        self.has_limits = False
        self.n_slots = n_slots
        self.pace = pace
        self.slots: dict[int, SlotRecord] = {}
        self.changed = True
        self.failure = ""
        self.held = False
        self.start_at = start_at
        self._table = table
        self._last_slot = 0
        self._failed_starts = 0

    def started(self, number: int, now: float) -> None:
        """The slot is ready for rows."""
        slot = self.slots[number]
        slot.started = True
        slot.heard(now)
        self.changed = True
        self._failed_starts = 0

    def reset(self, number: int) -> None:
        """The slot knows that rows were taken back."""
        self.slots[number].resetting = False

    def settled(self, number: int) -> None:
        """Part of the answer to a PeekSlot: it keeps nothing to itself, and will report when its
        running row ends."""
        self.slots[number].peek_at = inf

    def lost(self, number: int, text: str, now: float) -> SlotRecord:
        """A slot is gone: what it had is in its record. text: how it died."""
        slot = self.slots.pop(number)
        self.changed = True
        # What was to be done with it in this very turn is void.
        table = self._table
        table.effects = [e for e in table.effects if getattr(e, "slot", None) != number]
        if not slot.started:
            self._failed_starts += 1
            self.start_at = now + RETRY_START_S * self._failed_starts
            if self._failed_starts >= MAX_FAILED_STARTS:
                self.failure = (
                    f"{self._failed_starts} slots in a row died before they were ready; the last: "
                    + text
                )
        return slot

    # --- how many there are -------------------------------------------------------------------

    def wake_at(self, now: float) -> float | None:
        """When to call effects() at the latest, though nothing happens; None: no need."""
        wake: float | None = None
        if self.start_at > now and self.n_active() < self.n_slots:
            wake = self.start_at
        for slot in self.slots.values():
            if len(slot.sent) > 1 and slot.peek_at < (inf if wake is None else wake):
                wake = slot.peek_at
            if slot.doomed is not None or self.has_limits:
                due = self._watch_at(slot)
                if due < (inf if wake is None else wake):
                    wake = due
        return wake

    def n_active(self) -> int:
        return sum(not (slot.blocked or slot.parked) for slot in self.slots.values())

    def keep_enough(self, now: float) -> None:
        """As many slots that are not blocked as asked for: start, unpark, park, stop."""
        slots = self.slots
        self.changed = False
        missing = self.n_slots - self.n_active()
        while missing > 0:
            missing -= 1
            parked = next((s for s in slots.values() if s.parked and not s.blocked), None)
            if parked is not None:
                parked.parked = False
            elif now >= self.start_at and not self.failure:
                self._last_slot += 1
                slots[self._last_slot] = SlotRecord(self._last_slot, now)
                self._table.effects.append(StartSlot(self._last_slot))
            else:
                self.changed = True
        while missing < 0:
            missing += 1
            active = [s for s in slots.values() if not (s.blocked or s.parked)]
            min(active, key=lambda s: (len(s.sent), -s.number)).parked = True
        spares = [s for s in slots.values() if s.parked and not s.sent and s.started]
        for slot in spares[MAX_SPARES:]:
            del slots[slot.number]
            self._table.effects.append(StopSlot(slot.number))

    def look(self, now: float) -> None:
        """Ask for results that slots may be keeping to themselves, and for the end of rows that
        have run too long or are not wanted."""
        for slot in self.slots.values():
            if len(slot.sent) > 1 and now >= slot.peek_at:
                slot.peek_pause = min(2 * slot.peek_pause, MAX_PEEK_PAUSE_S)
                slot.peek_at = now + slot.peek_pause
                self._table.effects.append(PeekSlot(slot.number))
            if (slot.doomed is not None or self.has_limits) and now >= self._watch_at(slot):
                self._watch(slot, now)

    # --- rows that must end -------------------------------------------------------------------

    def doom(self, slot: SlotRecord, verdict: tuple[int, str] | None, now: float) -> None:
        """The slot's first row has to end, and the slot with it: nothing else ends what runs.

        The rows behind it are taken back first, so whatever the slot does until it dies, no row
        but this one can run in it; and nothing is sent to it until it is known to be rid of it.
        """
        if not self.can_kill or slot.doomed is not None:
            return
        slot.doomed = slot.sent[0]
        slot.verdict = verdict
        slot.kill_at, slot.kill_pause = now, KILL_AGAIN_S
        if len(slot.sent) > 1:
            self.take_back(slot, len(slot.sent) - 1)

    def spared(self, slot: SlotRecord) -> None:
        """Rows have ended: if one of them was to be killed, the slot lives on."""
        if not any(entry is slot.doomed for entry in slot.sent):
            slot.doomed = slot.verdict = None

    def row_age(self, number: int, id_: int, age_s: float | None, now: float) -> None:
        """The answer to an AgeOfRow; None: it does not run."""
        slot = self.slots[number]
        if not slot.sent or slot.sent[0][0] != id_ or len(slot.sent[0]) < 5:
            return
        limit_s = slot.sent[0][4].limit_s
        if age_s is not None and limit_s and age_s >= limit_s:
            self.doom(slot, (LATE, f"it ran longer than its limit of {limit_s:g} s"), now)
        slot.check_at = now + max(limit_s - (age_s or 0.0), KILL_AGAIN_S)

    def _watch_at(self, slot: SlotRecord) -> float:
        """When to look after its first row again, infinity for never."""
        if slot.doomed is not None:
            return slot.kill_at
        if slot.sent and self.can_kill:
            first = slot.sent[0]
            if len(first) > 4 and first[4].limit_s:
                limit_s: float = first[4].limit_s
                return max(slot.quiet_since + limit_s, slot.check_at)
        return inf

    def _watch(self, slot: SlotRecord, now: float) -> None:
        if slot.doomed is None:
            slot.check_at = now + KILL_AGAIN_S
            self._table.effects.append(AgeOfRow(slot.number, slot.sent[0][0]))
            return
        slot.kill_at = now + slot.kill_pause
        slot.kill_pause = min(2 * slot.kill_pause, MAX_KILL_PAUSE_S)
        why = slot.verdict[1] if slot.verdict is not None else "it was cancelled"
        self._table.effects.append(KillRow(slot.number, slot.doomed[0], why))

    # --- rows into slots ----------------------------------------------------------------------

    def assign(self, now: float) -> None:
        """Share the ready rows among the slots that have room, the emptiest first."""
        depth = self.pace.depth()
        takers = [s for s in self.slots.values() if s.takes_rows and len(s.sent) < depth]
        if self.held:
            # Only what a row that waits inside itself may need, or memory might never be freed.
            depth, takers = 1, self._idle_for_blocked()
        if not takers:
            return
        takers.sort(key=lambda s: (len(s.sent), -s.quiet_since))
        in_slots = sum(len(s.sent) for s in takers)
        # All takers filled to one level, rounded up.
        level = min(depth, -(-(in_slots + len(self._table.ready)) // len(takers)))
        for slot in takers:
            room = level - len(slot.sent)
            if (room > 0 and self._table.ready) or slot.followers:
                self._send(slot, room, depth, now)

    def hold(self, held: bool) -> None:
        """While held, ready rows are not given to slots, and those that have not begun there come
        back; rows that run go on."""
        self.held = held
        if held:
            for slot in self.slots.values():
                if len(slot.sent) > 1 and not slot.asked and not slot.bare:
                    self.take_back(slot, len(slot.sent) - 1)

    def _idle_for_blocked(self) -> list[SlotRecord]:
        """As many idle slots as there are blocked ones, less those that have a row."""
        slots = self.slots.values()
        n = sum(s.blocked for s in slots) - sum(bool(s.sent) and not s.blocked for s in slots)
        return [s for s in slots if s.takes_rows and not s.sent][: max(0, n)]

    def _send(self, slot: SlotRecord, room: int, depth: int, now: float) -> None:
        """Up to `room` ready rows into a slot, each with those that may follow it there."""
        table = self._table
        ready, followers, waiters, known = (
            table.ready,
            slot.followers,
            table.waiters,
            slot.functions,
        )
        sent = slot.sent
        rows: list[Sequence[Any]] = []
        functions: list[tuple[int, str, bytes]] = []
        nbytes = slot.nbytes
        may_follow = 0.0 < self.pace.row_s < FOLLOW_S
        if not sent:
            slot.heard(now)
        while True:
            if followers:
                if len(sent) >= depth:
                    break
                entry = followers.popleft()
                if table.rows.get(entry[0]) is not entry or entry[4].sent or not entry[4].need:
                    continue
                if entry[4].home != slot.number:
                    continue
            elif room > 0 and ready:
                room -= 1
                entry = ready.popleft()
            else:
                break
            if len(entry) > 4 and not self._has_values(entry):
                table.give_back(entry)
                continue
            fn = entry[2]
            if fn not in known:
                known.add(fn)
                functions.append(table.functions[fn])
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
            table.effects.append(SendRows(slot.number, functions, rows))

    def _has_values(self, entry: Entry) -> bool:
        """Whether its stored values are still here: the broker may have freed one because other
        workers could not fetch it, and will have it made again."""
        held = self._table.held
        return all(type(v) is not tuple or v[0] in held for v in entry[4].values)

    def _place(self, id_: int, slot: SlotRecord) -> bool:
        """A row is about to be sent: whether its result is to be kept for one that follows.

        Only for a sole waiter: several would run one after the other here, though other slots
        may stand idle.
        """
        waiting = self._table.waiters[id_]
        if len(waiting) > 1:
            for entry, _ in waiting:
                entry[4].home = SCATTERED
            return False
        entry = waiting[0][0]
        if self._table.rows.get(entry[0]) is not entry:
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

    # --- rows out of slots --------------------------------------------------------------------

    def steal(self, now: float) -> None:
        """An idle slot takes rows back from one that has many, or is stuck in a long row."""
        idle = False
        best: SlotRecord | None = None
        for slot in self.slots.values():
            if not slot.sent:
                idle = idle or slot.takes_rows
            elif len(slot.sent) > 1 and not slot.bare and not slot.asked:
                stuck = now - slot.quiet_since >= STUCK_S
                if stuck or len(slot.sent) * self.pace.row_s > STEAL_S:
                    if best is None or len(slot.sent) > len(best.sent):
                        best = slot
        if not idle or best is None:
            return
        if sum(len(entry) == 4 or not entry[4].need for entry in best.sent) > 1:
            stuck = now - best.quiet_since >= STUCK_S
            count = len(best.sent) - 1 if stuck else len(best.sent) // 2
            self.take_back(best, count)

    def take_back(self, slot: SlotRecord, most: int) -> None:
        slot.asked = most
        self._table.effects.append(TakeBack(slot.number, most))

    def taken_back(self, number: int, count: int) -> None:
        """The last `count` rows sent are not the slot's any more: the answer to a TakeBack."""
        slot = self.slots[number]
        asked, slot.asked = slot.asked, 0
        if count:
            slot.resetting = True
            back = [slot.sent.pop() for _ in range(count)]
            self.put_back(slot, back)
        # A slot that gave less than it has begins the row after: nothing more can be had.
        slot.bare = True
        if self.held and count == asked and len(slot.sent) > 1:
            self.take_back(slot, len(slot.sent) - 1)
        table = self._table
        if table.recalled:
            table.recalled.difference_update([entry[0] for entry in slot.sent])
        if table.dropped and slot.doomed is None and self.can_kill:
            # Of what is left the last one runs; those before it have ended, and are to be reported.
            last = slot.sent[-1] if slot.sent else None
            if last is not None and (last[0], last[1]) in table.dropped:
                slot.doomed, slot.verdict = last, None
                slot.kill_at, slot.kill_pause = 0.0, KILL_AGAIN_S

    def put_back(self, slot: SlotRecord, entries: list[Entry]) -> None:
        """Entries that a slot will not run, last one first, are in line again, in front."""
        table = self._table
        recalled: list[Entry] = []
        for entry in entries:
            slot.nbytes = max(0.0, slot.nbytes - len(entry[3]))
            id_ = entry[0]
            if table.rows.get(id_) is not entry:
                if id_ not in table.rows:  # else it is another attempt that was recalled
                    table.recalled.discard(id_)
                if table.was_dropped(entry):
                    table.hand_back(entry)
                continue
            if len(entry) > 4:
                entry[4].sent = False
            if id_ in table.recalled:
                table.recalled.discard(id_)
                recalled.append(entry)
            else:
                self.unsend(entry)
        for entry in reversed(recalled):
            table.give_back(entry)
        for entry in slot.followers:
            if not entry[4].sent:
                entry[4].home, entry[4].near = NOWHERE, 0
        slot.followers.clear()

    def unsend(self, entry: Entry) -> None:
        """A row that a slot did not run after all is ready, or waits."""
        self._unplace(entry[0])
        if len(entry) > 4:
            linked = entry[4]
            linked.sent = False
            linked.home, linked.near = NOWHERE, 0
            if linked.need:
                return
        self._table.ready.appendleft(entry)

    def _unplace(self, id_: int) -> None:
        """Rows that would have followed this one must wait for it, wherever it runs."""
        for waiter, _ in self._table.waiters.get(id_, ()):
            if not waiter[4].sent:
                waiter[4].home, waiter[4].near = SCATTERED, 0


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
