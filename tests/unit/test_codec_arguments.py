"""A call's arguments: futures become placeholders, and values take their places."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfabric.codec.arguments import EMPTY, dump_call, dump_rows, load_call
from zfabric.codec.references import Reference, value_at
from zfabric.codec.serialise import pack
from zfabric.errors import CodecError, Unserialisable, UsageError


class Promise(Reference):
    __slots__ = ("task_id",)

    def __init__(self, task_id: int) -> None:
        self.task_id = task_id

    def __hash__(self) -> int:
        return self.task_id


@dataclasses.dataclass
class Box:
    item: Any


def there_and_back(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The call as the other side sees it; each dependency's value is ("value", its id)."""
    frames, dependencies = dump_call(args, kwargs)
    return load_call([bytes(frame) for frame in frames], [("value", task) for task in dependencies])


def test_a_call_of_atoms_is_one_pickle_of_the_tuple() -> None:
    frames, dependencies = dump_call((1, "a", None, 2.5), {})
    assert len(frames) == 1 and dependencies is EMPTY
    assert load_call(frames[0]) == ((1, "a", None, 2.5), {})
    assert load_call(frames) == ((1, "a", None, 2.5), {})


@pytest.mark.parametrize(
    ("args", "kwargs", "dependencies"),
    [
        ((), {}, []),
        ((), {"a": 1, "b": b"x"}, []),
        ((b"x", 1), {}, []),
        ((Promise(7),), {}, [7]),
        ((Promise(7), 1, Promise(8), Promise(7)), {}, [7, 8]),
        ((1,), {"x": Promise(9), "y": 2}, [9]),
        (([Promise(3), 4, Promise(5)],), {}, [3, 5]),
        (([1, 2, 3], [Promise(5)]), {"k": Promise(5)}, [5]),
        (((Promise(3), [Promise(4)]),), {}, [3, 4]),
        (({"a": Promise(3), "b": {"c": [Promise(4), Promise(3)]}},), {}, [3, 4]),
        ((Box(Promise(3)), Promise(4)), {}, [3, 4]),
        ((Promise(4), Box(Box(Promise(3)))), {"z": [Promise(5), None]}, [4, 3, 5]),
        ((OrderedDict(a=Promise(6)),), {}, [6]),
    ],
)
def test_references_are_found_and_filled(
    args: tuple[Any, ...], kwargs: dict[str, Any], dependencies: list[int]
) -> None:
    assert list(dump_call(args, kwargs)[1]) == dependencies
    back = there_and_back(args, kwargs)

    def filled(item: Any) -> Any:
        if isinstance(item, Promise):
            return ("value", item.task_id)
        if isinstance(item, Box):
            return Box(filled(item.item))
        if isinstance(item, dict):
            return type(item)((key, filled(part)) for key, part in item.items())
        if isinstance(item, list | tuple):
            return type(item)(map(filled, item))
        return item

    assert back == (filled(args), filled(kwargs))


def test_references_in_sets_and_closures() -> None:
    held = Promise(3)
    args, _ = there_and_back(({held}, lambda: held), {})
    assert args[0] == {("value", 3)}
    assert args[1]() == ("value", 3)


def test_the_callers_arguments_are_left_alone() -> None:
    items, named = [Promise(1), 2], {"k": Promise(2)}
    dump_call((items, Promise(3)), named)
    assert isinstance(items[0], Promise) and isinstance(named["k"], Promise)


def test_a_list_given_twice_stays_one_list() -> None:
    items = [Promise(1)]
    (first, second), _ = there_and_back((items, items), {})
    assert first is second == [("value", 1)]


def test_one_value_in_two_places_is_one_object() -> None:
    value: list[int] = []
    frames, _ = dump_call((Promise(1), [Promise(1)], Box(Promise(1))), {})
    (one, many, box), _ = load_call(frames, [value])
    assert one is value and many[0] is value and box.item is value


def test_large_arguments_leave_the_stream() -> None:
    array, data = np.arange(1e5), bytes(10**6)
    frames, _ = dump_call((array, data, data), {"k": array})
    assert len(frames) == 3 and len(frames[0]) < 1000
    (a, b, c), kwargs = there_and_back((array, data, data), {"k": array})
    assert np.array_equal(a, array) and a.flags.writeable and kwargs["k"] is a
    assert b == data and type(b) is bytes and c is b


def test_functions_as_arguments() -> None:
    base = 10
    (square, added), _ = there_and_back((lambda x: x * x, lambda x: x + base), {})
    assert square(3) == 9 and added(1) == 11


class Connection:
    def __init__(self) -> None:
        self._lock = threading.Lock()


