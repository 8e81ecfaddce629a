"""Objects to frames and back: layouts, writability, containers that lie."""

from __future__ import annotations

import datetime
import pickle
import subprocess
import sys
import threading
import types
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zfabric.codec import serialise
from zfabric.codec.references import Reference
from zfabric.errors import CodecError, ModuleMissing, Unserialisable, UsageError

BASE = np.arange(10_000.0).reshape(100, 100)


def frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


ARRAYS = {
    "c": BASE,
    "fortran": np.asfortranarray(BASE),
    "transposed": BASE.T,
    "strided": BASE[::2, ::3],
    "reversed": BASE[::-1],
    "read-only": frozen(BASE),
    "read-only fortran": frozen(BASE.T),
    "0-d": np.array(3.5),
    "empty": np.zeros((0, 5)),
    "empty fortran": np.zeros((5, 0), order="F"),
    "small": np.arange(3),
    "small read-only": frozen(np.arange(3)),
    "broadcast": np.broadcast_to(np.float32(2), (50, 50)),
    "bool": np.ones(5000, bool),
    "big-endian": np.arange(5000, dtype=">i4"),
    "half": np.arange(5000, dtype="f2"),
    "complex": np.ones(500, "c16"),
    "datetime64": np.arange("2020-01", "2400-01", dtype="M8[M]"),
    "timedelta64": np.zeros((30, 30), "m8[ns]", order="F"),
    "read-only datetime64": frozen(np.zeros(900, "M8[us]")),
    "structured": np.zeros(900, [("a", "i4"), ("b", "f8", (2,))]),
    "structured datetime": np.zeros(900, [("a", "i4"), ("b", "M8[s]")]),
    "aligned": np.zeros(900, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    "text": np.array(["abc", "de"] * 500),
    "bytes": np.array([b"abc", b"de"] * 500),
    "void": np.zeros(900, "V7"),
    "object": np.array([1, "a", None, {"k": 2}], object),
    "itemsize 0": np.zeros(3, "V0"),
}


def as_received(frames: list[Any]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


@pytest.mark.parametrize("way", ["frames", "bytes", "blob"])
@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_comes_back_writable_in_its_layout(name: str, way: str) -> None:
    array = ARRAYS[name]
    frames = serialise.dumps(array)
    if way == "blob":
        back = serialise.loads_inline(serialise.pack(frames))
    else:
        back = serialise.loads(as_received(frames) if way == "bytes" else frames)
        if way == "frames" and array.flags.writeable is False:
            back = serialise.loads(as_received(frames))
    assert type(back) is np.ndarray
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.dtype.isalignedstruct == array.dtype.isalignedstruct
    assert back.tobytes() == array.tobytes() or array.dtype.hasobject
    assert np.array_equal(back, array)
    assert back.flags.writeable
    if array.flags.f_contiguous:
        assert back.flags.f_contiguous
    elif array.flags.c_contiguous:
        assert back.flags.c_contiguous


@pytest.mark.parametrize("name", ["c", "fortran", "transposed", "read-only", "structured"])
def test_a_contiguous_array_is_not_copied(name: str) -> None:
    array = ARRAYS[name]
    stream, buffer = serialise.dumps(array)
    assert len(stream) < 500
    view = np.frombuffer(buffer, np.uint8)
    assert view.ctypes.data == array.ctypes.data and view.nbytes == array.nbytes
    assert memoryview(buffer).ndim == 1 and memoryview(buffer).format == "B"


@pytest.mark.parametrize("name", ["strided", "reversed", "datetime64", "read-only datetime64"])
def test_a_large_array_of_any_layout_leaves_the_stream(name: str) -> None:
    stream, buffer = serialise.dumps(ARRAYS[name])
    assert len(stream) < 500 and len(buffer) == ARRAYS[name].nbytes


def test_of_very_many_arrays_only_large_ones_leave_the_stream() -> None:
    many: list[np.ndarray] = [np.ones(serialise.IN_BAND, "u1") for _ in range(70_000)]
    frames = serialise.dumps([many, np.zeros(serialise.LARGE_OF_MANY, "u1")])
    assert len(frames) == 1 + serialise.MANY + 1
    back, last = serialise.loads([bytearray(frame) for frame in frames])
    assert len(back) == 70_000 and last.nbytes == serialise.LARGE_OF_MANY
    for each in (back[0], back[-1]):
        assert each.flags.writeable and bytes(each) == bytes(many[0])


def test_writable_buffers_are_used_in_place() -> None:
    stream, buffer = serialise.dumps(BASE)
    place = bytearray(buffer)
    back = serialise.loads([stream, memoryview(place)])
    back[0, 0] = 42.0
    assert np.frombuffer(place)[0] == 42.0
    assert BASE[0, 0] == 0.0


def test_read_only_buffers_stay_shared_when_asked() -> None:
    frames = as_received(serialise.dumps(BASE))
    back = serialise.loads(frames, writable=False)
    assert not back.flags.writeable
    assert back.ctypes.data == np.frombuffer(frames[1], np.uint8).ctypes.data


def test_subclasses_of_array_stay_what_they_are() -> None:
    masked = np.ma.masked_array([1, 2, 3], [0, 1, 0])
    back = serialise.loads(serialise.dumps(masked))
    assert type(back) is type(masked) and back.mask.tolist() == [False, True, False]


LARGE = bytes(range(256)) * 1000


@pytest.mark.parametrize(
    "value",
    [
        LARGE,
        bytearray(LARGE),
        [LARGE, 1, LARGE],
        {"a": LARGE, "b": bytearray(LARGE), "n": None},
        (LARGE, np.arange(3)),
        [[LARGE]],
        b"",
        bytearray(b"small"),
        {LARGE: 1},
    ],
    ids=lambda value: type(value).__name__,
)
def test_bytes_come_back_as_they_were(value: Any) -> None:
    for frames in (serialise.dumps(value), as_received(serialise.dumps(value))):
        back = serialise.loads(frames)
        assert type(back) is type(value)
        if isinstance(value, tuple):
            assert back[0] == value[0] and back[1].tolist() == [0, 1, 2]
        else:
            assert back == value
    blob = serialise.pack(serialise.dumps(value))
    assert type(serialise.loads_inline(blob)) is type(value)


def test_large_bytes_leave_the_stream_uncopied_and_keep_identity() -> None:
    stream, view = serialise.dumps(LARGE)
    assert memoryview(view).obj is LARGE and len(stream) < 100
    assert serialise.loads([stream, LARGE]) is LARGE
    frames = serialise.dumps([LARGE, LARGE])
    assert len(frames) == 2
    first, second = serialise.loads(frames)
    assert first is second == LARGE
    assert pickle.loads(stream, buffers=[view]) == LARGE


def test_a_list_that_contains_itself() -> None:
    ring: list[Any] = [LARGE]
    ring.append(ring)
    back = serialise.loads(serialise.dumps(ring))
    assert back[1] is back


@pytest.mark.parametrize(
    "view",
    [
        memoryview(LARGE),
        memoryview(bytearray(LARGE)),
        memoryview(BASE),
        memoryview(LARGE)[::2],
        memoryview(b"abc"),
        memoryview(np.zeros((0, 3))),
        memoryview(np.array(2.5)),
        memoryview(BASE.T),
    ],
    ids=range(8),
)
def test_memoryviews_travel(view: memoryview) -> None:
    back = serialise.loads(as_received(serialise.dumps(view)))
    assert type(back) is memoryview
    assert back.tobytes() == view.tobytes()
    if view.c_contiguous and view.nbytes:
        assert back == view and back.shape == view.shape and back.format == view.format


class Slotted:
    __slots__ = ("a", "lock")

    def __init__(self) -> None:
        self.a = 1
        self.lock = threading.Lock()


class Holder:
    def __init__(self, item: object) -> None:
        self._item = item


def make_task(db: object) -> Any:
    def task() -> object:
        return db

    return task


LOCK = threading.Lock()


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        (LOCK, "value", "_thread.lock"),
        ([1, {"db": Holder(LOCK)}], "value[1]['db']._item", "_thread.lock"),
        ({(1, 2): LOCK}, "value[(1, 2)]", "_thread.lock"),
        (Slotted(), "value.lock", "_thread.lock"),
        (make_task(LOCK), "value.__closure__[db]", "_thread.lock"),
        (Holder(make_task([LOCK])), "value._item.__closure__[db][0]", "_thread.lock"),
        ((x for x in ()), "value", "generator"),
        ([sys._getframe()], "value[0]", "frame"),
    ],
)
def test_the_error_names_the_path(value: object, path: str, kind: str) -> None:
    with pytest.raises(Unserialisable) as caught:
        serialise.dumps(value)
    assert (caught.value.path, caught.value.type_name) == (path, kind)
    assert caught.value.__cause__ is not None


