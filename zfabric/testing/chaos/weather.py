"""What the bytes of one connection go through, in one direction: a pipe without sockets.

Bytes come in with the time, and go out when they are due. What is drawn by chance is drawn per byte
offset, from the seed, the number of the connection and the direction: how the kernel cuts the
stream into pieces changes nothing.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from random import Random

UP = "up"
"""From who dialled the proxy to its target."""
DOWN = "down"

HELD_BYTES = 1 << 20
"""A pipe that holds this much takes no more: the sender's socket fills, as on a slow link."""

PIECE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Weather:
    """delay_s, jitter_s: each piece is late by delay_s and up to jitter_s more, in order within its
    connection; connections overtake one another.  rate: bytes per second, per connection and
    direction.  flip_every: bytes between two flipped bits, on average; 0: none.  cut_every: bytes
    until a connection is cut, on average, at any byte; 0: never."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    rate: float = math.inf
    flip_every: int = 0
    cut_every: int = 0

    def __post_init__(self) -> None:
        if min(self.delay_s, self.jitter_s, self.flip_every, self.cut_every) < 0 or self.rate <= 0:
            raise ValueError("weather is made of numbers of 0 or more, and a rate above 0")


CALM = Weather()


class Pipe:
    """One direction of one connection.

    frozen: nothing goes out.  cut_at: the offset of the first byte that is not let through; when
    all before it have gone, `is_cut` is true.
    """

    def __init__(self, seed: str, weather: Weather, now: float) -> None:
        self.weather = weather
        self.frozen = False
        self.ended = False
        """The sender has closed its side: so do we, when all is through."""
        self.broken = False
        """The sender's end is gone: whoever is not kept from it hears of that at once."""
        self.told = False
        """The other side has heard of the end."""
        self.n_in = 0
        self.n_out = 0
        self.flips = 0
        self._asked_cut: int | None = None
        self._chance_cut: int | None = None
        self._random = Random(seed)
        self._late = Random(seed + "/late")
        self._flip_at = -1
        self._held: deque[tuple[float, bytes]] = deque()
        self._n_held = 0
        self._due = now
        self._paid = now
        self.set_weather(weather)

    def set_weather(self, weather: Weather) -> None:
        """For what comes in from now on."""
        self.weather = weather
        self._flip_at = self._next_flip(self.n_in)
        if not weather.cut_every:
            self._chance_cut = None
        elif self._chance_cut is None:
            self._chance_cut = self.n_in + self._gap(weather.cut_every)

    def cut_after(self, nbytes: int) -> None:
        """Let so many bytes more through, whatever the weather."""
        self._asked_cut = self.n_out + nbytes

    @property
    def cut_at(self) -> int | None:
        """The offset of the first byte that is not let through, for whichever reason."""
        cuts = [at for at in (self._asked_cut, self._chance_cut) if at is not None]
        return min(cuts, default=None)

    @property
    def has_room(self) -> bool:
        return self._n_held < HELD_BYTES and not self.ended

    @property
    def is_cut(self) -> bool:
        cut_at = self.cut_at
        return cut_at is not None and self.n_out >= cut_at

    @property
    def is_empty(self) -> bool:
        return not self._held

    def put(self, data: bytes, now: float) -> None:
        """Bytes come in."""
        data = self._flipped(data)
        self.n_in += len(data)
        self._n_held += len(data)
        weather = self.weather
        late = weather.delay_s
        if weather.jitter_s:
            late += self._late.uniform(0.0, weather.jitter_s)
        self._due = max(self._due, now + late)  # never before what came earlier
        self._held.append((self._due, data))

    def take(self, now: float, most: int = PIECE) -> bytes:
        """Bytes that are due, b"" for none. What the other side does not take, goes to back()."""
        if self.frozen or not self._held or self.is_cut:
            return b""
        due, data = self._held[0]
        if due > now:
            return b""
        n = min(len(data), most)
        if self.weather.rate < math.inf:
            # A hundredth of a second's worth may be saved up, so that pieces do not get tiny.
            # A byte is saved up in any case: it may take longer.
            self._paid = max(self._paid, now - max(0.01, 1.0 / self.weather.rate))
            n = min(n, max(0, int((now - self._paid) * self.weather.rate + 1e-6)))
            self._paid += n / self.weather.rate
        cut_at = self.cut_at
        if cut_at is not None:
            n = min(n, cut_at - self.n_out)
        if not n:
            return b""
        self._held.popleft()
        if n < len(data):
            self._held.appendleft((due, data[n:]))
        self.n_out += n
        self._n_held -= n
        return data[:n]

    def back(self, data: bytes) -> None:
        """What was taken and could not be sent."""
        if data:
            self._held.appendleft((0.0, data))
            self.n_out -= len(data)
            self._n_held += len(data)

    def wake_at(self, now: float) -> float:
        """When take() may give something; math.inf when only new bytes or a thaw change that."""
        if self.frozen or not self._held or self.is_cut:
            return math.inf
        due = self._held[0][0]
        if self.weather.rate < math.inf:
            due = max(due, self._paid + 0.002, self._paid + 1.0 / self.weather.rate)
        return due

    def _flipped(self, data: bytes) -> bytes:
        if self._flip_at < 0 or self._flip_at >= self.n_in + len(data):
            return data
        changed = bytearray(data)
        while 0 <= self._flip_at < self.n_in + len(data):
            changed[self._flip_at - self.n_in] ^= 1 << self._random.randrange(8)
            self.flips += 1
            self._flip_at = self._next_flip(self._flip_at + 1)
        return bytes(changed)

    def _next_flip(self, after: int) -> int:
        every = self.weather.flip_every
        return after + self._gap(every) if every else -1

    def _gap(self, mean: int) -> int:
        return int(self._random.expovariate(1.0 / mean))
