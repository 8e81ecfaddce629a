"""What the worker's machine asks its runtime to do. One record per slot and turn, none per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

SKIPPED = 255
"""How a slot reports a row that it did not run because the value that it should have followed
was not left in the slot. Never leaves the worker."""


class StoredValue(Protocol):
    """A value too large to ride along, as the runtime holds it."""

    @property
    def nbytes(self) -> int: ...


class SendRows(NamedTuple):
    """Put rows into a slot's socket, behind the functions that it has not seen.

    rows: (id, attempt, function id, payload), or with two more: values, and whether to keep the
    result for a row that follows. A value is bytes (an inline blob), an int (the id of a row
    before it in the same slot, whose result was kept) or a tuple of one id (it is in the store).
    """

    slot: int
    functions: list[tuple[int, str, bytes]]
    rows: list[Sequence[Any]]


class TakeBack(NamedTuple):
    """Take up to `most` rows, the last ones sent, out of a slot; answer with taken_back()."""

    slot: int
    most: int


class PeekSlot(NamedTuple):
    """Look for rows that the slot finished but did not report, as a long one came after them.

    Answer with slot_done() for what was found, and then with slot_settled() if the running row
    has lasted so long that the slot will report when it ends; else the question comes again.
    """

    slot: int


class KillRow(NamedTuple):
    """Kill a slot if this very row runs in it now; slot_died() then tells. First take in what it
    has finished. Where the row does not run, do nothing: the question comes again.

    why: for the log.
    """

    slot: int
    id: int
    why: str


class AgeOfRow(NamedTuple):
    """Find out for how long this row has run in a slot; answer with row_age(). First take in what
    the slot has finished."""

    slot: int
    id: int


class StartSlot(NamedTuple):
    """Start a slot; answer with slot_started() or slot_died()."""

    slot: int


class StopSlot(NamedTuple):
    """End an idle slot. No answer."""

    slot: int


class ForgetFunctions(NamedTuple):
    """Tell a slot to let go of functions."""

    slot: int
    fns: Sequence[int]


class KeepValue(NamedTuple):
    """Put a value into the store."""

    id: int
    value: StoredValue


class FreeValues(NamedTuple):
    """Remove values from the store."""

    ids: Sequence[int]


class FetchValue(NamedTuple):
    """Fetch a value into the store; answer with value_fetched() or fetch_failed().

    sources: (worker number, data address) of its holders.
    """

    id: int
    nbytes: int
    sources: Sequence[tuple[int, str]]


Effect = (
    SendRows
    | TakeBack
    | PeekSlot
    | KillRow
    | AgeOfRow
    | StartSlot
    | StopSlot
    | ForgetFunctions
    | KeepValue
    | FreeValues
    | FetchValue
)
