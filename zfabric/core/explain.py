"""Why a row that is at this worker has not ended: the worker's part of `core.why`.

Looks into the supervisor's machine and changes nothing. Each row gets one (code, text) pair.
"""

from __future__ import annotations

from zfabric.core.supervisor import Supervisor
from zfabric.core.supervisor_rows import Entry, SlotRecord
from zfabric.messages import Explain, Explained

VALUES_NAMED = 8


def explain(supervisor: Supervisor, question: Explain, now: float) -> Explained:
    """What keeps each of these rows."""
    places = {
        entry[0]: (slot, position)
        for slot in supervisor.crew.slots.values()
        for position, entry in enumerate(slot.sent)
    }
    in_line = {entry[0]: position for position, entry in enumerate(supervisor.table.ready)}
    codes: list[str] = []
    texts: list[str] = []
    for id_ in question.ids:
        entry = supervisor.table.rows.get(id_)
        place = places.get(id_)
        if place is not None and place[1] == 0:
            code, text = _running(place[0], now)
        elif entry is None:
            code, text = (
                "passing",
                "it, or its outcome, is on its way",
            )
        elif len(entry) > 4 and entry[4].need:
            code, text = _missing(supervisor, entry)
        elif place is not None:
            code, text = _behind(place[0], place[1], now)
        else:
            code, text = _in_line(supervisor, in_line.get(id_, 0))
        codes.append(code)
        texts.append(text)
    return Explained(question.ticket, question.ids, codes, texts)


def _running(slot: SlotRecord, now: float) -> tuple[str, str]:
    if not slot.started:
        return "starting", f"slot {slot.number} is starting"
    for_s = f"{max(0.0, now - slot.quiet_since):.1f} s"
    if slot.blocked:
        return (
            "blocked",
            f"runs in slot {slot.number} and waits for its own tasks since {for_s}",
        )
    return "running", f"runs in slot {slot.number} since {for_s}"


def _behind(slot: SlotRecord, position: int, now: float) -> tuple[str, str]:
    first = slot.sent[0]
    for_s = max(0.0, now - slot.quiet_since)
    rows = "row" if position == 1 else f"{position} rows"
    return (
        "behind",
        f"in slot {slot.number} behind {rows}, of which {first[0]:x} runs since {for_s:.1f} s",
    )


def _missing(supervisor: Supervisor, entry: Entry) -> tuple[str, str]:
    linked = entry[4]
    missing = [dep for dep, value in zip(linked.deps, linked.values, strict=True) if value is None]
    fetched = [dep for dep in missing if dep in supervisor.table.fetching]
    if fetched:
        named = ", ".join(f"{dep:x}" for dep in fetched[:VALUES_NAMED])
        return "transfer", f"{len(fetched)} of its values are in transfer to the worker: {named}"
    named = ", ".join(f"{dep:x}" for dep in missing[:VALUES_NAMED])
    return "inputs", f"waits for {len(missing)} values that are made at the same worker: {named}"


def _in_line(supervisor: Supervisor, position: int) -> tuple[str, str]:
    if supervisor.failure:
        return "no slots", f"the worker cannot start slots: {supervisor.failure}"
    if supervisor.crew.held:
        return "memory", (
            f"in line behind {position} rows at the worker, whose memory for values is full: it "
            "goes on when some of them are on disk"
        )
    busy = sum(bool(slot.sent) for slot in supervisor.crew.slots.values())
    return (
        "in line",
        f"in line behind {position} rows at the worker, with {busy} of its "
        f"{len(supervisor.crew.slots)} slots busy",
    )
