"""What a worker tells a broker that does not know it any more: everything that it has.

The broker keeps of it what it can use, and drops the rest; see `core.resync`.
"""

from __future__ import annotations

from collections.abc import Iterable

from zfabric.core.supervisor_table import RowTable
from zfabric.messages import CANCELLED, Done, Inventory

DoneColumns = tuple[list[int], list[int], bytearray, list[bytes]]
"""(ids, attempts, statuses, payloads) of rows that ended."""


def ended_again(unacked: Iterable[Done], pending: DoneColumns) -> DoneColumns:
    """Ends that the broker may not have heard of, oldest first. Cancelled rows are nobody's."""
    ids: list[int] = []
    attempts: list[int] = []
    statuses = bytearray()
    payloads: list[bytes] = []
    for columns in (*unacked, pending):
        for id_, attempt, status, payload in zip(*columns[:4], strict=True):
            if status != CANCELLED:
                ids.append(id_)
                attempts.append(attempt)
                statuses.append(status)
                payloads.append(payload)
    return ids, attempts, statuses, payloads


def inventory(done: DoneColumns, table: RowTable, credit: int, most: int) -> list[Inventory]:
    """All rows and values, in parts of at most `most` of each; only the last tells the credit.
    Rows that were dropped and are still in a slot come last."""
    ids = list(done[0])
    attempts = list(done[1])
    for entry in table.rows.values():
        ids.append(entry[0])
        attempts.append(entry[1])
    n_wanted = len(ids)
    for id_, attempt in sorted(table.dropped):
        ids.append(id_)
        attempts.append(attempt)
    values, sizes = list(table.held), list(table.held.values())
    parts = []
    for start in range(0, max(len(ids), len(values), 1), most):
        part = slice(start, start + most)
        n_dropped = max(0, min(start + most, len(ids)) - max(start, n_wanted))
        rows = Inventory(ids[part], attempts[part], values[part], sizes[part], 0, n_dropped)
        parts.append(rows)
    parts[-1] = parts[-1]._replace(credit=max(1, credit))
    return parts
