"""A broker's machine and the far ends of its sessions, for tests without sockets."""

from __future__ import annotations

from typing import Any

from zfabric import messages as m
from zfabric import wire
from zfabric.config import Settings
from zfabric.core.admission import Admission
from zfabric.core.broker import BrokerMachine
from zfabric.core.journal import Entry
from zfabric.core.session import Session

SETTINGS = Settings()
EPOCH = 4242


class Peer:
    """The far end of one session, and the connection that it has now."""

    def __init__(self, house: House, token: int, role: str = m.CLIENT, **hello: Any) -> None:
        self.house = house
        self.link = b"%d/1" % token
        self.session = Session(token, settings=SETTINGS, now=house.now)
        self.heard: list[m.Message] = []
        self.welcome: m.Welcome | None = None
        self.is_deaf = False
        """What is sent to it lies in its socket, unread."""
        fields = {"name": "", "zfabric": "1", "python": "3.12.1", "host": "host", "pid": token}
        if role == m.WORKER:
            fields["slots"] = 1  # type: ignore[assignment]
        self.hello = m.Hello(role, **{**fields, **hello})

    def greet(self) -> Peer:
        self.say(self.hello)
        return self

    def say(self, *messages: m.Message) -> list[m.Message]:
        """Post these, deliver everything, and return what came back."""
        for message in messages:
            self.session.post(message)
        self.push()
        return self.house.deliver(self)

    def push(self) -> None:
        while (frames := self.session.next_frames()) is not None:
            self.session.sent()
            self.house.machine.receive(self.link, frames, self.house.now)

    def redial(self) -> bytes:
        """A new connection; returns the old one."""
        old, self.link = self.link, self.link + b"x"
        self.session.reconnected()
        return old

    @property
    def number(self) -> int:
        assert self.welcome is not None
        return self.welcome.number


class House:
    """A broker, its peers by their connections, and the time."""

    def __init__(
        self,
        settings: Settings = SETTINGS,
        admission: Admission | None = None,
        saved: list[Entry] | None = None,
    ) -> None:
        """saved: the entries of its journal; None: it has none."""
        self.now = 100.0
        self.machine = BrokerMachine(
            epoch=EPOCH,
            version="1",
            python="3.12.4",
            settings=settings,
            now=self.now,
            admission=admission,
            saved=saved,
        )
        self.peers: dict[int, Peer] = {}
        self.strangers: list[tuple[bytes, m.Message]] = []

    def peer(self, token: int, role: str = m.CLIENT, **hello: Any) -> Peer:
        peer = self.peers[token] = Peer(self, token, role, **hello)
        return peer

    def deliver(self, to: Peer | None = None) -> list[m.Message]:
        """End the turn; every message goes to where its session is routed."""
        before = len(to.heard) if to else 0
        self.machine.turn()
        replies = list(self.machine.replies)
        self.machine.replies.clear()
        for link, frames in replies:
            header, message = wire.decode(frames)
            for peer in self.peers.values():
                if peer.link == link and peer.session.token == header.token:
                    self._hand(peer, header, message)
                    break
            else:
                self.strangers.append((link, message))
        for record in list(self.machine.dirty):
            del self.machine.dirty[record]
            if record.peer is None:
                continue
            while (frames := record.session.next_frames()) is not None:
                record.session.sent()
                header, message = wire.decode(frames)
                peer = self.peers[header.token]
                if peer.link == record.peer and not peer.is_deaf:
                    self._hand(peer, header, message)
        return to.heard[before:] if to else []

    def _hand(self, peer: Peer, header: wire.Header, message: m.Message) -> None:
        if isinstance(message, m.Welcome):
            peer.session.epoch = header.epoch
            peer.welcome = message
        if peer.session.receive(header, message, self.now, 1000):
            peer.heard.append(message)

    def pass_time(self, seconds: float, step: float = 0.25, alive: tuple[Peer, ...] = ()) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += step
            for peer in alive:
                peer.session.tick(self.now)
                peer.push()
            assert self.machine.tick(self.now) > self.now
            self.deliver()
