"""One large object in many rows of a map goes to the workers once.

Rows are looked at only when their arguments are too large to ride along, and one object counts as
the same while no code of the user's could have changed it: within the rows that are pickled
together, and from there on where the rows come from lists and the like rather than from generators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

from zfabric.codec.arguments import Rows, dump_call
from zfabric.codec.references import Reference
from zfabric.codec.serialise import dumps, nbytes_of

if TYPE_CHECKING:
    from zfabric.client.future import Future
    from zfabric.client.values import Values

_STILL = frozenset({list, tuple, range, repeat, dict, set, frozenset, str, bytes})


def are_still(iterables: Iterable[Any]) -> bool:
    """Whether taking items from these runs no code that might change an item taken before."""
    return all(type(each) in _STILL for each in iterables)


class Shared:
    """What one map() has put into a store for several of its rows.

    limit: bytes up to which an argument rides along.
    """

    def __init__(self, values: Values, limit: int) -> None:
        self._values = values
        self._limit = limit
        self._known: dict[int, tuple[Any, Future | None]] = {}
        """By identity: the object, which thereby stays what it is, and its value; None for one
        that is small."""

    def forget(self) -> None:
        """Objects may have changed: what comes from now on is put anew."""
        self._known.clear()

    def replace(self, rows: Sequence[tuple[Any, ...]], dumped: Rows) -> None:
        """Put objects that large rows have in common into a store, and pickle these rows anew,
        with references in their place. Raises what putting raises."""
        limit = self._limit
        large = [
            number
            for number, blob in enumerate(dumped.blobs)
            if len(blob) > limit or nbytes_of(dumped.frames.get(number, ())) > limit
        ]
        items = {
            id(arg): arg
            for number in large
            for arg in rows[number]
            if not isinstance(arg, Reference)
        }
        counts = Counter(id_ for number in large for id_ in {*map(id, rows[number])} & {*items})
        again = [id_ for id_, count in counts.items() if count > 1 and id_ not in self._known]
        self._put([items[id_] for id_ in again])
        for number in large:
            row = tuple(self._stand_in(arg) for arg in rows[number])
            if all(map(_is_same, row, rows[number])):
                continue
            frames, deps = dump_call(row, {})
            dumped.blobs[number] = frames[0]
            dumped.dependencies[number] = deps
            dumped.frames.pop(number, None)
            if len(frames) > 1:
                dumped.frames[number] = frames

    def _put(self, items: list[Any]) -> None:
        large = []
        for item in items:
            if nbytes_of(dumps(item)) > self._limit:
                large.append(item)
            else:
                self._known[id(item)] = (item, None)
        if large:
            for item, future in zip(large, self._values.scatter(large), strict=True):
                self._known[id(item)] = (item, future)

    def _stand_in(self, arg: Any) -> Any:
        known = self._known.get(id(arg))
        return arg if known is None or known[1] is None else known[1]


def _is_same(one: Any, other: Any) -> bool:
    return one is other