def test_the_path_to_what_cannot_travel() -> None:
    with pytest.raises(Unserialisable) as caught:
        dump_call((1, {"db": Connection(), "f": Promise(2)}), {})
    assert caught.value.path == "args[1]['db']._lock"
    assert caught.value.type_name == "_thread.lock"
    with pytest.raises(Unserialisable) as caught:
        dump_call((Promise(1),), {"conn": [Connection()]})
    assert caught.value.path == "kwargs['conn'][0]._lock"


def test_after_a_failure_references_are_refused_again() -> None:
    with pytest.raises(Unserialisable):
        dump_call((Promise(1), Connection()), {})
    with pytest.raises(UsageError):
        copy_of_pickle = Promise(1).__reduce__()
        raise AssertionError(copy_of_pickle)


def test_copying_a_reference_gives_itself() -> None:
    promise = Promise(3)
    assert copy.copy(promise) is promise
    assert copy.deepcopy([promise])[0] is promise


def test_rows() -> None:
    array = np.arange(1e4)
    rows = [(1,), ("a", 2), (Promise(5), 1), (array,), ([1, 2],), (b"x",)]
    out = dump_rows(iter(rows))
    assert len(out.blobs) == len(rows)
    assert out.dependencies == {2: [5]}
    assert list(out.frames) == [3]
    assert load_call(out.blobs[0]) == ((1,), {})
    assert load_call(out.blobs[1]) == (("a", 2), {})
    assert load_call(out.blobs[2], ["v"]) == (("v", 1), {})
    assert np.array_equal(load_call(out.frames[3])[0][0], array)
    assert load_call(out.blobs[4]) == (([1, 2],), {})


def test_a_row_that_cannot_travel_is_named() -> None:
    with pytest.raises(Unserialisable) as caught:
        dump_rows([(1,), ([Connection()],)])
    assert caught.value.path == "calls[1].args[0][0]._lock"


@given(
    st.lists(
        st.recursive(
            st.integers(0, 5).map(Promise) | st.integers() | st.text(max_size=3) | st.none(),
            lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | inner.map(Box),
            max_leaves=6,
        ),
        max_size=4,
    )
)
def test_any_nesting_keeps_its_order(items: list[Any]) -> None:
    order: list[int] = []

    def walk(item: Any) -> Any:
        if isinstance(item, Promise):
            if item.task_id not in order:
                order.append(item.task_id)
            return ("value", item.task_id)
        if isinstance(item, Box):
            return Box(walk(item.item))
        return type(item)(map(walk, item)) if isinstance(item, list | tuple) else item

    expected = walk(tuple(items))
    frames, dependencies = dump_call(tuple(items), {})
    assert list(dependencies) == order
    assert load_call(frames, [("value", task) for task in order]) == (expected, {})


class LoadsAnother:
    """Loads a call of its own while it is being loaded."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.inner = load_call(state["blob"], ["inner"])[0]


def test_loading_is_reentrant() -> None:
    inner = bytes(dump_call((Box(Promise(1)),), {})[0][0])
    frames, _ = dump_call((Box(Promise(5)), LoadsAnother(inner), Box(Promise(6))), {})
    (first, other, last), _ = load_call(frames, ["five", "six"])
    assert (first.item, other.inner[0].item, last.item) == ("five", "inner", "six")


def test_loading_in_many_threads() -> None:
    blob = bytes(dump_call((Box(Promise(1)), [Promise(2)]), {})[0][0])
    wrong: list[object] = []

    def load(number: int) -> None:
        for turn in range(300):
            got = load_call(blob, [(number, turn), number])
            if got != ((Box((number, turn)), [number]), {}):
                wrong.append(got)

    threads = [threading.Thread(target=load, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("args", [(Promise(1),), ([Promise(1)],), (Box(Promise(1)),)])
def test_values_that_are_missing(args: tuple[Any, ...]) -> None:
    frames, _ = dump_call(args, {})
    with pytest.raises(CodecError):
        load_call(frames)


def test_broken_payloads_raise_codec_error() -> None:
    import pickle

    for payload in (b"", b"junk", pickle.dumps(5), pickle.dumps([1, 2, 3, 4]), pickle.dumps([])):
        with pytest.raises(CodecError):
            load_call(payload)
    with pytest.raises(CodecError):
        load_call(pickle.dumps([[1], {}, [5, 0]]), ["x"])
    with pytest.raises(CodecError):
        value_at(0)


def test_a_call_packed_into_one_blob_loads_as_well() -> None:
    frames, dependencies = dump_call((np.arange(1000), Promise(7)), {"more": np.ones(900)})
    assert len(frames) > 1
    (array, value), kwargs = load_call(pack(frames), ["seven" for _ in dependencies])
    assert value == "seven" and (array == np.arange(1000)).all() and array.flags.writeable
    assert (kwargs["more"] == 1).all()
    with pytest.raises(CodecError):
        load_call(pack(frames)[:-1], ["seven"])
