"""How fast this libsodium encrypts: between two wheels of pyzmq lies a factor of twelve.

CURVE seals each frame with crypto_box_easy_afternm. The library that libzmq is linked with is found
among what this process has loaded; where libzmq has it built in, or uses another, nothing is
known, and nothing is said.
"""

from __future__ import annotations

import ctypes
from time import perf_counter

SLOW = 300e6
"""Bytes per second below which encryption, not the network, is what transfers wait for."""

_PIECE = 1 << 20


def speed(pieces: int = 4) -> float | None:
    """Bytes per second of sealing in one thread, the best of a few MiB; None if not to be had."""
    path = _loaded("libsodium")
    if path is None:
        return None
    try:
        library = ctypes.CDLL(path)
        # Else it would be its plainest code, half as fast as what it picks for this processor.
        library.sodium_init()
        seal = library.crypto_box_easy_afternm
    except (OSError, AttributeError):
        return None
    message = ctypes.create_string_buffer(_PIECE)
    sealed = ctypes.create_string_buffer(_PIECE + 16)
    nonce, key = ctypes.create_string_buffer(24), ctypes.create_string_buffer(32)
    best = 0.0
    for _ in range(pieces):
        start = perf_counter()
        if seal(sealed, message, ctypes.c_ulonglong(_PIECE), nonce, key):
            return None
        best = max(best, _PIECE / (perf_counter() - start))
    return best


def warning(found: float | None) -> str:
    """What to tell people about that speed; "" when there is nothing to tell."""
    if found is None or found >= SLOW:
        return ""
    return (
        f"encryption takes place at {found / 1e6:.0f} MB/s here, which large values will wait for:"
        " this libsodium was built without optimisation; install pyzmq 27.3 or newer from a wheel"
    )


def _loaded(name: str) -> str | None:
    """The path of a shared library that this process has in memory."""
    try:
        with open("/proc/self/maps") as file:
            for line in file:
                path = line.rstrip("\n").partition("/")[2]
                if name in path.rpartition("/")[2]:
                    return "/" + path
    except OSError:
        pass
    return None
