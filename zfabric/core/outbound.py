"""A turn's rows as messages: a few per peer, each within the limits of one message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core.placement import WorkerRecord
from zfabric.core.tasks import ClientRecord

Outgoing = tuple[int, m.Message]
"""(session number, message)"""


def to_client(client: ClientRecord, out: list[Outgoing], settings: Settings) -> None:
    """Results, and an empty record again; of very many bytes half a window, and the record keeps
    the rest."""
    ids, statuses, payloads = client.ids, bytes(client.statuses), client.payloads
    if fits(payloads, settings):
        out.append((client.number, m.Results(ids, statuses, payloads)))
    else:
        sizes = list(map(len, payloads))
        room = settings.window_bytes >> 1
        end = 0
        for start, end in slices_of(sizes, settings):
            results = m.Results(ids[start:end], statuses[start:end], payloads[start:end])
            out.append((client.number, results))
            room -= sum(sizes[start:end])
            if room <= 0:
                break
        if end < len(ids):
            del client.ids[:end], client.statuses[:end], client.payloads[:end]
            return
    client.ids = []
    client.statuses = bytearray()
    client.payloads = []


def to_worker(worker: WorkerRecord, out: list[Outgoing], settings: Settings) -> None:
    """Drop and Free come before Run, as an id that was dropped may run again in this very turn;
    Give comes before the rows that need it, and Forget after those that call what goes."""
    number = worker.number
    if worker.drops:
        out.append((number, m.Drop(worker.drops)))
        worker.drops = []
    if worker.frees:
        out.append((number, m.Free(worker.frees)))
        worker.frees = []
    if worker.gives:
        given = [blob for _, blob in worker.gives]
        for start, end in slices(given, settings):
            ids = [id_ for id_, _ in worker.gives[start:end]]
            out.append((number, m.Give(ids, given[start:end])))
        worker.gives = []
    if worker.functions:
        for fn in _big_functions(worker, settings):
            out.append((number, m.Run([fn], (), (), (), ())))
    if worker.ids:
        if not (worker.deps or worker.limits) and fits(worker.payloads, settings):
            run = m.Run(worker.functions, worker.ids, worker.attempts, worker.fns, worker.payloads)
            out.append((number, run))
        else:
            out.extend((number, run) for run in _runs(worker, settings))
        worker.ids, worker.attempts, worker.fns = [], [], []
        worker.payloads, worker.deps, worker.functions, worker.limits = [], [], [], []
    if worker.forgets:
        out.append((number, m.Forget(worker.forgets)))
        worker.forgets = []


def fits(payloads: Sequence[bytes], settings: Settings) -> bool:
    """Whether a column is small enough for one message."""
    return len(payloads) <= settings.batch_rows and (
        sum(map(len, payloads)) <= settings.batch_bytes
    )


def slices(payloads: Sequence[bytes], settings: Settings) -> Iterator[tuple[int, int]]:
    """Cut a column into [start, end) pieces of at most batch_rows rows and batch_bytes bytes (a
    single row may be larger)."""
    if fits(payloads, settings):
        yield 0, len(payloads)
    else:
        yield from slices_of(list(map(len, payloads)), settings)


def slices_of(sizes: Sequence[int], settings: Settings) -> Iterator[tuple[int, int]]:
    """The same for rows of these sizes in bytes."""
    start = total = 0
    for row, size in enumerate(sizes):
        if row > start and (
            total + size > settings.batch_bytes or row - start >= settings.batch_rows
        ):
            yield start, row
            start, total = row, 0
        total += size
    yield start, len(sizes)


def way_nbytes(way: m.Dependency) -> int:
    """About the bytes by which a Run tells how one input comes."""
    _, kind, data = way
    if kind == m.INLINE and isinstance(data, bytes):
        return 16 + len(data)
    if kind == m.REMOTE and isinstance(data, list):
        return 32 + sum(16 + len(address) for _, address in data[1])
    return 24


def _big_functions(worker: WorkerRecord, settings: Settings) -> list[tuple[int, str, bytes]]:
    """Functions that are too large to travel beside rows; they go ahead, one per message."""
    total = sum(len(blob) for _, _, blob in worker.functions)
    if total <= settings.batch_bytes:
        return []
    functions, worker.functions = worker.functions, []
    return functions


def _runs(worker: WorkerRecord, settings: Settings) -> Iterator[m.Run]:
    ids, attempts, fns, payloads = worker.ids, worker.attempts, worker.fns, worker.payloads
    if not (worker.deps or worker.limits):
        functions = worker.functions
        for start, end in slices(payloads, settings):
            yield m.Run(
                functions,
                ids[start:end],
                attempts[start:end],
                fns[start:end],
                payloads[start:end],
            )
            functions = []
        return
    # What tells of inputs counts as bytes of their row.
    deps = dict(worker.deps)
    sizes = list(map(len, payloads))
    for row, ways in deps.items():
        sizes[row] += sum(map(way_nbytes, ways))
    functions = worker.functions
    for start, end in slices_of(sizes, settings):
        yield m.Run(
            functions,
            ids[start:end],
            attempts[start:end],
            fns[start:end],
            payloads[start:end],
            [(row - start, deps[row]) for row in range(start, end) if row in deps],
            [(row - start, limit_s) for row, limit_s in worker.limits if start <= row < end],
        )
        functions = []
