"""What users in virtual time do with locks, and what must hold of them.

A client that was told that it holds a lock, and whose session goes on, stands first in that lock's
queue at the broker, whatever was lost on the way and however often the broker began again: so no
two hold one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from zfabric import messages as m
from zfabric.core.broker import BrokerMachine
from zfabric.errors import InternalError

if TYPE_CHECKING:
    from zfabric.testing.sim_client import SimClient

NAMES = ("a lock", "another lock")


class SimLocks:
    """The locks of one client. As `zfabric.Lock`, it asks anew when it comes back to a broker."""

    def __init__(self, client: SimClient) -> None:
        self.held: dict[int, str] = {}
        """By request."""
        self._client = client
        self._wanted: dict[int, m.Acquire] = {}
        self._last = 0

    def act(self) -> None:
        """Take a lock, let one go, or give up waiting for one."""
        rng = self._client.agenda.rng
        if self.held and rng.random() < 0.4:
            self._let_go(next(iter(self.held)))
        elif self._wanted and rng.random() < 0.3:
            self._give_up(next(iter(self._wanted)))
        else:
            self._ask(rng.choice(NAMES), rng.random() < 0.8)

    def end(self) -> None:
        """Let go of everything."""
        for request in list(self._wanted):
            self._give_up(request)
        for request in list(self.held):
            self._let_go(request)

    def answered(self, message: m.Locked) -> None:
        """The broker's word."""
        wanted = self._wanted.pop(message.request, None)
        if wanted is None:
            if message.held:
                self._say(m.Unlock(message.request))
        elif message.held:
            self.held[message.request] = wanted.name

    def came_back(self) -> None:
        """The broker restarted: what it said of requests that are open may be lost."""
        for request, wanted in list(self._wanted.items()):
            self._give_up(request)
            self._ask(wanted.name, wanted.waits)

    def session_lost(self) -> None:
        """All of them went with it."""
        self.held.clear()
        self._wanted.clear()

    @property
    def is_waiting(self) -> bool:
        """Whether a request is open."""
        return bool(self._wanted)

    def _ask(self, name: str, waits: bool) -> None:
        self._last += 1
        self._wanted[self._last] = m.Acquire(self._last, name, waits)
        self._say(self._wanted[self._last])

    def _give_up(self, request: int) -> None:
        del self._wanted[request]
        self._say(m.Unlock(request))

    def _let_go(self, request: int) -> None:
        del self.held[request]
        self._say(m.Unlock(request))

    def _say(self, message: m.Message) -> None:
        self._client.submitter.say(message)
        self._client.wake(self._client.agenda.now)


def check(machine: BrokerMachine, clients: Iterable[SimClient]) -> None:
    """Raise InternalError when the broker's queues are not as they must be."""
    parked = {record.number for record in machine.runs.parked.values()}
    first: dict[str, tuple[int, int]] = {}
    for name, number, request in machine.locks.requests():
        if number not in machine.by_number or number in parked:
            raise InternalError(f"{name} is asked for by session {number}, which nobody holds")
        first.setdefault(name, (number, request))
    for client in clients:
        record = machine.sessions.get(client.session.token)
        if record is None or not client.alive:
            continue
        for request, name in client.locks.held.items():
            if first.get(name) != (record.number, request):
                raise InternalError(
                    f"client {client.name} ({record.number}) holds {name} by request {request}, and"
                    f" the broker thinks that {first.get(name)} does"
                )
