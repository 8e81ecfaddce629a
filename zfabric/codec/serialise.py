"""Objects to frames and back: pickle protocol 5, large buffers beside the stream.

frames[0] is the pickle stream, frames[1:] are the buffers that the stream refers to, in order:
numpy arrays, bytearrays and `bytes` of some size, and whatever else offers a PickleBuffer. They
are views of the object's own memory, so the object must not change before they have left.

Plain pickle goes first: it is C without a Python callback per object. cloudpickle takes over for
what pickle refuses (lambdas, local classes), and for what pickle would name in a way that nobody
else can look up: classes and functions of `__main__` and of modules registered by value. Those
are found by looking for the module's name in the finished stream, which costs a memory scan and
nothing per object; a string that happens to contain the name costs time, never correctness.

pickle takes `bytes` before any hook can see them, so large ones travel beside the stream only
where we meet them ourselves: as the object itself, or as an item of a short flat list, tuple or
dict. Deeper ones ride in the stream at the price of a copy.

A small value becomes one blob: the stream itself (pickle's first byte is 0x80), or, with buffers,
a container that begins with another byte:

    0x5A, count: u32, length of each frame: u64 ..., the frames one after the other (little-endian)
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pickle import PickleBuffer
from struct import Struct
from typing import Any, TypeAlias

from zfabric.codec.by_value import names_by_value, register_spawned_main
from zfabric.errors import CodecError, ModuleMissing, UsageError

Buffer: TypeAlias = bytes | bytearray | memoryview

PROTOCOL = 5

IN_BAND = 2048
"""Buffers below this many bytes stay in the stream: a frame of its own costs more than the copy."""

MANY = 4096
"""Buffers of one object, from which on only those of LARGE_OF_MANY bytes leave the stream: every
part of a value that moves names the sizes of all its frames."""

LARGE_OF_MANY = 2**20

MOST = 60_000
"""Buffers beside a stream, whatever their size; a message about a value names fewer than 65,536."""

LARGE_BYTES = 64 * 1024
"""From here on `bytes` and bytearrays leave the stream where they can."""

ATOMS = frozenset({int, float, bool, type(None), str, complex})
"""Exact types that plain pickle writes without looking anything up."""

_SHORT = 64
_FLAT = ATOMS | {bytes, bytearray}
_MAGIC = 0x5A
PACKED = bytes((_MAGIC,))
"""The first byte of a blob that `pack` made of several frames."""
_HEAD = Struct("<BI")

_dumps = pickle.dumps
_loads = pickle.loads


class _Large:
    """Stands in for a large bytes or bytearray so that its data can leave the stream."""

    __slots__ = ("data",)

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data

    def __reduce__(self) -> Any:
        return (bytes if type(self.data) is bytes else as_bytearray), (PickleBuffer(self.data),)


def as_bytearray(buffer: Buffer) -> bytearray:
    """The buffer itself if it is a bytearray, else a copy."""
    return buffer if type(buffer) is bytearray else bytearray(buffer)


def as_memoryview(buffer: Buffer, code: str, shape: tuple[int, ...]) -> memoryview:
    """A view of `buffer` with its former item format and shape."""
    view = memoryview(buffer)
    return view if code == "B" and len(shape) == 1 else view.cast("B").cast(code, shape)  # type: ignore[call-overload]


# The one stream that every large bytes object has; known by sight, so that a received `bytes`
# frame is the result itself instead of being copied twice.
_BYTES_STREAM = _dumps(_Large(b""), PROTOCOL, buffer_callback=lambda _: None)


def dumps(obj: object, name: str = "value") -> list[Buffer]:
    """The object as frames; the buffers are flat contiguous views of its memory.

    name: what the object is called in an error (`result`, `data[3]`).
    Raises Unserialisable with the path to the culprit, UsageError for a future inside.
    """
    kind = type(obj)
    if kind in ATOMS:
        return [_dumps(obj, PROTOCOL)]
    if kind is tuple or kind is list:
        items: Any = obj
        if len(items) <= _SHORT and ATOMS.issuperset(map(type, items)):
            return [_dumps(obj, PROTOCOL)]
    elif kind is dict:
        table: Any = obj
        if (
            len(table) <= _SHORT
            and ATOMS.issuperset(map(type, table.values()))
            and ATOMS.issuperset(map(type, table))
        ):
            return [_dumps(obj, PROTOCOL)]
    elif kind is bytes or kind is bytearray:
        data: Any = obj
        if len(data) < LARGE_BYTES:
            return [_dumps(obj, PROTOCOL)]
        if kind is bytes:
            return [_BYTES_STREAM, memoryview(data)]
        obj = _Large(data)
    return pickle_frames(_lift(obj), {name: obj})


def loads(frames: Sequence[Buffer], writable: bool = True) -> Any:
    """The object again. Buffers that are writable become the object's own memory, uncopied.

    writable: copy read-only buffers, so that received arrays can be written to.
    Raises CodecError for whatever goes wrong, with what was raised as its cause.
    """
    try:
        stream = frames[0]
        if len(frames) == 1:
            return _loads(stream)
        if len(frames) == 2 and stream == _BYTES_STREAM:
            return bytes(frames[1])
        buffers: Sequence[Buffer] = frames[1:]
        if writable:
            buffers = [bytearray(b) if memoryview(b).readonly else b for b in buffers]
        return _loads(stream, buffers=buffers)
    except Exception as exc:
        raise unreadable(exc) from exc


def nbytes_of(frames: Sequence[Buffer]) -> int:
    """Bytes in all frames together."""
    return sum(map(len, frames))


def pack(frames: Sequence[Buffer]) -> bytes:
    """The frames as one self-contained blob: a copy, meant for small values."""
    if len(frames) == 1:
        return bytes(frames[0])
    count = len(frames)
    lengths = Struct(f"<{count}Q").pack(*map(len, frames))
    return b"".join((_HEAD.pack(_MAGIC, count), lengths, *frames))


def unpack(blob: Buffer) -> list[Buffer]:
    """The frames of a blob, as views of it. Raises CodecError if its lengths do not add up."""
    view = memoryview(blob)
    total = len(view)
    if total and view[0] != _MAGIC:
        return [view]
    if total < _HEAD.size:
        raise CodecError(f"a packed value of {total} bytes is too short to be one")
    count = _HEAD.unpack_from(view)[1]
    start = _HEAD.size + 8 * count
    if not count or start > total:
        raise CodecError(f"a packed value of {total} bytes cannot hold {count} frames")
    lengths = Struct(f"<{count}Q").unpack_from(view, _HEAD.size)
    if start + sum(lengths) != total:
        raise CodecError(f"the frames of a packed value of {total} bytes do not add up to it")
    frames: list[Buffer] = []
    for length in lengths:
        frames.append(view[start : start + length])
        start += length
    return frames


def dumps_inline(obj: object, limit: int, name: str = "value") -> bytes | None:
    """The object as one blob of at most `limit` bytes, or None if it is larger.

    Who needs the frames of a larger one should call `dumps`, look at `nbytes_of`, and `pack`
    only the small ones, which pickles once. Raises what `dumps` raises.
    """
    if type(obj) in ATOMS:
        blob = _dumps(obj, PROTOCOL)
        return blob if len(blob) <= limit else None
    frames = dumps(obj, name)
    if len(frames) == 1:
        whole: Any = frames[0]
        return whole if len(whole) <= limit else None
    if nbytes_of(frames) + _HEAD.size + 8 * len(frames) > limit:
        return None
    return pack(frames)


def loads_inline(blob: Buffer) -> Any:
    """The object in a blob; its arrays are writable. Raises CodecError and nothing else."""
    if blob and blob[0] == 0x80:
        try:
            return _loads(blob)
        except Exception as exc:
            raise unreadable(exc) from exc
    frames = unpack(blob)
    return loads([frames[0], *map(bytearray, frames[1:])])


# ---------------------------------------------------------------- the way of everything else


def pickle_frames(
    obj: object, names: dict[str, object], without: tuple[type, ...] = ()
) -> list[Buffer]:
    """Frames of any object: plain pickle first, cloudpickle for what that cannot do.

    names: what the object, or its parts, are called where an error has to say.
    without: classes for which reducers that somebody has put into copyreg's table do not count.
    """
    buffers: list[Buffer] = []

    def keep_in_band(buffer: PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < IN_BAND:
            return True
        if len(buffers) >= MANY and (view.nbytes < LARGE_OF_MANY or len(buffers) >= MOST):
            return True
        buffers.append(view)
        return False

    stream: bytes | None = None
    try:
        stream = _plain(obj, keep_in_band, without)
    except (UsageError, MemoryError):
        raise
    except Exception:
        # Which of its many exceptions pickle chose says nothing: cloudpickle decides.
        buffers.clear()
    if stream is None or _names_what_only_we_have(stream):
        buffers.clear()
        try:
            stream = pickle_by_value(obj, keep_in_band, without)
        except (UsageError, MemoryError):
            raise
        except Exception as exc:
            from zfabric.codec.diagnose import unserialisable

            raise unserialisable(names, exc) from exc
    return [stream, *buffers]


def _plain(
    obj: object, callback: Callable[[PickleBuffer], bool], without: tuple[type, ...]
) -> bytes:
    file = io.BytesIO()
    pickler = pickle.Pickler(file, PROTOCOL, buffer_callback=callback)
    table = _plain_table()
    pickler.dispatch_table = _table_without(table, without) if without else table
    pickler.dump(obj)
    return file.getvalue()


def pickle_by_value(
    obj: object,
    callback: Callable[[PickleBuffer], bool] | None = None,
    without: tuple[type, ...] = (),
) -> bytes:
    """cloudpickle's stream. callback: as pickle's `buffer_callback`; None keeps all in band.
    without: as for pickle_frames."""
    file = io.BytesIO()
    _table_additions()
    register_spawned_main()
    pickler = by_value_pickler()
    if without:
        table = _table_without(pickler.dispatch_table, without)
        pickler = type("Pickler", (pickler,), {"dispatch_table": table})
    pickler(file, PROTOCOL, buffer_callback=callback).dump(obj)
    return file.getvalue()


@lru_cache(None)
def by_value_pickler() -> Any:
    """The class of cloudpickle's pickler with our reducers added, made when first needed."""
    from collections import ChainMap

    import cloudpickle

    class ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table = ChainMap(_additions, cloudpickle.Pickler.dispatch_table)

    return ByValuePickler


