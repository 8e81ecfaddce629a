"""Who may read a large value from its holder now, so that a broadcast does not leave it N times.

A holder serves a few readers at a time. Others are sent on to those, as soon as they have begun:
they pass on what they have while the rest is still on its way to them, and do the same with the
readers that are too many for them. That makes a tree, in which each process gives the value a few
times, all of them at once, and nobody plans. A reader is sent on once. When it comes back, for the
other was gone, it is served here.

What a process passes on while it comes may be given up half-way: its source is gone, and it begins
anew with another one, whose bytes may differ (see `transfer`). So whoever has read of the one
attempt gets nothing of the next: `Attempts` knows.
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

MOST_BEGUN = 4096
"""Readers of unfinished values that are remembered."""

Place = tuple[int, str]
"""(worker's number, data address)."""


class _Spread:
    __slots__ = ("active", "away", "givers", "sent_on", "turn", "waiting")

    def __init__(self) -> None:
        self.active: dict[Place, float] = {}
        self.givers: list[Place] = []
        """Those that have all of it, or at least its beginning."""
        self.sent_on: set[Place] = set()
        self.away: set[Place] = set()
        """Those sent on that have not begun anew here: what they asked for before is void."""
        self.waiting: dict[Place, float] = {}
        self.turn = 0


class Readers:
    """Of one holder's values.

    has_new: whether the last request that was asked about has made its reader one to whom others
    can be sent; then those that wait should ask again.
    """

    def __init__(self) -> None:
        self._spreads: OrderedDict[int, _Spread] = OrderedDict()
        self.has_new = False

    def ask(
        self, id_: int, place: Place, is_first: bool, is_last: bool, now: float
    ) -> Sequence[Place] | None:
        """What to do with a request for a part: () serve it, None let it wait; else the reader
        shall go to these places."""
        self.has_new = False
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
            if place in spread.givers:  # it begins anew, and has nothing
                spread.givers.remove(place)
            if not is_last and place not in active:
                if len(active) < MOST_READERS:
                    active[place] = now
                else:
                    spread.waiting.setdefault(place, now)
            return ()
        if place in spread.away:
            return self._others(spread)
        if place not in active:
            for other, seen in list(active.items()):
                if now - seen > SILENT_S:
                    del active[other]
                    if other in spread.givers:  # it never came to the end
                        spread.givers.remove(other)
            has_to_wait = place in spread.waiting or len(active) >= MOST_READERS
            if has_to_wait and spread.givers and place not in spread.sent_on:
                spread.sent_on.add(place)
                spread.away.add(place)
                spread.waiting.pop(place, None)
                return self._others(spread)
            since = spread.waiting.setdefault(place, now)
            if len(active) >= MOST_READERS and now - since < PATIENCE_S:
                return None
            del spread.waiting[place]
        active[place] = now
        if is_last:
            del active[place]
        # It has the beginning, or it would not ask for more. One that came back from another may
        # still have readers that wait for what it has now, so it is as good as any.
        if place not in spread.givers:
            spread.givers.append(place)
            self.has_new = True
        return ()

    def _others(self, spread: _Spread) -> list[Place]:
        """Two of those that have the value, or come to have it, in turn."""
        givers = spread.givers
        spread.turn += 1
        first = spread.turn % len(givers)
        return [givers[first], *([givers[first - 1]] if len(givers) > 1 else [])]


class Attempts:
    """Who reads values that are still on their way here, and of which attempt at bringing them.

    An attempt is named by any number that no other attempt at the same value has.
    """

    def __init__(self) -> None:
        self._begun: OrderedDict[tuple[int, str], int] = OrderedDict()

    def may_read(self, id_: int, peer: str, attempt: int, is_first: bool) -> bool:
        """Whether a reader may have a part of what has come so far; False ends its reading.

        is_first: it asks for the beginning.
        """
        if is_first:
            self._begun[id_, peer] = attempt
            self._begun.move_to_end((id_, peer))
            if len(self._begun) > MOST_BEGUN:
                self._begun.popitem(last=False)
            return True
        return self._begun.get((id_, peer)) == attempt or self._end(id_, peer)

    def is_void(self, id_: int, peer: str, attempt: int, is_first: bool) -> bool:
        """The value is here, brought by this attempt: whether the reader has begun with another
        one, which ends its reading."""
        began = self._begun.get((id_, peer)) if self._begun else None
        if began is None or began == attempt:
            return False
        self._end(id_, peer)
        return not is_first

    def settled(self, id_: int, attempt: int) -> None:
        """The value is here for good: who has begun with this attempt reads on."""
        for key in [k for k, began in self._begun.items() if k[0] == id_ and began == attempt]:
            del self._begun[key]

    def _end(self, id_: int, peer: str) -> bool:
        """Forget a reader. What it had asked for meanwhile finds it gone, or begun anew."""
        self._begun.pop((id_, peer), None)
        return False