def test_diagnosis_ends_in_cycles_and_deep_nests() -> None:
    ring: list[Any] = []
    ring += [ring, Holder(ring), LOCK]
    with pytest.raises(Unserialisable, match=r"value\[2\]"):
        serialise.dumps(ring)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Unserialisable, match="nested too deeply"):
        serialise.dumps(deep)
    while deep:  # freeing it at once would overflow the C stack of some versions
        deep = deep.pop()


class Hostile:
    def __reduce__(self) -> Any:
        raise ValueError("no")

    def __repr__(self) -> str:
        raise ValueError("nor this")


def test_hostile_hooks_are_an_error_with_a_path() -> None:
    with pytest.raises(Unserialisable, match=r"value\[0\]"):
        serialise.dumps([Hostile()])
    with pytest.raises(Unserialisable):
        serialise.dumps({Hostile(): 1})


class Promise(Reference):
    __slots__ = ("task_id",)

    def __init__(self, task_id: int) -> None:
        self.task_id = task_id


def test_a_reference_does_not_travel_by_itself() -> None:
    for attempt in (serialise.dumps, pickle.dumps, lambda p: serialise.dumps([p])):
        with pytest.raises(UsageError, match=r"return its \.result\(\)"):
            attempt(Promise(1))


# ------------------------------------------------------------------------------ small values

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(plain)
def test_plain_values_come_back_equal(value: object) -> None:
    assert serialise.loads(serialise.dumps(value)) == value
    blob = serialise.dumps_inline(value, 1 << 20)
    assert blob is not None and serialise.loads_inline(blob) == value
    assert serialise.dumps_inline(value, len(blob)) == blob
    assert serialise.dumps_inline(value, len(blob) - 1) is None