def _names_what_only_we_have(stream: bytes) -> bool:
    if b"__main__" in stream:
        return True
    return any(name.encode() in stream for name in names_by_value())


def _lift(obj: Any) -> Any:
    """A copy of a short flat container with its large bytes wrapped, or the object itself.

    Only where every item is an atom, bytes or an array: then no item can lead back to the
    container, whose identity the copy would lose.
    """
    kind = type(obj)
    if kind is not dict and kind is not list and kind is not tuple or len(obj) > _SHORT:
        return obj
    items = list(obj.values()) if kind is dict else obj
    if not any(
        (type(item) is bytes or type(item) is bytearray) and len(item) >= LARGE_BYTES
        for item in items
    ):
        return obj
    _table_additions()
    if not all(type(item) in _FLAT or type(item) in _additions for item in items):
        return obj
    wrapped: dict[int, Any] = {}
    if kind is dict:
        return {key: wrap_large(item, wrapped) for key, item in obj.items()}
    return kind([wrap_large(item, wrapped) for item in items])


def wrap_large(item: Any, wrapped: dict[int, Any]) -> Any:
    """The item, or its wrapper if it is a large bytes or bytearray.

    wrapped: the wrappers so far, by identity: the same object twice stays the same object twice.
    """
    if type(item) in (bytes, bytearray) and len(item) >= LARGE_BYTES:
        return wrapped.setdefault(id(item), _Large(item))
    return item


