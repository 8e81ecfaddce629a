"""Parts of bodies ⇄ msgpack: columns of integers, and checks that hold a peer to the layout.

A column of ids is one msgpack bin of little-endian 64-bit integers: packed and unpacked at
30 ns per entry, and checked by its length alone. A column of one is just that integer. A check
raises `Malformed`, which `coding` turns into a counted RemoteProtocolError.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Any

from zfabric.messages import DEFAULT_OPTIONS, INLINE, LOCAL, REMOTE, Dependency, TaskOptions

_ONLY_BYTES = {bytes}
_BIG_ENDIAN = sys.byteorder == "big"
_MAX_I32 = 1 << 31
_MAX_U64 = (1 << 64) - 1


class Malformed(Exception):
    """A field is not what the layout says; the text names it."""


def pack_ids(ids: Sequence[int]) -> bytes | int:
    """A column of unsigned 64-bit integers."""
    if len(ids) == 1 and type(ids[0]) is int and 0 <= ids[0] <= _MAX_U64:
        return ids[0]
    column = array("Q", ids)
    if _BIG_ENDIAN:
        column.byteswap()
    return column.tobytes()


def read_ids(value: object) -> list[int]:
    if type(value) is int and value >= 0:
        return [value]
    if type(value) is not bytes or len(value) & 7:
        raise Malformed("a column of ids is not a multiple of 8 bytes")
    if _BIG_ENDIAN:
        column = array("Q", value)
        column.byteswap()
        return column.tolist()
    return memoryview(value).cast("Q").tolist()


def read_int(value: object, least: int = 0, most: int = (1 << 63) - 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise Malformed("an integer is missing or out of range")
    return value


def read_seconds(value: object) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e9:  # type: ignore[operator]
        raise Malformed("a duration is missing or out of range")
    return float(value)  # type: ignore[arg-type]


def read_text(value: object, most: int = 4096) -> str:
    if type(value) is not str or len(value) > most:
        raise Malformed("a text is missing or too long")
    return value


def read_bytes(value: object) -> bytes:
    if type(value) is not bytes:
        raise Malformed("a byte string is missing")
    return value


def read_list(value: object) -> list[Any]:
    if type(value) is not list:
        raise Malformed("a list is missing")
    return value


def read_blobs(value: object, n: int) -> list[bytes]:
    """A column of n byte strings."""
    if type(value) is not list or len(value) != n:
        raise Malformed("a column has another length than its ids")
    if n == 1:
        if type(value[0]) is not bytes:
            raise Malformed("a column of byte strings holds something else")
    elif n and set(map(type, value)) != _ONLY_BYTES:
        raise Malformed("a column of byte strings holds something else")
    return value


def read_int_list(value: object, most: int = (1 << 64) - 1) -> list[int]:
    """A short msgpack list of unsigned integers."""
    items = read_list(value)
    for item in items:
        if type(item) is not int or not 0 <= item <= most:
            raise Malformed("a list of integers holds something else")
    return items


def read_functions(value: object) -> list[tuple[int, str, bytes]]:
    """[[function id, name, blob], ...]"""
    if value == []:
        return []
    functions = []
    for entry in read_list(value):
        if type(entry) is not list or len(entry) != 3:
            raise Malformed("a function entry does not have three parts")
        functions.append(
            (read_int(entry[0], 0, (1 << 64) - 1), read_text(entry[1]), read_bytes(entry[2]))
        )
    return functions


def read_row_ids(value: object, n: int) -> list[tuple[int, list[int]]]:
    """[[row, [id, ...]], ...] with ascending rows below n."""
    if value == []:
        return []
    return [(row, read_int_list(rest)) for row, rest in _sparse(value, n)]


def read_resources(value: object) -> dict[str, float]:
    if type(value) is not dict or len(value) > 64:
        raise Malformed("resources are not a small map")
    for name, amount in value.items():
        if type(name) is not str or type(amount) not in (int, float) or not 0 <= amount < 1e15:
            raise Malformed("a resource is not a name with an amount")
    return value


def pack_options(options: Sequence[tuple[int, TaskOptions]]) -> list[Any]:
    return [
        [
            row,
            [
                o.priority,
                o.retries,
                o.resources,
                o.workers,
                o.key,
                o.timeout_s,
                o.retry_on,
                o.idempotent,
                o.must_fit,
            ],
        ]
        for row, o in options
    ]


def read_options(value: object, n: int) -> list[tuple[int, TaskOptions]]:
    if value == []:
        return []
    options = []
    for row, parts in _sparse(value, n):
        if type(parts) is not list or len(parts) != 9:
            raise Malformed("task options do not have nine parts")
        priority, retries, resources, workers, key, timeout_s, retry_on, idempotent, fit = parts
        if type(idempotent) is not bool or type(fit) is not bool:
            raise Malformed("idempotent and must_fit are yes or no")
        options.append(
            (
                row,
                TaskOptions(
                    read_int(priority, -_MAX_I32, _MAX_I32),
                    read_int(retries, 0, _MAX_I32),
                    read_resources(resources),
                    tuple(read_text(name) for name in read_list(workers)),
                    read_text(key),
                    read_seconds(timeout_s),
                    tuple(read_text(name) for name in read_list(retry_on)),
                    idempotent,
                    fit,
                )
                if parts != _DEFAULT_PARTS
                else DEFAULT_OPTIONS,
            )
        )
    return options


_DEFAULT_PARTS: list[Any] = [0, 0, {}, [], "", 0.0, [], True, True]


def read_limits(value: object, n: int) -> Sequence[tuple[int, float]]:
    """[[row, seconds], ...]"""
    if value == []:
        return ()
    return [(row, read_seconds(limit_s)) for row, limit_s in _sparse(value, n)]


def read_dependencies(value: object, n: int) -> list[tuple[int, list[Dependency]]]:
    """[[row, [[id, INLINE | LOCAL | REMOTE, data], ...]], ...]"""
    if value == []:
        return []
    found = []
    for row, entries in _sparse(value, n):
        dependencies: list[Dependency] = []
        for entry in read_list(entries):
            if type(entry) is not list or len(entry) != 3:
                raise Malformed("a dependency does not have three parts")
            id_, way, data = entry
            read_int(id_, 0, (1 << 64) - 1)
            if way == INLINE and type(way) is int:
                read_bytes(data)
            elif way == LOCAL and type(way) is int:
                read_int(data)
            elif way == REMOTE and type(way) is int:
                data = read_place(data)
            else:
                raise Malformed("a dependency comes by an unknown way")
            dependencies.append((id_, way, data))
        found.append((row, dependencies))
    return found


def read_place(value: object) -> list[Any]:
    """[nbytes, [[worker number, data address], ...]]: where a stored value can be had."""
    if type(value) is not list or len(value) != 2:
        raise Malformed("a place does not have two parts")
    read_int(value[0])
    for holder in read_list(value[1]):
        if type(holder) is not list or len(holder) != 2:
            raise Malformed("a holder does not have two parts")
        read_int(holder[0])
        read_text(holder[1])
    return value


def _sparse(value: object, n: int) -> list[list[Any]]:
    """[[row, anything], ...] with strictly ascending rows below n."""
    last = -1
    entries = read_list(value)
    for entry in entries:
        if type(entry) is not list or len(entry) != 2 or type(entry[0]) is not int:
            raise Malformed("a sparse column's entry is not a row with something")
        if not last < entry[0] < n:
            raise Malformed("a sparse column's rows are not ascending")
        last = entry[0]
    return entries
