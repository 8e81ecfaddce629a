"""Large objects that rows of a map have in common."""

from __future__ import annotations

from typing import Any

from zfabric.client.sharing import Shared, are_still
from zfabric.codec.arguments import dump_rows, load_call
from zfabric.codec.references import Reference

LIMIT = 1000


class Future(Reference):
    __slots__ = ("task_id",)

    def __init__(self, task_id: int) -> None:
        self.task_id = task_id


class Values:
    """Notes what is put."""

    def __init__(self) -> None:
        self.put: list[Any] = []

    def scatter(self, items: list[Any]) -> list[Future]:
        first = len(self.put)
        self.put += [bytes(item) for item in items]
        return [Future(first + number) for number in range(len(items))]


def test_only_what_is_large_and_comes_again_is_put() -> None:
    values: Any = Values()
    shared = Shared(values, LIMIT)
    big, small, lone = bytearray(500_000), bytearray(10), bytearray(400_000)
    rows = [
        (big, 1, small),
        (2, small, big),
        (big, lone, small),
        (lone[:], 3, small),
        (1, 2, small),
    ]
    dumped = dump_rows(rows)
    untouched = [dumped.blobs[3], dumped.blobs[4]]
    shared.replace(rows, dumped)
    assert values.put == [bytes(big)]
    assert [*dumped.dependencies] == [0, 1, 2] and [0] in map(list, dumped.dependencies.values())
    assert dumped.blobs[3:] == untouched and 3 in dumped.frames
    assert load_call(dumped.blobs[0], ["here"])[0] == ("here", 1, small)
    assert load_call(dumped.frames[2], ["here"])[0] == ("here", lone, small)
    # The next rows refer to it too, unless it may have changed meanwhile.
    again = dump_rows([(big,)])
    shared.replace([(big,)], again)
    assert again.dependencies[0] and len(values.put) == 1
    shared.forget()
    big[0] = 1
    again = dump_rows([(big,), (big,)])
    shared.replace([(big,), (big,)], again)
    assert values.put[1:] == [bytes(big)]


def test_what_may_run_code_between_rows() -> None:
    assert are_still([[1], (1,), range(3), "abc"])
    assert not are_still([[1], map(id, [])])