def _reduce_memoryview(view: memoryview) -> Any:
    if not view.c_contiguous or not view.nbytes:
        view = memoryview(view.tobytes()).cast("B")
    code = view.format.removeprefix("@")
    if len(code) != 1 or code not in "cbB?hHiIlLqQnNfdeP":
        return as_memoryview, (PickleBuffer(view), "B", (view.nbytes,))
    return as_memoryview, (PickleBuffer(view), code, view.shape)


# Our reducers by type. ndarray joins when somebody has imported numpy: we never do it for them.
_additions: dict[type, Callable[[Any], Any]] = {memoryview: _reduce_memoryview}


def _table_additions() -> None:
    if len(_additions) == 1 and hasattr(sys.modules.get("numpy"), "ndarray"):
        import numpy

        from zfabric.codec.arrays import reduce_array

        _additions[numpy.ndarray] = reduce_array


def _plain_table() -> dict[type, Callable[[Any], Any]]:
    """copyreg's table and ours in one dict: a ChainMap costs a Python call for each object."""
    _table_additions()
    return {**copyreg.dispatch_table, **_additions}


def _table_without(table: Mapping[type, Any], without: tuple[type, ...]) -> dict[type, Any]:
    return {
        kind: reduce
        for kind, reduce in table.items()
        if not (isinstance(kind, type) and issubclass(kind, without))
    }


def unreadable(exc: Exception) -> CodecError:
    """What to raise when bytes did not become an object because of `exc`."""
    if isinstance(exc, CodecError):
        return exc
    if isinstance(exc, ModuleNotFoundError):
        module = exc.name or str(exc)
        return ModuleMissing(
            module,
            message=f"module {module} is not here, and the received value needs it; install it "
            "here, or define what it has in the script itself, or call "
            f"zfabric.register_by_value({module}) where the value is sent, so that it travels "
            "along",
        )
    text = str(exc)
    return CodecError(f"the received value could not be loaded: {type(exc).__name__}: {text[:500]}")
