"""Wrong messages at the parser and the broker's machine, in this process.

A client and a worker have sessions there, in whose names wrong messages are sent as well: only
those get past the header. Where the broker throws one out, it comes again. Now and then a right
task runs from one end to the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from msgpack import packb

from zfabric import messages as m
from zfabric import wire
from zfabric.core.broker import BrokerMachine
from zfabric.errors import RemoteProtocolError
from zfabric.ids import task_id
from zfabric.testing.fuzz.inputs import Inputs
from zfabric.wire import PROTOCOL
from zfabric.wire.header import MAGIC

EPOCH = 77
TASK_EVERY = 5000
RENEW_EVERY = 64
"""Messages after which a peer that was not thrown out says good-bye: what it holds stays small."""


class _Peer:
    """One end of a session that sends whatever it is told, with the right numbers on it."""

    def __init__(self, role: str, token: int) -> None:
        self.role = role
        self.token = token
        self.link = b"%s/%d" % (role.encode(), token)
        self.heard: list[Any] = []
        self.number = 0
        self.posted = 0
        self.received = 0
        self.sent = 0

    def frames(self, kind: int, sequenced: bool, frames: Sequence[Any]) -> list[Any]:
        """A whole message: the next in sequence where its kind is."""
        self.sent += 1
        self.posted += sequenced
        seq = self.posted if sequenced else 0
        return [packb([MAGIC, PROTOCOL, kind, self.token, EPOCH, seq, self.received]), *frames]

    def take(self, frames: Sequence[Any]) -> None:
        """What the broker says must be readable, and in order."""
        header, message = wire.decode(frames)
        if header.seq:
            assert header.seq == self.received + 1
            self.received = header.seq
        if type(message) is m.Welcome:
            self.number = message.number
        self.heard.append(message)


class MachineFuzz:
    """counts: what the parser said, by reason, and "tasks" that ran."""

    def __init__(self, seed: int) -> None:
        self.inputs = Inputs(seed)
        self.counts: Counter[str] = Counter()
        self.now = 0.0
        self._token = 100
        self._peers: dict[int, _Peer] = {}
        self.machine = BrokerMachine(epoch=EPOCH, version="0", python="", now=0.0)
        self._client = self._join(m.CLIENT)
        self._worker = self._join(m.WORKER)
        self._n = 0

    def step(self) -> None:
        """One wrong message. Raises whatever escapes, AssertionError when a task's result is
        wrong."""
        self._n += 1
        self.now += 0.001
        if self._n % 3:
            frames = self.inputs.message()
            try:
                wire.decode(frames)
                self.counts["right"] += 1
            except RemoteProtocolError as exc:
                self.counts[exc.reason] += 1
            self.machine.receive(b"stranger/%d" % (self._n % 50), frames, self.now)
        else:
            peer = self._client if self._n % 2 else self._worker
            self.machine.receive(peer.link, peer.frames(*self.inputs.body()), self.now)
        if not self._n % 8:
            self.machine.tick(self.now)
            self.deliver()
            self._renew()
        if not self._n % TASK_EVERY:
            self.task()

    def task(self) -> None:
        """A right task, from a client by the machine to a worker and back."""
        self._renew(all_of_them=True)
        client, worker = self._client, self._worker
        id_ = task_id(client.number, 1)
        self._say(client, m.Submit([(1, "f", b"blob")], [id_], [1], [b"args"]))
        run = next(x for x in worker.heard if type(x) is m.Run)
        assert (list(run.ids), list(run.payloads)) == ([id_], [b"args"])
        self._say(worker, m.Done([id_], run.attempts, bytes([m.VALUE]), [b"result"], 4))
        results = next(x for x in client.heard if type(x) is m.Results)
        assert list(results.payloads) == [b"result"]
        self.counts["tasks"] += 1

    def deliver(self) -> None:
        """End the broker's turn; each peer gets what is for it."""
        machine = self.machine
        machine.turn()
        machine.log.clear()
        for _, frames in machine.replies:
            wire.decode(frames)
        machine.replies.clear()
        for record in list(machine.dirty):
            del machine.dirty[record]
            peer = self._peers.get(record.session.token)
            while (frames := record.session.next_frames()) is not None:
                record.session.sent()
                if peer is not None:
                    peer.take(frames)

    def _renew(self, all_of_them: bool = False) -> None:
        """Peers that were thrown out come again; those that said enough leave first."""
        for peer in (self._client, self._worker):
            known = peer.token in self.machine.sessions
            if known and not all_of_them and peer.sent < RENEW_EVERY:
                peer.heard.clear()
                self._say(peer, m.Beat(peer.posted))  # acks what it has heard
                continue
            del self._peers[peer.token]
            if known:
                self._say(peer, m.Bye())
                self.machine.gone(peer.link, self.now)
            fresh = self._join(peer.role)
            if peer is self._client:
                self._client = fresh
            else:
                self._worker = fresh
        for token in set(self.machine.sessions) - set(self._peers):
            if self._n % 4096 == 0 or all_of_them:
                record = self.machine.sessions[token]
                self.machine.end_unsendable(record, "made by an accidental Hello", self.now)

    def _join(self, role: str) -> _Peer:
        self._token += 1
        peer = self._peers[self._token] = _Peer(role, self._token)
        slots = 2 if role == m.WORKER else 0
        self._say(peer, m.Hello(role, role, "0", "3.12", "host", 1, slots=slots))
        return peer

    def _say(self, peer: _Peer, message: m.Message) -> None:
        body = wire.encode_body(message)
        frames = peer.frames(body.kind, body.sequenced, body.frames)
        self.machine.receive(peer.link, frames, self.now)
        self.deliver()
