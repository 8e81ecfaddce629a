"""What tasks write to stdout and stderr: gathered at the worker, kept at the client, both bounded.

A worker gathers per slot, as a slot runs one task at a time. What a task writes is told to its
client as it comes, whole lines first, within a budget of bytes per slot that refills; a flood
keeps its beginning, then what the budget allows, and its end. What was left out is counted.
"""

from __future__ import annotations

from collections import deque
from math import inf

from zfabric.ids import TRY_BITS, try_of
from zfabric.messages import Output

BURST = 256 * 1024
"""Bytes that a slot may tell at once."""

RATE = 64 * 1024
"""Bytes/s by which that refills."""

PENDING = 128 * 1024
"""Bytes of a task that wait for the budget at most; beyond that only its last ones are kept."""

END = 2 * 1024
"""Bytes that are told at the end of a task in any case, and kept for the report of its death."""

QUEUED = 1 << 20
"""Bytes of ended tasks that wait for the broker at most."""

MESSAGE = 256 * 1024
"""Bytes after which a message is full."""

PAUSE_S = 0.05
"""Between two messages about a task that goes on writing: each costs every hop on its way what a
result does, and nobody reads faster."""

ENOUGH = 16 * 1024
"""Bytes that are worth a message at once."""

LINE_S = 0.2
"""How long the beginning of a line waits for its end."""

HEAD = TAIL = 32 * 1024
"""Bytes that a client keeps of what a task wrote first, and last."""

STORED = 64 * 1024 * 1024
"""Bytes that a client keeps of all tasks; the text of the oldest goes first."""

DEATH_LINES = 20


class _Text:
    """What one attempt has written and nobody was told of so far."""

    __slots__ = ("attempt", "due", "id", "last", "pending", "since", "slot", "start")

    def __init__(self, slot: int, id_: int, attempt: int, now: float) -> None:
        self.slot = slot
        self.id = id_
        self.attempt = attempt
        self.pending = bytearray()
        self.start = 0
        """Where that begins in all that it has written."""
        self.last = b""
        self.since = now
        """When the oldest of it was written."""
        self.due = now
        """When it may be told, while the attempt goes on."""

    def keep(self, most: int) -> None:
        """Leave out all but the last bytes."""
        excess = len(self.pending) - most
        if excess > 0:
            del self.pending[:excess]
            self.start += excess


