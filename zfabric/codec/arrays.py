"""numpy arrays as pickle-5 buffers: no copy when contiguous, and writable on the other side.

numpy's own reduction keeps three kinds of array in the stream, which costs two copies more:
datetimes (they export no buffer), non-contiguous ones and read-only ones arrive read-only. Here
an array is always (buffer, dtype, shape, order), whatever its layout. A read-only array is offered
through a writable alias of its memory, since pickle marks buffers of read-only exporters and the
loaded array would be read-only too; nobody writes through the alias.

Arrays of objects and subclasses of ndarray go numpy's own way.

This module imports numpy: import it only where numpy is loaded or needed anyway.
"""

from __future__ import annotations

from pickle import PickleBuffer
from typing import Any, TypeAlias

import numpy as np

# Any: numpy's types promise `__buffer__` only from Python 3.12 on.
_Array: TypeAlias = Any

# Kinds whose `dtype.str` says all there is; pickling a dtype costs more than a small array.
_PLAIN_KINDS = frozenset("biufcmMSU")
_tokens: dict[Any, Any] = {}


class _Alias:
    """The same memory with the write flag set; keeps the array alive."""

    __slots__ = ("__array_interface__", "array")

    def __init__(self, flat: _Array) -> None:
        self.array = flat
        self.__array_interface__ = {
            "version": 3,
            "shape": flat.shape,
            "typestr": "|u1",
            "data": (flat.__array_interface__["data"][0], False),
        }


def reduce_array(array: _Array) -> Any:
    """What pickle needs to rebuild an exact ndarray; the data as one PickleBuffer."""
    dtype = array.dtype
    if dtype.hasobject or dtype.itemsize == 0:
        return array.__reduce_ex__(5)
    flags = array.flags
    order = "C"
    if not flags.c_contiguous:
        if flags.f_contiguous:
            order = "F"
        else:
            array = np.ascontiguousarray(array)
    try:
        buffer = _buffer_of(array, order)
    except (BufferError, ValueError, TypeError):
        # A dtype from outside numpy that neither exports a buffer nor lets itself be viewed.
        return array.__reduce_ex__(5)
    token = _tokens.get(dtype)
    if token is None or dtype.metadata is not None:
        token = _token_of(dtype)
    return load_array, (buffer, token, array.shape, order)


def _buffer_of(array: _Array, order: str) -> PickleBuffer:
    if array.flags.writeable:
        try:
            return PickleBuffer(array)
        except ValueError:  # datetimes, also as fields
            pass
    if array.size == 0:
        return PickleBuffer(bytearray())
    flat: Any = (array if order == "C" else array.T).reshape(-1).view(np.uint8)
    if not flat.flags.writeable:
        flat = np.asarray(_Alias(flat))
    return PickleBuffer(flat)


def _token_of(dtype: Any) -> Any:
    """The dtype as a short string where that says all, else the dtype."""
    if dtype.metadata is not None:
        return dtype
    token: Any = dtype
    if dtype.kind in _PLAIN_KINDS and np.dtype(dtype.str) == dtype:
        token = dtype.str
    if len(_tokens) < 1000:
        _tokens[dtype] = token
    return token


def load_array(buffer: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> _Array:
    """An array upon `buffer`, without a copy; writable if the buffer is."""
    return np.ndarray(shape, dtype, buffer, 0, None, order)