def test_a_blob_without_buffers_is_the_stream() -> None:
    assert serialise.pack(serialise.dumps({"a": 1}))[0] == 0x80
    packed = serialise.pack(serialise.dumps(BASE))
    assert packed[0] != 0x80
    assert serialise.dumps_inline(BASE, 100) is None
    assert serialise.dumps_inline(BASE, len(packed)) == packed
    assert serialise.dumps_inline(BASE, len(packed) - 1) is None


@given(st.binary(max_size=200))
def test_unpack_is_total(blob: bytes) -> None:
    for bytes_ in (blob, b"\x5a" + blob, b"\x5a\x02\x00\x00\x00" + blob):
        try:
            frames = serialise.unpack(bytes_)
        except CodecError:
            continue
        assert serialise.nbytes_of(frames) <= len(bytes_)


@settings(max_examples=300)
@given(st.data())
def test_a_blob_that_lies_raises_codec_error_only(data: st.DataObject) -> None:
    blob = bytearray(serialise.pack(serialise.dumps([np.arange(600.0), "abc", 5])))
    # The head and the lengths: a pickle that was tampered with runs whatever it likes.
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, 20))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(blob)))
    for lie in (bytes(blob), bytes(blob[:cut])):
        try:
            serialise.loads_inline(lie)
        except CodecError:
            pass


@pytest.mark.parametrize("blob", [b"", b"\x80", b"\x80\x05", b"garbage", b"\x80\x05cnone\nx\n."])
def test_broken_streams_raise_codec_error(blob: bytes) -> None:
    with pytest.raises(CodecError):
        serialise.loads_inline(blob)
    with pytest.raises(CodecError):
        serialise.loads([blob])


def test_a_missing_frame_is_a_codec_error() -> None:
    stream, _ = serialise.dumps(BASE)
    with pytest.raises(CodecError):
        serialise.loads([stream, b"short"])
    with pytest.raises(CodecError):
        serialise.loads([stream])
    with pytest.raises(CodecError):
        serialise.loads([])


def test_a_missing_module_is_named() -> None:
    with pytest.raises(ModuleMissing, match="module nosuchmodule is not here.*install it"):
        serialise.loads([b"\x80\x05cnosuchmodule\nf\n."])


MAIN_SCRIPT = """
import sys
from zfabric.codec import serialise
class Point:
    def __init__(self, x): self.x = x
    def double(self): return self.x * 2
sys.stdout.buffer.write(serialise.pack(serialise.dumps({"p": [Point(21)], "f": lambda x: x + 1})))
assert "numpy" not in sys.modules
"""


def test_classes_of_a_script_travel_by_value() -> None:
    done = subprocess.run([sys.executable, "-c", MAIN_SCRIPT], capture_output=True, check=True)
    value = serialise.loads_inline(done.stdout)
    assert value["p"][0].double() == 42
    assert value["f"](1) == 2


def test_importing_is_cheap() -> None:
    code = (
        "import sys, zfabric.codec.serialise, zfabric.codec.arguments, zfabric.codec.functions,"
        "zfabric.codec.exceptions, zfabric.codec.sampler, zfabric.codec.compress;"
        "print([m for m in ('numpy','blosc','cloudpickle','asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


def test_an_ordinary_object_still_goes_by_reference() -> None:
    stamp = datetime.datetime(2026, 1, 2)
    assert serialise.dumps(stamp) == [pickle.dumps(stamp, 5)]


def test_another_thread_that_is_just_loading_cloudpickle_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thread slots load it while others serialise: its module is there before its names are."""
    monkeypatch.setitem(sys.modules, "cloudpickle", types.ModuleType("cloudpickle"))
    assert serialise.loads(serialise.dumps(Fraction(1, 3))) == Fraction(1, 3)