class OutputBook:
    """The worker's half. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._open: dict[int, _Text] = {}
        """By slot: the task that wrote there last."""
        self._before: dict[int, tuple[int, int, int]] = {}
        """By slot: the attempt that was ended last, and how much it had written."""
        self._ended: deque[_Text] = deque()
        self._n_ended = 0
        """Bytes of those."""
        self._budgets: dict[int, tuple[float, float]] = {}
        """By slot: bytes left, and when that was so."""
        self.waits = False
        """Whether take() may have something to tell, now or later."""

    def write(self, slot: int, id_: int, attempt: int, data: bytes, now: float) -> None:
        """An attempt wrote this."""
        text = self._open.get(slot)
        if text is None or text.id != id_ or text.attempt != attempt:
            self.end(slot)
            text = self._open[slot] = _Text(slot, id_, attempt, now)
            before = self._before.get(slot)
            if before is not None and before[:2] == (id_, attempt):
                text.start = before[2]  # a thread that it left behind
        if not text.pending:
            text.since = now
        text.pending += data
        text.last = (text.last + data[-END:])[-END:]
        text.keep(PENDING)
        self.waits = True

    def end(self, slot: int) -> None:
        """Whatever ran in the slot writes nothing any more."""
        text = self._open.pop(slot, None)
        if text is None:
            return
        self._before[slot] = (text.id, text.attempt, text.start + len(text.pending))
        if not text.pending:
            return
        self._ended.append(text)
        self._n_ended += len(text.pending)
        self.waits = True
        while self._n_ended > QUEUED:
            self._n_ended -= len(self._ended.popleft().pending)

    def died(self, slot: int, id_: int) -> str:
        """The slot is gone. The last lines of what that task wrote there, for the report of it."""
        text = self._open.get(slot)
        self.end(slot)
        if text is None or text.id != id_:
            return ""
        lines = text.last.decode(errors="replace").splitlines()
        return "\n".join(lines[-DEATH_LINES:])

    def take(self, now: float) -> Output | None:
        """What may be told now, or a part of it."""
        ids: list[int] = []
        attempts: list[int] = []
        starts: list[int] = []
        texts: list[bytes] = []
        room = MESSAGE
        for text in (*self._ended, *self._open.values()):
            if room <= 0:
                break
            is_open = self._open.get(text.slot) is text
            if is_open and now < text.due and len(text.pending) < ENOUGH:
                continue
            n = len(text.pending)
            if is_open and now - text.since < LINE_S:
                n = text.pending.rfind(b"\n") + 1
            left = self._budget(text.slot, now)
            if is_open:
                if not n or n > left:
                    continue
                text.due = now + PAUSE_S
            else:
                self._ended.popleft()
                self._n_ended -= n
                text.keep(max(int(left), END))
                n = len(text.pending)
            room -= n
            self._budgets[text.slot] = (max(0.0, left - n), now)
            ids.append(text.id)
            attempts.append(text.attempt)
            starts.append(text.start)
            texts.append(bytes(text.pending[:n]))
            del text.pending[:n]
            text.start += n
        self.waits = bool(self._ended) or any(text.pending for text in self._open.values())
        return Output(ids, attempts, starts, texts) if ids else None

    def wake_at(self, now: float) -> float:
        """When to call take() again, though nobody writes; infinity: no need."""
        if self._ended:
            return now
        wake = inf
        if self.waits:
            for text in self._open.values():
                if text.pending:
                    missing = len(text.pending) - self._budget(text.slot, now)
                    at = text.due if b"\n" in text.pending else text.since + LINE_S
                    wake = min(wake, max(at, text.due, now + missing / RATE))
        return wake

    def _budget(self, slot: int, now: float) -> float:
        left, at = self._budgets.get(slot, (float(BURST), now))
        return min(float(BURST), left + RATE * (now - at))


class TaskText:
    """What a client keeps of one task: of all its attempts, in the order in which they wrote."""

    __slots__ = ("_ends", "_try", "attempt", "dropped", "head", "tail")

    def __init__(self) -> None:
        self.attempt = 0
        self._try = 0
        self._ends: dict[int, int] = {}
        """How far each attempt is known."""
        self.head = b""
        self.tail = b""
        self.dropped = 0

    def add(self, attempt: int, start: int, data: bytes) -> tuple[int, bytes]:
        """A piece that begins there in what the attempt has written. Returns how many bytes are
        missing before it, and what of it is new."""
        known = self._ends.get(attempt, 0)
        new = data[max(0, known - start) :]
        if not new:
            return 0, b""
        self._ends[attempt] = start + len(data)
        missing = max(0, start - known)
        self._append(attempt, missing, new)
        return missing, new

    def _append(self, attempt: int, dropped: int, data: bytes) -> None:
        if self.attempt and attempt != self.attempt:
            # Under a restarted broker attempts begin again: those before were tries as well.
            before = self._try if attempt >> TRY_BITS != self.attempt >> TRY_BITS else 0
            self._try = before + try_of(attempt)
            data = b"--- try %d ---\n%b" % (self._try, data)
        elif not self.attempt:
            self._try = try_of(attempt)
        self.attempt = attempt
        room = 0 if dropped or self.dropped or self.tail else HEAD - len(self.head)
        if dropped:
            # What lies before the gap would stand behind its mark: the mark tells of both.
            dropped += len(self.tail)
            self.tail = b""
        self.head += data[:room]
        tail = self.tail + data[room:]
        self.dropped += dropped + max(0, len(tail) - TAIL)
        self.tail = tail[-TAIL:]

    @property
    def nbytes(self) -> int:
        return len(self.head) + len(self.tail)

    def __str__(self) -> str:
        gap = b"\n[... %d bytes left out ...]\n" % self.dropped if self.dropped else b""
        return b"".join((self.head, gap, self.tail)).decode(errors="replace")


class OutputShelf:
    """The client's half: texts by task, for as long as somebody holds the task's future."""

    def __init__(self) -> None:
        self.texts: dict[int, TaskText] = {}
        self._nbytes = 0

    def add(self, id_: int, attempt: int, start: int, data: bytes) -> tuple[int, bytes]:
        """A piece of what a task wrote, as of `TaskText.add`."""
        text = self.texts.get(id_)
        if text is None:
            text = self.texts[id_] = TaskText()
        before = text.nbytes
        found = text.add(attempt, start, data)
        self._nbytes += text.nbytes - before
        while self._nbytes > STORED:
            self.drop(next(iter(self.texts)))
        return found

    def drop(self, id_: int) -> None:
        """Nobody will ask for it any more."""
        text = self.texts.pop(id_, None)
        if text is not None:
            self._nbytes -= text.nbytes
