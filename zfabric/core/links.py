"""What is known of the way to one peer, learned from the values that cross it.

The receiver meters a link. It asks for parts and notes when they come; while more than one is
under way, the gap between two arrivals is what the link took for the later one. Parts that wait
in a queue of ours come in bursts, so no single gap means anything: a meter is a ratio of two
fading sums, of bytes and of seconds. The receiver tells the rate with each request for a part.

A part that came compressed shows only that the link is *at least* so fast: where its sender
spends longer compressing than the link carrying, the wire stands idle. So compressed parts may
raise what is known and never lower it. Where the link has become faster meanwhile, nobody would
notice as long as all parts come compressed; the sender therefore lets one go raw now and then,
when that costs no more than a few hundredths of what the parts since the last one have taken.

The sender keeps the verdicts: how many, why, and what they have saved. A link that was judged one
way stays with it until the other is better by a margin, so that noise does not flip it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

FADE_NBYTES = 32 * 2**20
"""Bytes after which a sample counts half: 16 parts, several bursts, some 30 ms of a fast link."""

FADE_S = 1.0
"""Seconds after which it counts half, on a link where that takes longer."""

UNKNOWN_RATE = 125e6
"""Bytes/s that a link counts as having until it is measured: 1 Gbit/s. Wrong for a few parts; a
slow link taken for a fast one would pay seconds for each."""

PROBE_SHARE = 0.025
"""Of the link's time that raw parts may cost for the sake of measuring. Not of all time: a link
that is used for a moment now and then would go raw each time."""

UNASKED = frozenset({"off", "not asked for"})
"""Verdicts on parts that nobody thought of compressing."""

PROBE_NBYTES = 256 * 1024
"""Smaller parts go alone, before others are under way, and measure no more than a round trip."""

FIRST_PROBE_S = 0.03
"""What the first part may take longer for the sake of measuring: before it, nothing is known but
how long a small part took, round trip included."""

MARGIN = 1.08
"""How much better the other way must be before a link changes over."""


class Meter:
    """Bytes per second over the recent past."""

    __slots__ = ("nbytes", "seconds")

    def __init__(self) -> None:
        self.nbytes = 0.0
        self.seconds = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        """So many bytes took so long."""
        fade = 0.5 ** max(nbytes / FADE_NBYTES, seconds / FADE_S)
        self.nbytes = self.nbytes * fade + nbytes
        self.seconds = self.seconds * fade + seconds

    @property
    def rate(self) -> float:
        """Bytes/s; 0 while nothing was seen."""
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0


class Inbound:
    """One link as its receiver sees it.

    n_raw, n_packed: parts that came.  raw_nbytes, wire_nbytes: what they hold, and what they were
    on the wire.  round_trip: of a request for a small part, in seconds; 0 while unknown.
    """

    __slots__ = (
        "_asked_at",
        "_at_least",
        "_came_at",
        "_n_open",
        "_packed",
        "_raw",
        "n_packed",
        "n_raw",
        "raw_nbytes",
        "round_trip",
        "unpack_s",
        "wire_nbytes",
    )

    def __init__(self) -> None:
        self.n_raw = 0
        self.n_packed = 0
        self.raw_nbytes = 0
        self.wire_nbytes = 0
        self.unpack_s = 0.0
        self.round_trip = 0.0
        self._raw = Meter()
        self._packed = Meter()
        self._at_least = 0.0
        self._n_open = 0
        self._asked_at = 0.0
        self._came_at = -1.0

    @property
    def rate(self) -> int:
        """Bytes/s, rounded; 0 while unknown."""
        return int(max(self._raw.rate or self._at_least, self._packed.rate))

    def asked(self, now: float) -> None:
        """A request leaves."""
        if not self._n_open:
            self._asked_at = now
            self._came_at = -1.0
        self._n_open += 1

    def came(self, wire_nbytes: int, raw_nbytes: int, now: float, unpack_s: float = 0.0) -> None:
        """A part arrived; raw_nbytes is what it holds, unpack_s what decompressing it took."""
        packed = wire_nbytes != raw_nbytes
        self.wire_nbytes += wire_nbytes
        self.raw_nbytes += raw_nbytes
        self.unpack_s += unpack_s
        if packed:
            self.n_packed += 1
        else:
            self.n_raw += 1
        if not self._n_open:
            return
        self._n_open -= 1
        if self._came_at < 0.0:
            self._first_came(wire_nbytes, packed, now)
        else:
            meter = self._packed if packed else self._raw
            meter.add(wire_nbytes, max(0.0, now - self._came_at))
        self._came_at = now

    def _first_came(self, wire_nbytes: int, packed: bool, now: float) -> None:
        """After a silence: the time holds a round trip, and is no measure of the rate alone."""
        seconds = max(now - self._asked_at, 1e-6)
        if not self.round_trip or seconds < self.round_trip:
            self.round_trip = seconds
        else:
            self.round_trip += (seconds - self.round_trip) / 8
        if not packed:
            self._at_least = max(self._at_least, wire_nbytes / seconds)

    def silenced(self) -> None:
        """What was asked for will not come: the connection broke, or the source has nothing."""
        self._n_open = 0

    def as_dict(self) -> dict[str, Any]:
        """For people and programs: see Client.links."""
        rate = self.rate
        saved = (self.raw_nbytes - self.wire_nbytes) / rate - self.unpack_s if rate else 0.0
        return {
            "direction": "in",
            "rate": rate,
            "round_trip_s": self.round_trip,
            "raw_nbytes": self.raw_nbytes,
            "wire_nbytes": self.wire_nbytes,
            "verdicts": {"raw": self.n_raw, "packed": self.n_packed},
            "saved_s": saved if self.n_packed else 0.0,
        }


class Outbound:
    """One link as its sender sees it: verdicts, and what they have brought.

    rate: bytes/s that the receiver told last, 0 while it does not know.
    saved_s: seconds of the link that compressing has saved, less what it cost; may be negative.
    """

    __slots__ = ("_packed_s", "_packs", "rate", "raw_nbytes", "saved_s", "verdicts", "wire_nbytes")

    def __init__(self) -> None:
        self.rate = 0
        self.raw_nbytes = 0
        self.wire_nbytes = 0
        self.saved_s = 0.0
        self.verdicts: Counter[str] = Counter()
        self._packs = False
        self._packed_s: float | None = None
        """Time that parts have taken since the last raw one; None before the first."""

    @property
    def assumed_rate(self) -> float:
        """Bytes/s to decide by."""
        return float(self.rate) if self.rate else UNKNOWN_RATE

    @property
    def margin(self) -> float:
        """By how much compressing has to be faster: a little more or less than 1."""
        return 1.0 / MARGIN if self._packs else MARGIN

    def is_probe_due(self, nbytes: int) -> bool:
        """Whether a part that would be compressed should go raw, to measure the link again."""
        if not self.rate or nbytes < PROBE_NBYTES:
            return False
        cost_s = nbytes / self.rate
        if self._packed_s is None:
            self._packed_s = 0.0
            return cost_s < FIRST_PROBE_S
        return cost_s < self._packed_s * PROBE_SHARE

    def went_raw(self, nbytes: int, reason: str, spent_s: float = 0.0) -> None:
        """A part leaves as it is; spent_s went into finding out."""
        if reason not in UNASKED and nbytes >= PROBE_NBYTES:
            self._packed_s = 0.0
        self.verdicts[reason] += 1
        self.raw_nbytes += nbytes
        self.wire_nbytes += nbytes
        self.saved_s -= spent_s
        if reason == "slower":
            self._packs = False

    def went_packed(self, nbytes: int, wire_nbytes: int, reason: str, spent_s: float) -> None:
        """A part leaves compressed."""
        self._packs = True
        if self._packed_s is not None:
            self._packed_s += max(wire_nbytes / self.assumed_rate, spent_s)
        self.verdicts[reason] += 1
        self.raw_nbytes += nbytes
        self.wire_nbytes += wire_nbytes
        self.saved_s += (nbytes - wire_nbytes) / self.assumed_rate - spent_s

    def as_dict(self) -> dict[str, Any]:
        """For people and programs: see Client.links."""
        return {
            "direction": "out",
            "rate": self.rate,
            "round_trip_s": 0.0,
            "raw_nbytes": self.raw_nbytes,
            "wire_nbytes": self.wire_nbytes,
            "verdicts": dict(self.verdicts),
            "saved_s": self.saved_s,
        }


class CodecRecord:
    """How fast a codec was, by what it was given: (item size, size class, ratio class)."""

    def __init__(self) -> None:
        self._meters: dict[tuple[int, int, int], Meter] = {}

    def rate(self, itemsize: int, nbytes: int, ratio: float) -> float:
        """Bytes/s of one thread; 0 while nothing of the kind was seen."""
        meter = self._meters.get(_class_of(itemsize, nbytes, ratio))
        return meter.rate if meter is not None else 0.0

    def add(self, itemsize: int, nbytes: int, ratio: float, seconds: float) -> None:
        """So many bytes of that kind took so long."""
        self._meters.setdefault(_class_of(itemsize, nbytes, ratio), Meter()).add(nbytes, seconds)


def _class_of(itemsize: int, nbytes: int, ratio: float) -> tuple[int, int, int]:
    # lz4 is fast on what compresses well and on what does not at all: hence the ratio.
    return itemsize, nbytes.bit_length(), int(min(ratio, 1.0) * 5)
