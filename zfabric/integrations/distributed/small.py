"""Which messages are so small that nothing is worth asking about them.

distributed measures each message with `sizeof` to see whether a thread should serialise it: 17 us
for a ping, 78 us for the report of a task, several times what serialising them takes.
"""

from __future__ import annotations

import sys
from typing import Any

from distributed.protocol import Serialize

MOST_PARTS = 2000
"""Entries of nested lists and dicts; more are left to distributed's measure. 0.1 us each."""

MOST_BYTES = 1024 * 1024
"""Of strings and bytes in it: serialised in well below a millisecond."""

_ATOMS = frozenset((int, float, bool, type(None)))


def is_small(message: Any) -> bool:
    """Whether it consists of a few plain things and small arrays, so that serialising it takes no
    time."""
    stack = [message]
    pop, push = stack.pop, stack.extend
    parts, nbytes = MOST_PARTS, MOST_BYTES
    while stack:
        part = pop()
        kind = type(part)
        if kind is str or kind is bytes:
            nbytes -= len(part)
            if nbytes < 0:
                return False
        elif kind is dict:
            parts -= 2 * len(part)
            if parts < 0:
                return False
            push(part)
            push(part.values())
        elif kind is list or kind is tuple:
            parts -= len(part)
            if parts < 0:
                return False
            push(part)
        elif kind is Serialize:
            push((part.data,))
        elif kind not in _ATOMS:
            nbytes -= _array_nbytes(part)
            if nbytes < 0:
                return False
    return True


def _array_nbytes(part: Any) -> int:
    """Of a plain NumPy array; of everything else more than is small."""
    numpy = sys.modules.get("numpy")
    if numpy is None or type(part) is not numpy.ndarray or part.dtype.hasobject:
        return MOST_BYTES + 1
    return int(part.nbytes)
