"""Many peers of one broker in one process: real connections and sessions, and no work.

    python -m zfabric.testing.crowd tcp://127.0.0.1:8787 1000            # workers of one slot each
    python -m zfabric.testing.crowd tcp://127.0.0.1:8787 2500 --clients  # that only beat

A worker of a crowd "runs" a row by letting `--task` seconds pass; its value is None. It keeps what
it has when the broker restarts, and tells it in its Inventory as every worker does, with the ends
that were not acknowledged among the rows that run. When standard input ends, one line of JSON tells
what became of it: peers that were welcomed, rows that ended, and rows that were begun twice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import select
import socket
import sys
from collections import Counter
from time import monotonic
from typing import Any

from zfabric import __version__, wire
from zfabric import messages as m
from zfabric.codec.serialise import dumps_inline
from zfabric.config import Settings
from zfabric.core.session import Session
from zfabric.ids import new_token
from zfabric.transport import Channel, connect

HELLO_S = 1.0

PAUSE_S = 1e-4
"""Seconds between two rounds, for each peer; a round takes a small part of that for one."""

NONE = dumps_inline(None, 1024) or b""


class _Row:
    """What a worker was given. seq: of the Done that told of its end, 0 before that."""

    __slots__ = ("attempt", "due", "seq")

    def __init__(self, attempt: int, due: float) -> None:
        self.attempt = attempt
        self.due = due
        self.seq = 0


class Peer:
    """One peer: its connection, its session and, of a worker, its rows."""

    def __init__(
        self, address: str, role: str, name: str, task_s: float, settings: Settings
    ) -> None:
        sealed = {"seal": True} if address.startswith("tcp://") else {}
        self.channel: Channel = connect(address, max_frame=settings.max_frame, **sealed)
        self.welcomed = False
        self.begun: Counter[int] = Counter()
        """How often each task was begun."""
        self.ended = 0
        self._role = role
        self._name = name
        self._task_s = task_s
        self._settings = settings
        self._rows: dict[int, _Row] = {}
        self._previous = 0
        self._begin(monotonic())

    def _begin(self, now: float) -> None:
        self.session = Session(new_token(), settings=self._settings, now=now)
        self.welcomed = False
        self.due = now

    def turn(self, now: float) -> None:
        """Take in what has come, do what is due, send."""
        self._receive(now)
        if now >= self.due:
            self._tick(now)
        send, session = self.channel.send, self.session
        while (frames := session.next_frames()) is not None and send(frames):
            session.sent()

    def _receive(self, now: float) -> None:
        while (frames := self.channel.recv()) is not None:
            if not frames:
                if self.welcomed:
                    self.session.reconnected()
                self.due = now
                continue
            header, message = wire.decode(frames)
            if header.token == self.session.token and self.session.receive(
                header, message, now, len(frames[1])
            ):
                self._take(header, message, now)
        acked = self.session.acked
        if self._rows and acked:
            for id_ in [i for i, row in self._rows.items() if 0 < row.seq <= acked]:
                del self._rows[id_]

    def _tick(self, now: float) -> None:
        if not self.welcomed:
            if not self.session.has_unsent:
                self.session.post(self._hello())
            self.due = now + HELLO_S
            return
        self.due = self.session.tick(now)
        ended = [(id_, row) for id_, row in self._rows.items() if not row.seq and row.due <= now]
        if ended:
            ids = [id_ for id_, _ in ended]
            attempts = [row.attempt for _, row in ended]
            self._done(ids, attempts, m.VALUE, NONE)
            for _, row in ended:
                row.seq = self.session.posted
            self.ended += len(ended)
        later = [row.due for row in self._rows.values() if not row.seq]
        self.due = min([self.due, *later])

    def _done(self, ids: list[int], attempts: list[int], status: int, payload: bytes) -> None:
        n = len(ids)
        self.session.post(m.Done(ids, attempts, bytes([status]) * n, [payload] * n, 1))

    def _hello(self) -> m.Hello:
        return m.Hello(
            self._role,
            self._name,
            __version__,
            platform.python_version(),
            socket.gethostname(),
            os.getpid(),
            slots=1 if self._role == m.WORKER else 0,
            previous=self._previous,
        )

    def _take(self, header: wire.Header, message: m.Message, now: float) -> None:
        kind = type(message)
        if kind is m.Welcome:
            if not self.welcomed:
                self.welcomed = True
                self.session.epoch = header.epoch
                self.due = now
                if self._previous:
                    for row in self._rows.values():
                        row.seq = 0
                    attempts = [row.attempt for row in self._rows.values()]
                    self.session.post(m.Inventory(list(self._rows), attempts, [], [], 1))
        elif kind is m.Refuse:
            if self._role == m.WORKER:
                self._previous = self.session.token if self.welcomed else self._previous
            self._begin(now)
        elif isinstance(message, m.Run):
            for id_, attempt in zip(message.ids, message.attempts, strict=True):
                self._rows[id_] = _Row(attempt, now + self._task_s)
                self.begun[id_] += 1
            self.due = min(self.due, now + self._task_s)
        elif isinstance(message, m.Drop):
            known = [id_ for id_ in message.ids if id_ in self._rows]
            gone = [self._rows.pop(id_) for id_ in known]
            attempts = [row.attempt for row in gone if not row.seq]
            ids = [id_ for id_, row in zip(known, gone, strict=True) if not row.seq]
            self._done(ids, attempts, m.CANCELLED, b"")
        elif isinstance(message, m.Recall):
            self.session.post(m.Returned([], [], 1))


class Crowd:
    """Some peers, served by one loop."""

    def __init__(self, address: str, n: int, role: str, task_s: float) -> None:
        settings = Settings.load()
        names = (f"crowd-{os.getpid()}-{number}" for number in range(n))
        self.peers = [Peer(address, role, name, task_s, settings) for name in names]

    def run(self, until_fd: int) -> None:
        """Serve all until that descriptor can be read.

        By rounds: a poll of thousands of sockets, each time that one has a message, would take the
        machine that is to be measured.
        """
        told = False
        pause_s = max(0.02, PAUSE_S * len(self.peers))
        while not select.select([until_fd], [], [], pause_s)[0]:
            now = monotonic()
            for peer in self.peers:
                peer.turn(now)
            if not told and all(peer.welcomed for peer in self.peers):
                told = True
                print("welcomed", flush=True)

    def told(self) -> dict[str, Any]:
        """What became of it."""
        begun: Counter[int] = Counter()
        for peer in self.peers:
            begun.update(peer.begun)
        return {
            "welcomed": sum(peer.welcomed for peer in self.peers),
            "begun": len(begun),
            "begun_twice": sum(n > 1 for n in begun.values()),
        }

    def close(self) -> None:
        for peer in self.peers:
            peer.channel.close()


def main(arguments: list[str]) -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m zfabric.testing.crowd")
    parser.add_argument("address")
    parser.add_argument("n", type=int, help="peers")
    parser.add_argument("--clients", action="store_true", help="clients in place of workers")
    parser.add_argument("--task", type=float, default=0.5, help="seconds that a row takes [0.5]")
    options = parser.parse_args(arguments)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # four for each peer
    role = m.CLIENT if options.clients else m.WORKER
    crowd = Crowd(options.address, options.n, role, options.task)
    crowd.run(sys.stdin.fileno())
    print(json.dumps(crowd.told()), flush=True)
    crowd.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
