"""Whether compressing a frame pays: a verdict from a few small windows of it.

A frame is read in at most five windows of at most 10 kB, one at a random place in each fifth of
the frame, in ascending order, beginning and ending between items. A shorter frame is its own
sample. The windows are compressed for real; their ratio stands for the frame's.

The frame is taken as flat bytes before anything is measured. In 2017 dask took `len()` and slices
of the buffer as it came: on an n-dimensional memoryview both count the first axis, so the sample
of a 2-d array was as large as the array. Here the shape is gone before the first number is.

With the link's speed the verdict compares the two ways: `n / link` raw, against the largest
of `n / compress`, `ratio * n / link` and `n / decompress`: while one part is compressed, earlier
ones are on the wire and decompressed. Without it, the ratio alone decides.

Nothing here knows a clock, a socket or a setting that was not handed in: the same buffer,
settings and seed give the same verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pickle import PickleBuffer
from random import Random
from typing import Any

MAX_SAMPLE = 50_000
"""Bytes that a sample never exceeds, whatever the settings say."""


@dataclass(frozen=True, slots=True)
class SamplerSettings:
    """What a verdict depends on besides the frame and the link."""

    floor: int = 10_000
    """Bytes; smaller frames go raw unseen: compressing saves less than a packet or two."""
    window: int = 10_000
    """Bytes per window, rounded down to whole items: enough for shuffle and lz4 to show."""
    windows: int = 5
    """Windows per frame; one sits in each equal stretch of it."""
    worst_ratio: float = 0.9
    """Compressed / raw above which it never pays: what is saved is noise."""
    compress_rate: float = 1.3e9
    """Bytes/s of one compressing thread, until the codec's own record says better."""
    decompress_rate: float = 2.5e9
    """Bytes/s of one decompressing thread."""


DEFAULTS = SamplerSettings()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to compress a frame, and why. `ratio` is compressed / raw of the sample."""

    compress: bool
    reason: str
    """One of a few constant words, to be counted: small, local, incompressible, slower, pays."""
    ratio: float = 1.0
    sampled: int = 0
    """Bytes that were looked at."""


def judge(
    buffer: Any,
    itemsize: int,
    rng: Random,
    compressed_size: Callable[[bytes, int], int],
    settings: SamplerSettings = DEFAULTS,
    link_rate: float | None = None,
    margin: float = 1.0,
) -> Verdict:
    """The verdict on one frame.

    buffer: anything with the buffer protocol and C or Fortran order, of any shape and format.
    itemsize: bytes of one item, >= 1; what shuffle should work with.
    compressed_size: (sample, item size) -> bytes after compression.
    link_rate: bytes/s of the link to cross; None if unknown, infinite where no bytes are moved
        over a wire (shared memory, inproc, ipc).
    margin: how many times faster than raw compressing has to be, about 1.
    """
    flat = flat_bytes(buffer)
    nbytes = len(flat)
    if nbytes < max(settings.floor, 1):
        return Verdict(False, "small")
    if link_rate == float("inf"):
        return Verdict(False, "local")
    sample = take_sample(flat, itemsize, rng, settings)
    ratio = compressed_size(sample, itemsize) / len(sample)
    if ratio > settings.worst_ratio:
        return Verdict(False, "incompressible", ratio, len(sample))
    if link_rate is not None:
        # Seconds per byte of each way; the frame's size cancels out.
        raw = 1 / link_rate
        work = max(1 / settings.compress_rate, 1 / settings.decompress_rate)
        if max(work, ratio / link_rate) * margin >= raw:
            return Verdict(False, "slower", ratio, len(sample))
    return Verdict(True, "pays", ratio, len(sample))


def flat_bytes(buffer: Any) -> memoryview:
    """The buffer's memory as flat bytes, whatever its shape and format; no copy.

    Raises BufferError if it is neither C- nor Fortran-contiguous: a frame always is.
    """
    if type(buffer) is memoryview and buffer.format == "B" and buffer.ndim == 1:
        if buffer.contiguous:
            return buffer
    return PickleBuffer(buffer).raw()


def take_sample(
    flat: memoryview, itemsize: int, rng: Random, settings: SamplerSettings = DEFAULTS
) -> bytes:
    """The windows of a frame, one after the other: at most MAX_SAMPLE bytes, whole items.

    flat: as `flat_bytes` gives it.  A frame with no more bytes than the windows is taken whole.
    """
    nbytes = len(flat)
    count = max(settings.windows, 1)
    window = min(settings.window, MAX_SAMPLE // count)
    if nbytes <= window * count:
        return bytes(flat)
    unit = itemsize if 0 < itemsize <= window else 1
    items = window // unit
    size = items * unit
    starts = window_offsets(nbytes // unit, items, count, rng)
    return b"".join([flat[start * unit : start * unit + size] for start in starts])


def window_offsets(nitems: int, window: int, count: int, rng: Random) -> list[int]:
    """Start of each sample window in a frame, ascending, one per equal stratum.

    nitems, window: in items, with window * count <= nitems.  count: >= 1.
    Returns `count` offsets in items; windows never overlap.
    Raises ValueError if the windows do not fit.
    Source: stratified sampling (Cochran, Sampling Techniques, ch. 5).
    """
    if window < 1 or count < 1 or window * count > nitems:
        raise ValueError(f"{count} windows of {window} do not fit into {nitems}")
    offsets = []
    for stratum in range(count):
        first = nitems * stratum // count
        last = nitems * (stratum + 1) // count - window
        offsets.append(rng.randint(first, last))
    return offsets
