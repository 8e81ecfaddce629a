"""Frames through blosc and back; headers that lie are refused before memory is taken."""

from __future__ import annotations

import struct
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zfabric.codec import compress as module
from zfabric.codec.compress import (
    CODEC,
    Header,
    codecs,
    compress,
    decompress_into,
    parse_header,
    raw_nbytes,
)
from zfabric.errors import CodecError

SMOOTH = np.arange(50_000.0)


def packed(array: np.ndarray = SMOOTH) -> tuple[bytes, bytes]:
    done = compress(array, array.itemsize)
    assert done is not None
    return done


@pytest.mark.parametrize(
    "array",
    [
        SMOOTH,
        SMOOTH.reshape(100, 500),
        np.asfortranarray(SMOOTH.reshape(100, 500)),
        np.zeros(10_000, "u1"),
        np.zeros(10_000, ">i4"),
        np.zeros(300, [("a", "i1"), ("b", "f8", (40,))]),
        np.ones(40_000, bool),
    ],
    ids=lambda array: f"{array.dtype.str}-{array.ndim}",
)
def test_there_and_back(array: np.ndarray) -> None:
    header, data = packed(array)
    assert len(data) < array.nbytes / 2
    assert parse_header(header) == Header(CODEC, 2, array.nbytes)
    assert raw_nbytes(header, data, 1 << 30) == array.nbytes
    place = bytearray(array.nbytes)
    decompress_into(header, memoryview(bytearray(data)), memoryview(place))
    assert place == array.tobytes("A")


def test_into_the_middle_of_memory() -> None:
    header, data = packed()
    place = bytearray(SMOOTH.nbytes + 200)
    decompress_into(header, data, memoryview(place)[100:-100])
    assert place[100:-100] == SMOOTH.tobytes() and not any(place[:100] + place[-100:])
    array = np.empty_like(SMOOTH)
    decompress_into(header, data, array.data)
    assert np.array_equal(array, SMOOTH)


@given(st.binary(max_size=3000), st.integers(1, 300), st.integers(1, 40))
def test_any_bytes_come_back(data: bytes, itemsize: int, times: int) -> None:
    raw = data * times
    done = compress(raw, itemsize)
    if done is None:
        return
    place = bytearray(len(raw))
    decompress_into(*done, place)
    assert place == raw and len(done.data) < len(raw)


def test_what_does_not_pay_is_left_alone() -> None:
    assert compress(np.random.default_rng(1).bytes(100_000), 8) is None
    assert compress(b"", 1) is None
    assert compress(b"abc", 1) is None


def test_frames_that_blosc_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._blosc(), "MAX_BUFFERSIZE", 1000)
    assert compress(bytes(1001), 1) is None


def test_headers_that_lie_take_no_memory() -> None:
    header, data = packed()
    huge = 1 << 40
    lies = [
        (Header(CODEC, 2, huge).pack(), data),
        (Header(CODEC, 2, 0).pack(), data),
        (Header(CODEC, 2, SMOOTH.nbytes - 8).pack(), data),
        (Header(CODEC, 9, SMOOTH.nbytes).pack(), data),
        (Header("zstd", 2, SMOOTH.nbytes).pack(), data),
        (b"XX" + header[2:], data),
        (header[:2] + b"\x07" + header[3:], data),
        (header[:-1], data),
        (header, data[:-1]),
        (header, data[:10]),
        (header, b""),
        (header, data[:4] + struct.pack("<I", (1 << 31) - 20) + data[8:]),
        (Header(CODEC, 2, (1 << 31) - 20).pack(), data[:4] + b"\xec\xff\xff\x7f" + data[8:]),
        (header, b"\x01" + data[1:]),
    ]
    tracemalloc.start()
    for head, body in lies:
        with pytest.raises(CodecError):
            raw_nbytes(head, body, limit=1 << 30)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with pytest.raises(CodecError, match="limit"):
        raw_nbytes(header, data, limit=SMOOTH.nbytes - 1)


def test_the_place_must_fit() -> None:
    header, data = packed()
    for place in (bytearray(SMOOTH.nbytes - 1), bytearray(SMOOTH.nbytes + 1), bytes(SMOOTH.nbytes)):
        with pytest.raises(CodecError):
            decompress_into(header, data, place)


@settings(max_examples=200)
@given(st.data())
def test_damaged_data_end_in_codec_error_or_bytes(data: st.DataObject) -> None:
    header, body = packed()
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    place = bytearray(SMOOTH.nbytes + 64)
    try:
        decompress_into(header, bytes(damaged), memoryview(place)[:-64])
    except CodecError:
        pass
    assert not any(place[-64:])  # never beyond its place


def test_many_threads_at_once() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        array = np.arange(number, number + 100_000.0)
        for _ in range(10):
            done = compress(array, 8)
            place = bytearray(array.nbytes)
            assert done is not None
            decompress_into(*done, place)
            if place != array.tobytes():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_side_without_blosc_offers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert codecs() == (CODEC,)

    def missing() -> None:
        raise ImportError("no blosc")

    monkeypatch.setattr(module, "_blosc", missing)
    assert codecs() == ()
