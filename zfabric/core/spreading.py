"""Who may read a large value from its holder now, so that a broadcast does not leave it N times.

A holder serves a few readers at a time and lets others wait, who know its sizes already and hear
that it lives. As soon as one reader has everything, those that wait are sent on to it, and it does
the same with them: a tree, in which each process gives the value a few times and nobody plans.
A reader is sent on once. When it comes back, for the other was gone, it is served here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

SPREAD_NBYTES = 4 * 2**20
"""A smaller value is served to whoever asks."""

MOST_READERS = 2
"""At a time. They share the holder's link, and each of them serves as many when it is done."""

SILENT_S = 5.0
"""After which a reader no longer counts."""

PATIENCE_S = 8.0
"""For which a reader waits at most; it gives up its source after 15 s."""

MOST_VALUES = 256

Place = tuple[int, str]
"""(worker's number, data address)."""


class _Spread:
    __slots__ = ("active", "away", "done", "sent_on", "turn", "waiting")

    def __init__(self) -> None:
        self.active: dict[Place, float] = {}
        self.done: list[Place] = []
        self.sent_on: set[Place] = set()
        self.away: set[Place] = set()
        """Those sent on that have not begun anew here: what they asked for before is void."""
        self.waiting: dict[Place, float] = {}
        self.turn = 0


class Readers:
    """Of one holder's values."""

    def __init__(self) -> None:
        self._spreads: OrderedDict[int, _Spread] = OrderedDict()

    def ask(
        self, id_: int, place: Place, is_first: bool, is_last: bool, now: float
    ) -> Sequence[Place] | None:
        """What to do with a request for a part: () serve it, None let it wait; else the reader
        shall go to these places."""
        spread = self._spreads.get(id_)
        if spread is None:
            spread = self._spreads[id_] = _Spread()
            if len(self._spreads) > MOST_VALUES:
                self._spreads.popitem(last=False)
        active = spread.active
        if is_first:
            # Served in any case. Its place in the queue is taken now: with its second request it
            # may be so late that the first readers are gone, and all of the rest would be served.
            spread.away.discard(place)
            if not is_last and place not in active:
                if len(active) < MOST_READERS:
                    active[place] = now
                else:
                    spread.waiting.setdefault(place, now)
            return ()
        if place in spread.away:
            return self._others(spread)
        if place not in active:
            has_to_wait = place in spread.waiting or len(active) >= MOST_READERS
            if has_to_wait and spread.done and place not in spread.sent_on:
                spread.sent_on.add(place)
                spread.away.add(place)
                spread.waiting.pop(place, None)
                return self._others(spread)
            for other, seen in list(active.items()):
                if now - seen > SILENT_S:
                    del active[other]
            since = spread.waiting.setdefault(place, now)
            if len(active) >= MOST_READERS and now - since < PATIENCE_S:
                return None
            del spread.waiting[place]
        active[place] = now
        if is_last:
            del active[place]
            if place not in spread.done:
                spread.done.append(place)
        return ()

    def _others(self, spread: _Spread) -> list[Place]:
        """Two of those that have the value, in turn."""
        done = spread.done
        spread.turn += 1
        first = spread.turn % len(done)
        return [done[first], *([done[first - 1]] if len(done) > 1 else [])]
