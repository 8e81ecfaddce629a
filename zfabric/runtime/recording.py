"""A broker's events, kept in a file: the machine is a pure function of them, so they are enough
to go through everything that it decided once more (`runtime.replay`).

A recording is a stream of msgpack objects: a head, then one array per event, [code, now, ...].
It holds what peers sent, arguments and small results included: the file is its owner's alone.
Each turn is one write, so that what is on record survives `kill -9` of the broker.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msgpack import Packer

from zfabric.core.admission import Admission
from zfabric.core.broker import BrokerMachine, Frames
from zfabric.core.session_record import Peer, SessionRecord
from zfabric.errors import ConfigError
from zfabric.wire import PROTOCOL

log = logging.getLogger(__name__)

MAGIC = "zfabric recording 1"

RECEIVED = 0
GONE = 1
TICK = 2
TURN = 3
UNSENDABLE = 4
ADMIT = 5
USER = 6
CANNOT_WRITE = 7
CAN_WRITE = 8

MAX_NBYTES = 4 << 30
"""Bytes after which a recording ends, with a line in the log; the broker goes on."""


class Recorder:
    """Writes a new file. Raises ConfigError when there is one of that name, or none can be."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.nbytes = 0
        self._pack: Callable[[Any], bytes] = Packer().pack
        self._due: list[bytes] = []
        flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC
        try:
            self._fd: int | None = os.open(self.path, flags, 0o600)
        except FileExistsError:
            raise ConfigError(
                f"{self.path} is there already, and a recording overwrites nothing: "
                "name another file, or move this one away"
            ) from None
        except OSError as exc:
            raise ConfigError(f"no recording can be made at {self.path}: {exc.strerror}") from exc

    def add(self, *event: Any) -> None:
        """One event, or the head."""
        if self._fd is not None:
            self._due.append(self._pack(event))

    def flush(self) -> None:
        """What was added goes to the file. A disk that takes no more ends the recording only."""
        if self._fd is None or not self._due:
            return
        data = b"".join(self._due)
        self._due.clear()
        try:
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as exc:
            self._end(f"the recording {self.path} ends here: {exc.strerror}")
            return
        self.nbytes += len(data)
        if self.nbytes > MAX_NBYTES:
            self._end(f"the recording {self.path} ends here: it has {self.nbytes} bytes")

    def close(self) -> None:
        """Write the rest."""
        self.flush()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _end(self, text: str) -> None:
        log.warning("%s; the broker goes on without it", text)
        assert self._fd is not None
        os.close(self._fd)
        self._fd = None


class RecordedMachine(BrokerMachine):
    """A broker's machine whose events go to a recorder.

    An event is written behind what it had to ask about keys, so that a replay knows the answers.
    """

    def __init__(
        self, recorder: Recorder, *, admission: Admission | None = None, **arguments: Any
    ) -> None:
        """admission, arguments: of BrokerMachine."""
        if arguments.get("saved") is not None:
            arguments["saved"] = list(arguments["saved"])  # the journal's part of the events
        super().__init__(admission=admission, **arguments)
        self._recorder = recorder
        plain = {**arguments, "settings": asdict(self.settings)}
        recorder.add(MAGIC, PROTOCOL, plain, admission is not None)
        recorder.flush()
        if admission is not None:
            self._identify = admission.identify
            admission.identify = self._recorded_user

    def receive(self, peer: Peer, frames: Frames, now: float) -> None:
        try:
            super().receive(peer, frames, now)
        finally:
            self._recorder.add(RECEIVED, now, peer, [bytes(frame) for frame in frames])

    def gone(self, peer: Peer, now: float) -> None:
        self._recorder.add(GONE, now, peer)
        super().gone(peer, now)

    def tick(self, now: float) -> float:
        self._recorder.add(TICK, now)
        return super().tick(now)

    def turn(self) -> None:
        self._recorder.add(TURN, 0.0)
        self._recorder.flush()
        super().turn()

    def end_unsendable(self, record: SessionRecord, text: str, now: float) -> None:
        self._recorder.add(UNSENDABLE, now, record.session.token, text)
        super().end_unsendable(record, text, now)

    def admit(self, users: frozenset[str], keys: Sequence[bytes], now: float) -> None:
        self._recorder.add(ADMIT, now, sorted(users), list(keys))
        super().admit(users, keys, now)

    def cannot_write(self, text: str) -> None:
        self._recorder.add(CANNOT_WRITE, 0.0, text)
        super().cannot_write(text)

    def can_write(self) -> None:
        self._recorder.add(CAN_WRITE, 0.0)
        super().can_write()

    def _recorded_user(self, peer: Peer) -> str:
        user = self._identify(peer)
        self._recorder.add(USER, 0.0, peer, user)
        return user


def is_recording(head: Sequence[Any]) -> bool:
    """Whether that is the first object of a recording."""
    return len(head) == 4 and head[0] == MAGIC
