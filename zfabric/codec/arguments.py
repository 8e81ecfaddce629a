"""A call's arguments as frames, with the futures in them found and their values put in.

Three shapes of pickled object, told apart by their exact type and length, cheapest first:

    (arg, ...)                          atoms only: one pickle.dumps of the tuple itself
    [[arg, ...], {name: arg}, [places]] atoms, futures, and lists of atoms and futures; `places`
                                        is flat: position, name or (position, item), then the
                                        index of the dependency that belongs there
    [(arg, ...), {name: arg}]           anything; futures are placeholders inside the stream

Dependencies are listed once each, in order of first appearance; `load_call` takes their values
in that order.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple

from zfabric.codec.references import Reference, here
from zfabric.codec.serialise import (
    ATOMS,
    LARGE_BYTES,
    PACKED,
    PROTOCOL,
    Buffer,
    loads,
    pickle_frames,
    unpack,
    unreadable,
    wrap_large,
)
from zfabric.errors import CodecError, Unserialisable

EMPTY: tuple[int, ...] = ()

OWN = b"\x5b"
"""The first byte of a blob that begins with `count: u32, index of a dependency: u32 ...`."""

_OWN_COUNT = Struct("<I")

_dumps = pickle.dumps
_loads = pickle.loads
_all_atoms = ATOMS.issuperset


def dump_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Buffer], Sequence[int]]:
    """(frames, task ids of the dependencies) of one call. Most calls have one frame.

    Raises Unserialisable with the path to the culprit (`args[1]['db']._lock`).
    """
    if not kwargs and _all_atoms(map(type, args)):
        return [_dumps(args, PROTOCOL)], EMPTY
    return _dump_mixed(args, kwargs)


class Rows(NamedTuple):
    """Many calls of one function, by row number."""

    blobs: list[Buffer]
    """Each row's first frame; for most rows it is the only one."""
    dependencies: dict[int, Sequence[int]]
    """Rows that wait for others: task ids, as `dump_call` gives them."""
    frames: dict[int, list[Buffer]]
    """Rows with large buffers: all their frames, the first included."""


def dump_rows(rows: Iterable[tuple[Any, ...]]) -> Rows:
    """`dump_call` for each row's positional arguments.

    Raises Unserialisable with the row in its path (`calls[3].args[0]._lock`).
    """
    out = Rows([], {}, {})
    append = out.blobs.append
    dumps, all_atoms, kind = _dumps, _all_atoms, type
    for number, row in enumerate(rows):
        if all_atoms(map(kind, row)):
            append(dumps(row, PROTOCOL))
            continue
        try:
            frames, dependencies = _dump_mixed(row, {})
        except Unserialisable as exc:
            path = f"calls[{number}].{exc.path}"
            raise Unserialisable(path, exc.type_name, exc.reason) from exc
        append(frames[0])
        if dependencies:
            out.dependencies[number] = dependencies
        if len(frames) > 1:
            out.frames[number] = frames
    return out


def with_own(blob: bytes, places: Sequence[int]) -> bytes:
    """A call's blob that says which of its dependencies are the call's own.

    places: their indexes, each below 2**32. The task may write to these, like to arguments that
    nobody else reads: they are mapped for it alone.
    """
    if not places:
        return blob
    count = len(places)
    return b"".join((OWN, _OWN_COUNT.pack(count), Struct(f"<{count}I").pack(*places), blob))


def split_own(blob: Buffer) -> tuple[Sequence[int], Buffer]:
    """(places, blob) of with_own. Raises CodecError for a blob that ends too early."""
    if blob[:1] != OWN:
        return EMPTY, blob
    try:
        (count,) = _OWN_COUNT.unpack_from(blob, 1)
        start = 1 + _OWN_COUNT.size
        places = Struct(f"<{count}I").unpack_from(blob, start)
    except StructError as exc:
        raise CodecError(f"the received arguments end too early: {exc}") from exc
    return places, blob[start + 4 * count :]


