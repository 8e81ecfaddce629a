"""The worker's store: what is in it, in what memory, and that nothing stays open."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zfabric.codec import layout
from zfabric.errors import CodecError
from zfabric.runtime.store import Store
from zfabric.runtime.value import HUGE, Value


def n_open() -> int:
    gc.collect()  # what tests before these have left to it
    return len(list(Path("/proc/self/fd").iterdir()))


def filled(sizes: list[int], fill: int = 7) -> Value:
    value = Value.allocate(sizes)
    value.destination[0 : value.nbytes] = bytes([fill]) * value.nbytes
    return value


def test_layout_aligns_every_frame() -> None:
    sizes = [10, 0, 64, 65, 1]
    assert layout.offsets_of(sizes) == [0, 64, 64, 128, 256]
    assert layout.nbytes_of(sizes) == 257
    frames = [bytes([i]) * n for i, n in enumerate(sizes)]
    area = memoryview(b"".join(layout.join(frames)))
    assert area.nbytes == 257
    assert [bytes(part) for part in layout.split(area, sizes)] == frames
    assert layout.nbytes_of([]) == 0 and layout.split(memoryview(b""), []) == []


@pytest.mark.parametrize("sizes", [[10, 0, 0, 64, 65, 1], [0, 0], [], [0, 5, 0], [200]])
def test_frames_laid_out_without_a_copy_read_like_the_joined_area(sizes: list[int]) -> None:
    frames = [bytes([i + 1]) * n for i, n in enumerate(sizes)]
    area, laid = b"".join(layout.join(frames)), layout.Laid(frames)
    assert (len(laid), laid.nbytes, laid.sizes) == (len(area), len(area), sizes)
    for start in range(len(area) + 1):
        for length in (0, 1, 7, 64, 1000):
            assert bytes(laid[start : start + length]) == area[start : start + length]


@pytest.mark.parametrize("nbytes", [10, 5_000_000])
def test_parts_of_a_value_are_written_in_any_order(nbytes: int) -> None:
    data = bytes(range(256)) * (nbytes // 256 + 1)
    for value in (Value.allocate([nbytes]), Value.private([nbytes])):
        to, half = value.destination, nbytes // 2
        to[half:nbytes] = memoryview(data)[half:nbytes]
        to[0:half] = data[:half]
        assert bytes(value.area) == data[:nbytes]


@pytest.mark.parametrize("sizes", [[-1], [1 << 60], [1 << 45, 1 << 45], [300]])
def test_sizes_that_lie_are_refused(sizes: list[int]) -> None:
    with pytest.raises(CodecError):
        layout.split(memoryview(bytes(100)), sizes)


@pytest.mark.parametrize("nbytes", [0, 1, 65536, 65537, 5_000_000])
def test_values_are_kept_in_bytes_or_files(nbytes: int, wait_until: Callable[..., object]) -> None:
    before = n_open()
    store = Store()
    value = filled([nbytes])
    assert (value.fd >= 0) == (nbytes > 65536)
    store.put(1, value)
    assert (store.n_values, store.nbytes, 1 in store) == (1, nbytes, True)
    chunk = store.chunk(1, nbytes // 2, 1 << 30)
    assert chunk is not None and chunk.readonly and len(chunk) == nbytes - nbytes // 2
    store.free([1, 2])
    assert (store.n_values, store.nbytes, store.get(1)) == (0, 0, None)
    assert bytes(chunk[:3]) == b"\7\7\7"[: len(chunk)], "a view outlives the value"
    del value, chunk
    wait_until(lambda: n_open() == before)  # a large one is given back by the store's thread


def test_a_value_can_be_replaced_and_all_be_cleared() -> None:
    before = n_open()
    store = Store()
    store.put(1, filled([100_000]))
    store.put(1, filled([200_000]))
    store.put(2, filled([10]))
    assert store.nbytes == 200_010 and n_open() <= before + 2, "its descriptor, and a mapping"
    store.clear()
    assert store.nbytes == 0 and n_open() == before


def test_ranges_that_make_no_sense_give_nothing() -> None:
    store = Store()
    store.put(1, filled([100]))
    assert store.chunk(2, 0, 1) is None
    assert store.chunk(1, -1, 1) is None
    assert store.chunk(1, 101, 1) is None
    assert store.chunk(1, 0, -1) is None
    assert bytes(store.chunk(1, 100, 5) or b"none") == b"none"


def test_a_file_that_is_too_short_is_refused_and_closed() -> None:
    before = n_open()
    fd = os.memfd_create("short")
    os.write(fd, b"abc")
    with pytest.raises(CodecError):
        Value.from_file([100], fd)
    with pytest.raises(CodecError):
        Value.from_bytes([100], b"abc")
    assert n_open() == before


def test_pages_of_a_huge_value_are_freed_by_another_thread(
    monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    closed: list[tuple[int, bool]] = []
    close = Value.close

    def watched(value: Value) -> None:
        if value.fd >= 0:
            closed.append((value.nbytes, threading.current_thread() is threading.main_thread()))
        close(value)

    monkeypatch.setattr(Value, "close", watched)
    store = Store()
    try:
        for id_, nbytes in ((1, HUGE), (2, HUGE // 2)):
            store.put(id_, Value.allocate([nbytes]))
        store.free([1, 2])
        assert (HUGE // 2, True) in closed, "what takes microseconds is done at once"
        wait_until(lambda: (HUGE, False) in closed)
        assert store.nbytes == 0 and len(closed) == 2
        store.put(3, Value.allocate([HUGE]))
    finally:
        store.close()
    assert len(closed) == 3, "with the store all of it is given back"
