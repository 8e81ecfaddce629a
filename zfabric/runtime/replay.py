"""Going through a recorded broker again, event by event.

The machine of the recording is made anew and fed the same events. What it says goes nowhere; each
session's messages are taken as sent, which no decision depends on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from msgpack import Unpacker
from msgpack.exceptions import OutOfData, UnpackException

from zfabric import messages as m
from zfabric import wire
from zfabric.config import Settings
from zfabric.core.admission import Admission
from zfabric.core.broker import BrokerMachine
from zfabric.errors import ConfigError, RemoteProtocolError
from zfabric.runtime import recording as r
from zfabric.wire import PROTOCOL

_SHAPES: dict[int, tuple[type, ...]] = {
    r.RECEIVED: (float, bytes, list),
    r.GONE: (float, bytes),
    r.TICK: (float,),
    r.TURN: (float,),
    r.UNSENDABLE: (float, int, str),
    r.ADMIT: (float, list, list),
    r.USER: (float, bytes, str),
    r.CANNOT_WRITE: (float, str),
    r.CAN_WRITE: (float,),
}
"""What follows the code of each event."""


class Step(NamedTuple):
    """One event that has just happened.

    number: from 1 on.  at_s: seconds since the first event.  text: what happened, in words.
    ids: tasks that it was about.
    """

    number: int
    at_s: float
    text: str
    ids: tuple[int, ...]


class Replay:
    """A recording, opened. Raises ConfigError when the file is none, or of another version.

    machine: as it is after the last step.  is_torn: the file ends within an event.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self.is_torn = False
        try:
            self._file = open(self._path, "rb")
        except OSError as exc:
            raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc
        self._unpacker = Unpacker(self._file, max_buffer_size=1 << 30, strict_map_key=True)
        try:
            head = self._unpacker.unpack()
        except (UnpackException, ValueError) as exc:
            self.close()
            raise ConfigError(f"{path} is no recording of a broker: {exc}") from None
        if not isinstance(head, list) or not r.is_recording(head):
            self.close()
            raise ConfigError(
                f"{path} is no recording of a broker; `zfabric broker --record FILE` makes one"
            )
        if head[1] != PROTOCOL:
            self.close()
            raise ConfigError(
                f"{path} was recorded by a zfabric of protocol {head[1]}, this one has {PROTOCOL}: "
                "replay it with the version that recorded it"
            )
        self._users: dict[bytes, str] = {}
        try:
            self._begin(head[2], is_keyed=head[3])
        except (LookupError, TypeError, ValueError, AttributeError) as exc:
            self.close()
            raise ConfigError(f"{path} is damaged: its head cannot be read: {exc}") from exc

    def _begin(self, head: dict[str, Any], is_keyed: bool) -> None:
        known = {field.name for field in fields(Settings)}
        arguments = dict(head)
        settings = {k: v for k, v in arguments.pop("settings").items() if k in known}
        admission = None
        if is_keyed:
            admission = Admission(self._users.__getitem__, settings["sessions_per_key"])
        self.machine = BrokerMachine(
            **arguments, settings=Settings(**settings), admission=admission
        )
        self._began = arguments["now"]

    def steps(self) -> Iterator[Step]:
        """Each event, after it has happened. Raises ConfigError at one that cannot be read."""
        number = 0
        while True:
            try:
                event = self._unpacker.unpack()
            except OutOfData:  # the end, or a write that was cut off
                self.is_torn = self._file.tell() != self._unpacker.tell()
                return
            except (UnpackException, ValueError):
                event = None
            if not _is_event(event):
                before = f"; `zfabric replay --to {number} {self._path}` shows all before it"
                raise ConfigError(
                    f"{self._path} is damaged: its event {number + 1} cannot be read"
                    + (before if number else "")
                )
            if event[0] == r.USER:
                self._users[event[2]] = event[3]
                continue
            number += 1
            text, ids = self._apply(event)
            at_s = event[1] - self._began if event[1] else 0.0
            yield Step(number, at_s, text, ids)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _apply(self, event: list[Any]) -> tuple[str, tuple[int, ...]]:
        machine = self.machine
        code, now = event[0], event[1]
        if code == r.RECEIVED:
            text, ids = self._describe(event[3])
            machine.receive(event[2], event[3], now)
            return text, ids
        if code == r.GONE:
            record = machine.routes.get(event[2])
            machine.gone(event[2], now)
            return f"the connection of {record.name if record else 'a stranger'} broke", ()
        if code == r.TICK:
            machine.tick(now)
            return "tick", ()
        if code == r.ADMIT:
            machine.admit(frozenset(event[2]), event[3], now)
            return f"{len(event[2])} keys are admitted", ()
        if code == r.UNSENDABLE:
            lost = machine.sessions.get(event[2])
            if lost is not None:
                machine.end_unsendable(lost, event[3], now)
            return f"a message could not be sent: {event[3]}", ()
        if code == r.CANNOT_WRITE:
            machine.cannot_write(event[2])
            return f"the journal could not be written: {event[2]}", ()
        if code == r.CAN_WRITE:
            machine.can_write()
            return "the journal could be written again", ()
        machine.turn()
        if machine.journal is not None:
            machine.journal.take()
        said = self._pump()
        return f"turn{': ' + said if said else ''}", ()

    def _pump(self) -> str:
        """Take all that the sessions have to say; in words, what was new."""
        said: list[str] = []
        for record in list(self.machine.dirty):
            if record.peer is not None:
                while (frames := record.session.next_frames()) is not None:
                    record.session.sent()
                    message = wire.decode(frames)[1]
                    if type(message) not in (m.Beat, m.Nack):
                        said.append(f"{summary(message)[0]} to {record.name}")
            del self.machine.dirty[record]
        self.machine.replies.clear()
        self.machine.log.clear()
        return ", ".join(said)

    def _describe(self, frames: list[bytes]) -> tuple[str, tuple[int, ...]]:
        try:
            header, message = wire.decode(frames)
        except RemoteProtocolError as exc:
            return f"garbage ({exc})", ()
        record = self.machine.sessions.get(header.token)
        name = record.name if record else "a stranger"
        text, ids = summary(message)
        return f"{name}: {text}", ids


def _is_event(event: Any) -> bool:
    """Whether this may have been written by a Recorder."""
    if type(event) is not list or not event or type(event[0]) is not int:
        return False
    if tuple(map(type, event[1:])) != _SHAPES.get(event[0]):
        return False
    return all(type(item) in (bytes, str) for part in event if type(part) is list for item in part)


def summary(message: m.Message) -> tuple[str, tuple[int, ...]]:
    """A message in a few words, and the tasks that it is about."""
    ids = tuple(getattr(message, "ids", ()) or getattr(message, "about", ()))
    name = type(message).__name__
    if isinstance(message, m.Hello):
        return f"Hello as {message.role} {message.name}", ()
    if not ids:
        return name, ()
    some = ", ".join(f"{id_:x}" for id_ in ids[:3])
    return f"{name} of {len(ids)} ({some}{', ...' if len(ids) > 3 else ''})", ids


def read_dump(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """A stall report as the broker wrote it; None when the file is something else."""
    try:
        with open(path, "rb") as file:
            if file.read(1) != b"{":
                return None
            file.seek(0)
            dump = json.load(file)
    except (OSError, ValueError):
        return None
    return dump if isinstance(dump, dict) and "unfinished_tasks" in dump else None
