"""The verdict from a small sample, whatever the shape: the bug of 2017 stays away."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfabric.codec.compress import compressed_size
from zfabric.codec.sampler import (
    MAX_SAMPLE,
    SamplerSettings,
    flat_bytes,
    judge,
    take_sample,
    window_offsets,
)

DTYPES = ["u1", "?", "i2", ">i4", "f8", ">f8", "c16", "S7", "U3", "V13"]
STRUCTURED = np.dtype([("a", "i1"), ("b", ">f8"), ("c", "i4", (3,))])


@st.composite
def buffers(draw: st.DrawFn) -> np.ndarray:
    """Contiguous arrays of every make; sizes on both sides of the floor and the sample."""
    dtype = draw(st.sampled_from([*map(np.dtype, DTYPES), STRUCTURED]))
    shape = draw(
        st.one_of(
            st.just(()),
            st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple),
            st.tuples(st.integers(1, 3), st.integers(1, 60_000)),
            st.tuples(st.integers(1, 60_000), st.integers(1, 3)),
        )
    )
    seed = draw(st.integers(0, 1000))
    nbytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = np.random.default_rng(seed).bytes(nbytes) if draw(st.booleans()) else bytes(nbytes)
    array = np.ndarray(shape, dtype, bytearray(data))
    if draw(st.booleans()):
        array = np.asfortranarray(array)
    if draw(st.booleans()) and array.ndim:
        array = array[array.shape[0] // 2 :].copy("A")
    array.flags.writeable = draw(st.booleans())
    return array


@given(buffers(), st.integers(0, 100))
def test_a_sample_is_small_whatever_the_shape(array: np.ndarray, seed: int) -> None:
    looked_at: list[int] = []

    def size(sample: bytes, itemsize: int) -> int:
        looked_at.append(len(sample))
        return compressed_size(sample, itemsize)

    verdict = judge(array.data, array.itemsize, Random(seed), size)
    assert sum(looked_at) <= MAX_SAMPLE
    assert verdict.sampled == sum(looked_at) <= array.nbytes
    assert (verdict.reason == "small") == (array.nbytes < 10_000)
    assert verdict == judge(array.data, array.itemsize, Random(seed), size)
    flat = flat_bytes(array.data)
    assert len(flat) == array.nbytes and flat.ndim == 1 and flat.format == "B"
    if array.nbytes:
        assert np.shares_memory(np.frombuffer(flat, "u1"), array)


@given(st.integers(1, 10**6), st.integers(1, 5000), st.integers(1, 8), st.integers(0, 100))
def test_windows_lie_in_their_strata(nitems: int, window: int, count: int, seed: int) -> None:
    if window * count > nitems:
        with pytest.raises(ValueError, match="do not fit"):
            window_offsets(nitems, window, count, Random(seed))
        return
    offsets = window_offsets(nitems, window, count, Random(seed))
    assert len(offsets) == count and offsets[0] >= 0
    for stratum, offset in enumerate(offsets):
        assert nitems * stratum // count <= offset
        assert offset + window <= (nitems * (stratum + 1) // count)
    assert offsets == window_offsets(nitems, window, count, Random(seed))


@given(
    st.integers(1, 20_000),
    st.integers(1, 500_000),
    st.integers(-5, 10**6),
    st.integers(1, 100),
    st.integers(0, 9),
)
def test_samples_are_whole_items_within_bounds(
    itemsize: int, nbytes: int, window: int, windows: int, seed: int
) -> None:
    settings = SamplerSettings(window=max(window, 1), windows=windows)
    flat = memoryview(bytes(nbytes))
    sample = take_sample(flat, itemsize, Random(seed), settings)
    assert len(sample) <= MAX_SAMPLE and len(sample) <= nbytes
    if len(sample) < nbytes and itemsize <= min(settings.window, MAX_SAMPLE // windows):
        assert len(sample) % itemsize == 0


def test_windows_begin_between_items() -> None:
    items = np.arange(200_000, dtype="u4")
    sample = take_sample(flat_bytes(items.data), 4, Random(1))
    seen = np.frombuffer(sample, "u4")
    assert len(sample) == MAX_SAMPLE
    jumps = np.flatnonzero(np.diff(seen.astype("i8")) != 1)
    assert len(jumps) == 4 and (np.diff(seen.astype("i8")) > 0).all()


SMOOTH = np.arange(100_000.0)
NOISE = np.frombuffer(np.random.default_rng(1).bytes(800_000), "f8")


@pytest.mark.parametrize(
    ("buffer", "link_rate", "reason"),
    [
        (SMOOTH, None, "pays"),
        (SMOOTH, 1e8, "pays"),
        (SMOOTH, 5e9, "slower"),
        (SMOOTH, float("inf"), "local"),
        (NOISE, None, "incompressible"),
        (NOISE, 1e6, "incompressible"),
        (SMOOTH[:100], 1e6, "small"),
        (SMOOTH[:0], None, "small"),
        (SMOOTH[:2000], None, "pays"),
    ],
)
def test_verdicts(buffer: Any, link_rate: float | None, reason: str) -> None:
    verdict = judge(buffer.data, 8, Random(0), compressed_size, link_rate=link_rate)
    assert verdict.reason == reason and verdict.compress == (reason == "pays")


def test_a_dense_tail_is_seen() -> None:
    mixed = np.concatenate([np.zeros(30_000), NOISE[:70_000]])
    assert not judge(mixed.data, 8, Random(0), lambda s, n: compressed_size(s, n)).ratio < 0.5


def test_a_sliced_view_is_no_frame() -> None:
    with pytest.raises(BufferError):
        judge(SMOOTH[::2].data, 8, Random(0), compressed_size)
    with pytest.raises(BufferError):
        judge(memoryview(bytes(100_000))[::2], 1, Random(0), compressed_size)
