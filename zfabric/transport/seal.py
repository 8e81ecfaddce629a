"""A checksum behind each message on connections that have no keys.

TCP's own 16 bits miss some of what memory, cards and switches do to bytes; where there are keys,
CURVE finds every change. A message travels with one frame more, the seal: XXH3 of its frames, each
seeded with the one before, so that the places where one ends count as well. It finds accidents; it
is no protection from anybody who wants to change a message.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress

from xxhash import xxh3_64_intdigest

NBYTES = 8


def seal_of(frames: Sequence[bytes | bytearray | memoryview]) -> bytes:
    """The last frame of a message of these frames: 8 bytes. frames: flat."""
    value = 0
    for frame in frames:
        value = xxh3_64_intdigest(frame, value)
    return value.to_bytes(NBYTES, "little")


def take_seal(frames: list[bytes]) -> bool:
    """Take the seal off a message; whether it fits the rest."""
    seal = frames.pop()
    return len(seal) == NBYTES and bool(frames) and seal == seal_of(frames)


def shut_down(descriptor: int) -> None:
    """End a connection whose descriptor libzmq's I/O thread owns, and may have closed meanwhile."""
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.shutdown(socket.SHUT_RDWR)
