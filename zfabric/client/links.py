"""What is known of the links over which values move: this client's, and its workers'."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

import msgpack

from zfabric.client.alarm import Alarm
from zfabric.messages import LinksWanted
from zfabric.wire import encode

if TYPE_CHECKING:
    from zfabric.client.client import Client
    from zfabric.client.io_thread import IoThread


def links_of(client: Client, timeout_s: float) -> list[dict[str, Any]]:
    """See Client.links. A worker that does not answer in time is left out."""
    workers = client.info()["workers"]
    names = {worker["number"]: worker["name"] for worker in workers}
    # A worker that is reached directly goes by its address; people know it by its name.
    by_address = {w["data_address"]: w["name"] for w in workers if w["data_address"]}
    io = client._io
    alarm = Alarm()
    own: list[list[dict[str, Any]]] = []

    def look() -> None:
        own.append(io.links.report())
        alarm()

    io.call(look)
    deadline = monotonic() + timeout_s
    alarm.wait(timeout_s)
    found = [{"at": client.name, **link} for link in (own[0] if own else ())]
    for number, payload in _told(io, list(names), deadline).items():
        found += [{"at": names[number], **link} for link in msgpack.unpackb(payload)]
    for link in found:
        link["peer_name"] = by_address.get(link["peer"], link["peer"])
    return found


def _told(io: IoThread, numbers: list[int], deadline: float) -> dict[int, bytes]:
    """The answers of workers, by number."""
    waiting: list[tuple[int, int, Alarm, list[bytes]]] = []
    for number in numbers:
        request, alarm, box = io.questions.new_number(), Alarm(), list[bytes]()
        io.questions.answers[request] = (alarm, box)
        waiting.append((number, request, alarm, box))
        io.call(io.link.post_relay, number, encode(LinksWanted(request)))
    told = {}
    for number, request, alarm, box in waiting:
        alarm.wait(max(0.0, deadline - monotonic()))
        io.questions.answers.pop(request, None)
        if box:
            told[number] = box[0]
    return told
