"""One large argument of many calls."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from zfabric.client import repeats
from zfabric.client.repeats import MOST, MOST_VAIN, Repeats
from zfabric.codec.arguments import dump_call, load_call, split_own, with_own
from zfabric.codec.references import Reference
from zfabric.errors import CodecError

LIMIT = 1000


class Future(Reference):
    __slots__ = ("task_id",)

    def __init__(self, task_id: int) -> None:
        self.task_id = task_id


class Values:
    """Notes what is put."""

    def __init__(self, here: bool = False) -> None:
        self.put: list[Any] = []
        self.lost: set[int] = set()
        self.here = here
        self.tidy_at = [0.0].append

    def scatter(self, items: list[Any], meanwhile: Any = lambda: None) -> list[Future]:
        assert len(items) == 1
        self.put.append(items[0].copy() if hasattr(items[0], "copy") else items[0])
        meanwhile()
        return [Future(len(self.put) - 1)]

    def is_there(self, future: Future) -> bool:
        return future.task_id not in self.lost

    def are_on_this_host(self) -> bool:
        return self.here


def called(sent: Repeats, values: Values, *args: Any, **kwargs: Any) -> Any:
    """What a task would get, and which of it would be its own; None for a call that goes whole."""
    call = sent.call(args, kwargs, dump_call(args, kwargs)[0])
    if call is None:
        return None
    own, blob = split_own(call.payload)
    assert set(call.dependencies) == {future.task_id for future in call.futures}
    found = load_call(bytes(blob), [values.put[dep] for dep in call.dependencies])
    return found, [call.dependencies[place] for place in own]


def test_what_cannot_change_goes_once() -> None:
    values: Any = Values(here=True)
    sent = Repeats(values, LIMIT)
    data, text = bytes(5000), "x" * 5000
    assert called(sent, values, data, 1) == (((data, 1), {}), [])
    assert called(sent, values, 2, name=data, other=text) == (
        ((2,), {"name": data, "other": text}),
        [],
    )
    assert called(sent, values, text, data, text)[0] == ((text, data, text), {})
    assert values.put == [data, text]
    assert called(sent, values, bytes(bytearray(5000)))  # as large, but another object
    assert len(values.put) == 3


def test_arrays_go_again_when_they_have_changed() -> None:
    values: Any = Values()
    sent = Repeats(values, LIMIT)
    array = np.arange(1000.0)
    for number in range(3):
        (args, _), own = called(sent, values, number, array)
        assert args[0] == number and (args[1] == array).all() and own == [0]
    assert len(values.put) == 1
    array[7] = -1
    (args, _), own = called(sent, values, array)
    assert args[0][7] == -1 and own == [1] and len(values.put) == 2
    # The same bytes are another array where its shape, order or type is another one.
    for change in ({"shape": (10, 100)}, {"strides": (8, 80)}, {"dtype": np.dtype("i8")}):
        for name, value in change.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy would rather have a view taken
                setattr(array, name, value)
        before = len(values.put)
        (args, _), _ = called(sent, values, array)
        assert args[0].dtype == array.dtype and args[0].shape == array.shape
        assert (args[0] == array).all() and len(values.put) == before + 1


def test_arrays_that_never_come_again_are_not_hashed() -> None:
    values: Any = Values()
    sent = Repeats(values, LIMIT)
    arrays = [np.full(1000, number) for number in range(MOST_VAIN + 3)]
    whole = [called(sent, values, array) is None for array in arrays]
    assert whole == [False] * MOST_VAIN + [True] * 3
    assert called(sent, values, arrays[-1]) and len(values.put) == MOST_VAIN + 1
    assert called(sent, values, arrays[-1]) and len(values.put) == MOST_VAIN + 1


def test_an_id_that_another_object_has_now_is_no_proof() -> None:
    values: Any = Values()
    sent = Repeats(values, LIMIT)
    array, other = np.zeros(1000), np.zeros(1000)
    called(sent, values, array)
    sent._sent[id(other)] = sent._sent.pop(id(array))  # as if it had died and given way
    assert called(sent, values, other) and len(values.put) == 2


@pytest.mark.parametrize(
    "args",
    [
        ([bytes(5000)],),  # inside something else
        (np.arange(4000.0)[::2],),  # in pieces
        (np.array([[1]] * 500, object),),
        (bytes(5000), [bytes(3000)]),  # what is left would not ride along
        (bytes(10), 1),
    ],
)
def test_what_goes_whole(args: Any) -> None:
    values: Any = Values()
    assert called(Repeats(values, LIMIT), values, *args) is None and not values.put


def test_arrays_on_one_host_go_whole() -> None:
    values: Any = Values(here=True)
    assert called(Repeats(values, LIMIT), values, np.zeros(1000)) is None and not values.put


def test_a_value_that_was_lost_is_put_again() -> None:
    values: Any = Values()
    sent, data = Repeats(values, LIMIT), bytes(5000)
    called(sent, values, data)
    values.lost.add(0)
    assert called(sent, values, data) and len(values.put) == 2
    assert called(sent, values, data) and len(values.put) == 2


def test_few_are_kept_and_none_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    values: Any = Values()
    sent = Repeats(values, LIMIT)
    items = [bytes([number]) * 5000 for number in range(MOST + 1)]
    for item in items:
        called(sent, values, item)
    called(sent, values, items[-1])
    assert len(values.put) == MOST + 1
    called(sent, values, items[0])
    assert len(values.put) == MOST + 2
    monkeypatch.setattr(repeats, "MOST_NBYTES", 10_000)
    called(sent, values, bytes(9000))
    called(sent, values, items[0])
    assert len(values.put) == MOST + 4 and sent._nbytes == 5000
    sent.tidy()
    assert not sent._sent and not sent._nbytes


def test_which_are_the_calls_own_is_read_back() -> None:
    blob = dump_call((1, "a"), {})[0][0]
    assert with_own(bytes(blob), []) == blob and split_own(blob) == ((), blob)
    assert split_own(with_own(bytes(blob), [0, 70_000])) == ((0, 70_000), blob)
    for end in (1, 4, 5, 8):
        with pytest.raises(CodecError):
            split_own(with_own(b"", [1, 2])[:end])