def load_call(
    payload: Buffer | Sequence[Buffer], values: Sequence[object] = ()
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call. payload: its only frame, all of them, or all packed in one.

    values: of its dependencies, in the order that `dump_call` gave.
    Safe from several threads at once, and from inside another load.
    Raises CodecError for whatever goes wrong, with what was raised as its cause.
    """
    if not values:
        call = _load(payload)
        if type(call) is tuple:
            return call, {}
    else:
        before = here.values
        here.values = values
        try:
            call = _load(payload)
        finally:
            here.values = before
    try:
        if type(call) is tuple:
            return call, {}
        if len(call) == 2:
            args, kwargs = call
            return args, kwargs
        args, kwargs, places = call
        where = iter(places)
        for place, index in zip(where, where, strict=True):
            if type(place) is int:
                args[place] = values[index]
            elif type(place) is str:
                kwargs[place] = values[index]
            else:
                args[place[0]][place[1]] = values[index]
        return tuple(args), kwargs
    except Exception as exc:
        raise CodecError(f"the received arguments make no call: {exc}") from exc


def _load(payload: Buffer | Sequence[Buffer]) -> Any:
    if type(payload) is list or type(payload) is tuple:
        return loads(payload)
    if payload[:1] == PACKED:  # several frames in one blob: small arrays among the arguments
        return loads(unpack(payload))  # type: ignore[arg-type]
    try:
        return _loads(payload)  # type: ignore[arg-type]
    except Exception as exc:
        raise unreadable(exc) from exc


def _dump_mixed(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Buffer], Sequence[int]]:
    """The way of futures among atoms, which chains and trees are made of."""
    seen: dict[int, int] = {}
    places: list[Any] = []
    plain = list(args)
    for position, arg in enumerate(args):
        kind = type(arg)
        if kind in ATOMS or (kind is bytes and len(arg) < LARGE_BYTES):
            continue
        if isinstance(arg, Reference):
            places += (position, seen.setdefault(arg.task_id, len(seen)))
            plain[position] = None
        elif kind is list and (len(args) == 1 or [*map(id, args)].count(id(arg)) == 1):
            # A list that is given twice stays one list: the general way sees to that.
            items = _without_references(arg, position, seen, places)
            if items is None:
                return _dump_any(args, kwargs)
            plain[position] = items
        else:
            return _dump_any(args, kwargs)
    named = kwargs
    for name, arg in kwargs.items():
        kind = type(arg)
        if kind in ATOMS or (kind is bytes and len(arg) < LARGE_BYTES):
            continue
        if not isinstance(arg, Reference):
            return _dump_any(args, kwargs)
        if named is kwargs:
            named = dict(kwargs)
        places += (name, seen.setdefault(arg.task_id, len(seen)))
        named[name] = None
    if places:
        return [_dumps([plain, named, places], PROTOCOL)], list(seen)
    if not kwargs:
        return [_dumps(args, PROTOCOL)], EMPTY
    return [_dumps([args, kwargs], PROTOCOL)], EMPTY


def _without_references(
    items: list[Any], position: int, seen: dict[int, int], places: list[Any]
) -> list[Any] | None:
    """The list with None for each future, noted in `places`; None if it holds anything else."""
    if _all_atoms(map(type, items)):
        return items
    plain = list(items)
    for index, item in enumerate(items):
        if isinstance(item, Reference):
            places += ((position, index), seen.setdefault(item.task_id, len(seen)))
            plain[index] = None
        elif type(item) not in ATOMS:
            return None
    return plain


def _dump_any(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Buffer], Sequence[int]]:
    large: dict[int, Any] = {}
    call = (
        tuple([wrap_large(arg, large) for arg in args]),
        {name: wrap_large(arg, large) for name, arg in kwargs.items()},
    )
    before = here.seen
    seen: dict[int, int] = {}
    here.seen = seen
    try:
        frames = pickle_frames(list(call), {"args": args, "kwargs": kwargs})
    finally:
        here.seen = before
    return frames, list(seen) if seen else EMPTY
