"""The kinds of data that cross a link, made where the task runs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

KINDS = (
    "zeros",
    "arange",
    "smooth",
    "sparse",
    "text",
    "random",
    "compressed",
    "mixed",
    "quarter",
)

QUARTER_STEPS = 16
"""Parts of a count; images that fine compress to a quarter."""

WORDS = (
    "the of and a to in is that it was for on are as with his they at be this from have or by "
    "one had not but what all were when we there can an your which their said if do will each "
    "about how up out them then she many some so these would other into has more her two like"
).split()


@lru_cache(1)  # what is measured is the way of a value, not how it is made
def make(kind: str, nbytes: int, seed: int) -> Any:
    """About `nbytes` bytes of one kind: an array, or bytes. Different for each seed."""
    import numpy as np

    rng = np.random.default_rng(seed)
    n = nbytes // 8
    if kind == "zeros":
        return np.zeros(n)
    if kind == "arange":
        return np.arange(seed, seed + n, dtype="f8")
    if kind == "smooth":
        return _stack(rng, n)
    if kind == "quarter":
        return _stack(rng, n, noise=3.0, steps=QUARTER_STEPS)
    if kind == "sparse":
        array = np.zeros(n)
        array[rng.integers(0, n, n // 20)] = rng.random(n // 20)
        return array
    if kind == "text":
        return tiled(text_block(), nbytes, seed)
    if kind == "random":
        return rng.bytes(nbytes)
    if kind == "compressed":
        return tiled(compressed_block(), nbytes, seed)
    array = np.zeros(n)
    array[n // 4 :] = np.frombuffer(rng.bytes(8 * (n - n // 4)), "f8")
    return array


@lru_cache(1)
def text_block() -> bytes:
    """Some 900 kB of words. lz4 looks back 64 kB, so more of the same looks new to it."""
    import numpy as np

    words = np.random.default_rng(0).choice(np.array(WORDS), 200_000)
    return " ".join(words.tolist()).encode()


@lru_cache(1)
def compressed_block() -> bytes:
    """Some 250 kB that zlib has made."""
    import zlib

    return zlib.compress(text_block(), 6)


def tiled(block: bytes, nbytes: int, seed: int) -> bytes:
    """The block again and again, beginning somewhere else for each seed."""
    start = seed * 4099 % len(block)
    return (block[start:] + block * (nbytes // len(block) + 1))[:nbytes]


def _stack(rng: Any, n: int, noise: float = 0.0, steps: int = 1) -> Any:
    """Images of smooth intensities as a detector counts them (12 bits), stored as f8.

    noise: counts that each pixel differs by, one standard deviation.  steps: per count.
    """
    import numpy as np

    x = np.linspace(0, 6, 256)
    image = 2000 + 900 * np.sin(x)[:, None] * np.cos(0.7 * x)[None, :]
    frames = -(-n // image.size)
    drift = 1 + 0.1 * np.sin(np.arange(frames) / 7 + rng.random())
    stack = image[None] * drift[:, None, None]
    if noise:
        stack += rng.normal(0, noise, stack.shape)
    stack = np.rint(stack * steps) / steps
    return stack.reshape(-1)[:n].copy()
