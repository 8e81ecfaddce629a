"""A worker's machine on a bench: a clock, and slots and a store that are the test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zfabric.config import Settings
from zfabric.core.supervisor import Supervisor
from zfabric.core.supervisor_effects import (
    SendRows,
    StartSlot,
)
from zfabric.messages import (
    VALUE,
    Done,
    Returned,
    Run,
)

FN = (5, "f", b"blob of f")


class Stored:
    """Stands for a value in the store."""

    nbytes = 5000


class Bench:
    """A machine with a clock, whose slots and store are this test."""

    def __init__(
        self, n_slots: int = 1, *, started: bool = True, can_kill: bool = True, **settings: Any
    ) -> None:
        self.now = 100.0
        self.machine = Supervisor(
            n_slots, settings=Settings(**settings), now=self.now, can_kill=can_kill
        )
        self.functions = [FN]
        self.seq = 0
        if started:
            for effect in self.effects():
                assert isinstance(effect, StartSlot)
                self.machine.slot_started(effect.slot, self.now)

    def run(
        self, *ids: int, deps: dict[int, Sequence[Any]] | None = None, attempt: int = 1
    ) -> None:
        """Rows; deps: by id."""
        sparse = [(ids.index(id_), d) for id_, d in (deps or {}).items()]
        self.machine.run(
            Run(
                self.functions,
                ids,
                [attempt] * len(ids),
                [FN[0]] * len(ids),
                [b"args"] * len(ids),
                sparse,
            )
        )
        self.functions = []

    def effects(self) -> list[Any]:
        """All effects until there are none; a TakeBack must be answered by the test."""
        return self.machine.effects(self.now)

    def sent(self) -> dict[int, list[int]]:
        """Ids sent to each slot, when that is all there is to do."""
        out: dict[int, list[int]] = {}
        for effect in self.effects():
            assert isinstance(effect, SendRows), effect
            out.setdefault(effect.slot, []).extend(row[0] for row in effect.rows)
        return out

    def done(self, slot: int, *outcomes: Any, busy_s: float = 0.0) -> None:
        """Rows ended; each outcome is (status, payload), or a payload for VALUE."""
        pairs = [o if isinstance(o, tuple) else (VALUE, o) for o in outcomes]
        self.machine.slot_done(
            slot, bytes(s for s, _ in pairs), [p for _, p in pairs], busy_s, self.now
        )

    def said(self) -> list[Any]:
        """Messages without their credit, which has tests of its own."""
        out: list[Any] = []
        for message in self.machine.messages(self.now):
            if isinstance(message, Done):
                self.seq += 1
                self.machine.done_posted(message, self.seq)
                rows = zip(message.ids, message.attempts, message.statuses, message.payloads)
                out.append(("done", *rows))
            elif isinstance(message, Returned):
                out.append(("returned", *message.ids))
            else:
                out.append(message)
        return out

    def short_rows(self) -> None:
        """Let the machine believe that rows take 10 us."""
        self.run(900, 901)
        ids = self.sent()
        for slot, rows in ids.items():
            self.done(slot, *[b"x"] * len(rows), busy_s=1e-5 * len(rows))
        while any(self.sent().values()):
            raise AssertionError("rows left")
        self.said()
        self.machine.acked(self.seq)
