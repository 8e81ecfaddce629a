"""Named runs: tasks that outlive the process that submitted them.

A client that is attached to a run keeps the futures that have a key until they are released, and
leaves them behind when it is closed. `core.runs` is the broker's side.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgpack

from zfabric.client.future import Future, NamedFuture
from zfabric.core.submitter import Outcome
from zfabric.errors import UsageError, ZFabricError
from zfabric.messages import Inventory

if TYPE_CHECKING:
    from zfabric.client.client import Client

log = logging.getLogger(__name__)

MAX_NAME = 256

LEAVE_S = 5.0
"""How long close() waits for the broker to have all that was submitted."""


def check_name(run: Any) -> str:
    """A run's name. Raises UsageError."""
    if not isinstance(run, str) or not 0 < len(run) <= MAX_NAME or not run.isprintable():
        raise UsageError(f"run={run!r}: it is a name of at most {MAX_NAME} printable characters")
    return run


def attach(client: Client, run: str, timeout_s: float) -> None:
    """Make a client that has no tasks the holder of a run."""
    check_name(run)
    io = client._io
    if io.link.run:
        raise UsageError(f"this client holds the run {io.link.run!r}: attach with another Client")
    if client._submitter.outcomes:
        raise UsageError(
            "attach() comes before the first submit: tasks submitted without a run cannot be moved"
            " into one"
        )
    client._calls.kept = {}
    try:
        io.attach(run, timeout_s)
        futures(client)
    except BaseException:
        if not io.link.run:
            client._calls.kept = None
        raise


def futures(client: Client) -> dict[str, Future]:
    """The futures of a run's tasks that have a key, by key."""
    kept = client._calls.kept
    if kept is None:
        raise UsageError("futures() is for a client of a named run: Client(address, run='name')")
    told = _told(client)
    fresh: list[Outcome] = []
    with client._lock:
        released = set(client._submitter.released)
        table = client._submitter.outcomes
        found: dict[str, Future] = {}
        for id_, key, fn in told:
            if id_ in released:
                continue
            known = kept.get(key)
            if known is None or known.task_id != id_:
                if id_ in table or (known is not None and known.task_id > id_):
                    continue  # released just now, or submitted anew under that key
                outcome = table[id_] = Outcome(id_, fn)
                fresh.append(outcome)
                known = kept[key] = client._calls.adopt(NamedFuture(client, outcome, key))
            found[key] = known
    if fresh:
        client._io.call(_say_what_is_missing, client, [outcome.id for outcome in fresh])
    return found


def _told(client: Client) -> list[tuple[int, str, int]]:
    rows: list[tuple[int, str, int]] = []
    while True:
        after = str(rows[-1][0]) if rows else ""
        answer = client._io.ask("run", client._settings.dead_s, [0], after)
        page = msgpack.unpackb(answer)
        if not page:
            return rows
        rows += [(id_, key, fn) for id_, key, fn in page]


def _say_what_is_missing(client: Client, ids: list[int]) -> None:
    most = client._settings.batch_rows
    for start in range(0, len(ids), most):
        part = ids[start : start + most]
        client._submitter.say(Inventory(part, [0] * len(part), [], [], 1))


def sync(client: Client, timeout_s: float) -> None:
    """Return when the broker has all that was submitted; with a journal it is in that.

    Raises ResultTimeout, ClientClosed.
    """
    client._io.ask("sync", timeout_s, [0])


def leave(client: Client) -> None:
    """What close() does first: see that nothing submitted is left behind here."""
    io = client._io
    if not io.link.run or io.is_this_thread() or not io.is_open:
        return
    try:
        sync(client, LEAVE_S)
    except ZFabricError as exc:
        log.warning("the run %s was left, and not all was submitted: %s", io.link.run, exc)


def end(client: Client, run: str) -> None:
    """End a run that this client holds, or that nobody holds. Raises UsageError."""
    why_not = msgpack.unpackb(client._io.ask("end run", client._settings.dead_s, [0], run))
    if why_not:
        raise UsageError(why_not)


def listed(client: Client) -> list[dict[str, Any]]:
    """All runs at the broker."""
    return msgpack.unpackb(client._io.ask("runs", client._settings.dead_s))  # type: ignore[no-any-return]
