"""Links in virtual time that delay, repeat and lose, the way a reconnecting transport does.

What ZeroMQ, and TCP under it, can do to messages, and nothing else: within a connection they
arrive whole and in order, late; when the connection breaks, an unknown number of the last ones is
lost in each direction; what was on its way may still arrive after messages of the next
connection. Repeating a message is beyond that, but a session must bear it too.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

Frames = Sequence[Any]


class Weather(NamedTuple):
    """How bad a link is."""

    delay_s: float = 0.001
    """Seconds on the way: between a tenth of this and all of it, evenly."""
    p_slow: float = 0.0
    """Chance per message to be late by up to `slow_s`; all behind it wait too."""
    slow_s: float = 0.5
    p_twice: float = 0.0
    """Chance per message to arrive twice."""
    capacity: int = 1000
    """Messages under way from which on `send` takes no more."""


FAIR = Weather()


class Pipe:
    """One direction of one connection."""

    __slots__ = ("_last", "_rng", "_under_way", "closed", "lost", "weather")

    def __init__(self, rng: random.Random, weather: Weather = FAIR) -> None:
        self.weather = weather
        self.closed = False
        self.lost = 0
        """Messages that the cut took."""
        self._rng = rng
        self._last = 0.0
        self._under_way: deque[tuple[float, Frames]] = deque()

    def send(self, frames: Frames, now: float) -> bool:
        """Whether it was taken. A closed pipe takes everything and delivers none of it."""
        if self.closed:
            self.lost += 1
            return True
        weather, rng = self.weather, self._rng
        if len(self._under_way) >= weather.capacity:
            return False
        delay = weather.delay_s * (0.1 + 0.9 * rng.random())
        if weather.p_slow and rng.random() < weather.p_slow:
            delay += weather.slow_s * rng.random()
        self._last = max(self._last, now + delay)
        self._under_way.append((self._last, frames))
        if weather.p_twice and rng.random() < weather.p_twice:
            self._under_way.append((self._last, frames))
        return True

    def due(self) -> float | None:
        """When the next message arrives; None when nothing is under way."""
        return self._under_way[0][0] if self._under_way else None

    def recv(self, now: float) -> Frames | None:
        """The next message that has arrived by now."""
        under_way = self._under_way
        if under_way and under_way[0][0] <= now:
            return under_way.popleft()[1]
        return None

    def cut(self) -> None:
        """The connection breaks: some of the last messages are lost, the others still arrive."""
        self.closed = True
        keep = self._rng.randint(0, len(self._under_way))
        self.lost += len(self._under_way) - keep
        while len(self._under_way) > keep:
            self._under_way.pop()

    def __len__(self) -> int:
        return len(self._under_way)
