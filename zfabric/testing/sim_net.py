"""Virtual time, and connections in it that break and are dialled again."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import TypeAlias

from zfabric.testing.links import Frames, Pipe, Weather

NEVER = float("inf")

Entry: TypeAlias = "tuple[float, int, Node | None, Callable[[], None] | None]"


class Agenda:
    """What happens when. now: virtual seconds."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = 0.0
        self.n_steps = 0
        self.begun: set[tuple[int, int]] = set()
        """(task, attempt) of every row that began in some slot; (task, -1) of those that must not
        run twice."""
        self.holders: dict[str, Node] = {}
        """Who attached last to each named run."""
        self.ended_runs: set[str] = set()
        """Runs that somebody has wanted to be over."""
        self.on_device: set[int] | None = set()
        """Tasks that need a device for themselves; None when that is not looked at."""
        self._entries: list[Entry] = []
        self._count = itertools.count()

    def number(self) -> int:
        """A number that was not given before."""
        return next(self._count)

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Call `act` then."""
        heapq.heappush(self._entries, (when, next(self._count), None, act))

    def wake(self, node: Node, when: float) -> None:
        """Give the node a turn then; Node.wake is the way to ask for it."""
        heapq.heappush(self._entries, (when, next(self._count), node, None))

    def run(self, until: float, done: Callable[[], bool] | None = None) -> bool:
        """Let time pass, at most `until` then. Returns whether `done` became true."""
        entries, pop = self._entries, heapq.heappop
        while entries and entries[0][0] <= until:
            when, _, node, act = pop(entries)
            if when > self.now:
                self.now = when
            if act is not None:
                act()
            elif node is not None and node.wake_at == when:
                node.wake_at = NEVER
                if not node.alive:
                    continue
                if node.stopped_until > when:
                    node.wake(node.stopped_until)
                    continue
                self.n_steps += 1
                node.wake(max(node.turn(self.now), self.now + 1e-6))
                if done is not None and not self.n_steps & 7 and done():
                    return True
        if done is not None and done():
            return True
        self.now = until
        return False


class Node:
    """A process: it gets turns while it is alive and not stopped."""

    def __init__(self, agenda: Agenda) -> None:
        self.agenda = agenda
        self.alive = True
        self.stopped_until = 0.0
        self.wake_at = NEVER

    def wake(self, when: float) -> None:
        """Have a turn then at the latest."""
        if when < self.wake_at:
            self.wake_at = when
            self.agenda.wake(self, when)

    def turn(self, now: float) -> float:
        """Do what is due. Returns when to be woken again at the latest."""
        raise NotImplementedError


class Listener:
    """Where peers dial in. connections: those that it does not know to be gone."""

    def __init__(self, owner: Node) -> None:
        self.owner = owner
        self.connections: dict[bytes, Connection] = {}


class Connection:
    """One connection: two pipes that break together."""

    __slots__ = ("broken", "down", "id", "owner", "told_at", "up")

    def __init__(self, owner: Node, number: int, weather: Weather) -> None:
        rng = owner.agenda.rng
        self.owner = owner
        """Who dialled."""
        self.id = b"c%d" % number
        self.up = Pipe(rng, weather)
        self.down = Pipe(rng, weather)
        self.broken = False
        self.told_at = NEVER
        """When the listener hears that it broke."""


class Dial:
    """A channel to a listener that dials again by itself."""

    def __init__(
        self, owner: Node, target: Callable[[], Listener | None], weather: Weather
    ) -> None:
        self._owner = owner
        self._target = target
        self._weather = weather
        self._rng = owner.agenda.rng
        self._redial_at = 0.0
        self.unreachable_until = 0.0
        """A redial before that time would find nobody."""
        self._left: Listener | None = None
        self.connection: Connection | None = None

    def send(self, frames: Frames, now: float) -> bool:
        """Whether it was taken; False while there is no connection."""
        connection = self._connected(now)
        if connection is None:
            return False
        taken = connection.up.send(frames, now)
        due = connection.up.due()
        listener = self._left
        if due is not None and listener is not None:
            listener.owner.wake(due)
        return taken

    def recv(self, now: float) -> Frames | None:
        """The next message, [] when the connection broke, None: nothing now."""
        connection = self._connected(now)
        if connection is None:
            return None
        frames = connection.down.recv(now)
        if frames is None and connection.broken and not len(connection.down):
            self.connection = None
            redial_at = now + self._rng.choice([0.0, 0.05, 0.2, 0.4])
            self._redial_at = max(redial_at, self.unreachable_until)
            return []
        return frames

    def due(self) -> float:
        """When recv may have something."""
        connection = self.connection
        if connection is None:
            return self._redial_at
        if connection.broken and not len(connection.down):
            return 0.0
        due = connection.down.due()
        return NEVER if due is None else due

    def cut(self, told_after_s: float = 0.0) -> None:
        """The connection breaks; both ends hear of it once they have read what still arrives."""
        connection = self.connection
        if connection is None or connection.broken:
            return
        now = self._owner.agenda.now
        connection.broken = True
        connection.up.cut()
        connection.down.cut()
        connection.told_at = now + told_after_s
        listener = self._left
        assert listener is not None
        listener.owner.wake(max(connection.told_at, connection.up.due() or 0.0))
        self._owner.wake(now)

    def _connected(self, now: float) -> Connection | None:
        if self.connection is None and now >= self._redial_at:
            listener = self._target()
            if listener is None or not listener.owner.alive:
                self._redial_at = now + 0.2
                return None
            connection = Connection(self._owner, self._owner.agenda.number(), self._weather)
            listener.connections[connection.id] = connection
            self._left = listener
            self.connection = connection
        return self.connection
