"""How long small graphs took: which of them run as one row.

An iterative algorithm computes graphs of the same shape over and over, each of a few tasks of some
microseconds. Sent task by task such a graph costs a row for each of them, and a hop for each step;
sent as one row it costs one. But the tasks of a graph of that size may as well take minutes, and
then they have to run side by side. Nothing in a task tells which of the two it is, so it is tried:

  - A shape is seen for the first time: it is sent task by task, and the time until what is wanted
    of it has ended is noted.
  - That was so short that running everything in one slot would not hurt: it is tried as one row.
  - From then on the faster of the two ways is taken. Each run notes its own time anew, so a shape
    whose tasks become long goes back to being spread.

What is wanted of a graph that ran as one row lies in one bundle on one worker. So graphs with large
inputs or large outputs are not put together, however quick they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from time import perf_counter
from typing import TypeAlias

import msgpack
from dask.sizeof import sizeof
from dask.utils import key_split

from zfabric.client.collections.held import DaskFuture
from zfabric.client.future import Future
from zfabric.client.waiting import add_waiter
from zfabric.core.submitter import LOADED, Outcome
from zfabric.messages import STORED, VALUE

SMALL = 64
"""Tasks up to which a graph may be one row."""

TRIAL_S = 0.1
"""What trying it may cost: at most the time of the spread run in each slot."""

LONG_S = 2.5 * TRIAL_S
"""One row that takes so long had other arguments than when it was tried, not a bad moment."""

MOST_RUNS = 64
"""Spread runs between two trials at most."""

LIGHT_BYTES = 1 << 20
"""Inputs that one row is given, and values that it gives, in all."""

MARGIN = 1.25
"""As one row it may take so much longer than spread: one slot instead of several is busy."""

KEPT = 1000
"""Shapes that are remembered."""

Shape: TypeAlias = Hashable


class _Times:
    """What is known of a shape. heavy: the last run gave much.

    spread, together: seconds of the last two runs of each way, the last one behind.
    """

    __slots__ = ("heavy", "spread", "strikes", "together", "wait")

    def __init__(self) -> None:
        self.spread: tuple[float, ...] = ()
        self.together: tuple[float, ...] = ()
        self.heavy = False
        self.strikes = 0
        """How often it took long as one row."""
        self.wait = 0
        """Runs that are to be spread before it is tried again."""


class Habits:
    """One client's memory of the shapes of its graphs."""

    def __init__(self) -> None:
        self._times: dict[Shape, _Times] = {}

    def is_together(self, shape: Shape, n_tasks: int, n_slots: int) -> bool:
        """Whether a graph of this shape is to run as one row."""
        times = self._times.get(shape)
        if times is None or times.heavy or not times.spread or times.wait:
            return False
        if not times.together:
            # Every run that is known: after a long one, one short run is no proof.
            return max(times.spread) * min(n_tasks, n_slots) <= TRIAL_S
        # The less of two: a machine that was busy elsewhere for a moment decides nothing.
        return min(times.together) <= MARGIN * min(times.spread)

    def gives_little(self, shape: Shape) -> bool:
        """Whether what a graph of this shape will give is known to be small."""
        times = self._times.get(shape)
        return times is not None and not times.heavy

    def watch(self, shape: Shape, together: bool, began: float, futures: Iterable[Future]) -> None:
        """Note when these futures have all ended, and how large their values are.

        began: perf_counter() before the graph was sent.
        """
        _Watch(self, shape, together, began, [future._outcome for future in futures]).start()

    def note(self, shape: Shape, together: bool, seconds: float, nbytes: int) -> None:
        """A graph of this shape took so long, and gave that much."""
        times = self._times.get(shape)
        if times is None:
            if len(self._times) >= KEPT:
                self._times.pop(next(iter(self._times)), None)
            times = self._times[shape] = _Times()
        times.heavy = nbytes > LIGHT_BYTES
        if together and seconds > LONG_S:
            # Its arguments are others than those that were tried: nothing that was known holds.
            # Each time that happens, it is spread twice as often before it is tried again.
            times.spread = times.together = ()
            times.strikes += 1
            times.wait = min(MOST_RUNS, 1 << times.strikes)
        elif together:
            times.together = (*times.together[-1:], seconds)
        else:
            times.spread = (*times.spread[-1:], seconds)
            times.wait = max(0, times.wait - 1)


class _Watch:
    """Called as each of some outcomes ends: by the client's I/O thread, or when it already has."""

    __slots__ = ("_began", "_habits", "_left", "_nbytes", "_shape", "_together")

    def __init__(
        self,
        habits: Habits,
        shape: Shape,
        together: bool,
        began: float,
        outcomes: Sequence[Outcome],
    ) -> None:
        self._habits = habits
        self._shape = shape
        self._together = together
        self._began = began
        self._left = {outcome.id: outcome for outcome in outcomes}
        self._nbytes = 0

    def start(self) -> None:
        for outcome in list(self._left.values()):
            if not add_waiter(outcome, self):
                self(outcome)

    def __call__(self, outcome: Outcome) -> None:
        if self._left.pop(outcome.id, None) is None:
            return
        nbytes = nbytes_of(outcome)
        if nbytes is None:
            # It failed or was released, or was read meanwhile: this run is not noted.
            self._left[-1] = outcome
            return
        self._nbytes += nbytes
        if not self._left:
            seconds = perf_counter() - self._began
            self._habits.note(self._shape, self._together, seconds, self._nbytes)


def shape_of(keys: Iterable[Hashable], n_wanted: int) -> Shape:
    """What graphs of one kind have in common: their tasks' names without the tokens."""
    names = Counter([key_split(key) for key in keys])
    return n_wanted, frozenset(names.items())


def nbytes_of(outcome: Outcome) -> int | None:
    """About how large its value is; None: not known, as it is pending, failed or loaded."""
    status, payload = outcome.status, outcome.payload
    if payload is None:
        return None
    if status == VALUE:
        return len(payload)
    return int(msgpack.unpackb(payload)[0]) if status == STORED else None


def is_light(inputs: Iterable[DaskFuture]) -> bool:
    """Whether all of them together are small, as far as that is known before they are there."""
    total = 0
    for held in {held.future.task_id: held for held in inputs}.values():
        outcome = held.future._outcome
        if outcome.status == LOADED:
            nbytes: int | None = int(sizeof(outcome.value))
        else:
            nbytes = nbytes_of(outcome)
        if nbytes is not None:
            total += nbytes
        elif not held.light:
            return False
    return total <= LIGHT_BYTES
