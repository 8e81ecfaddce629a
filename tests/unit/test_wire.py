"""Messages to frames and back: every kind, any content."""

from __future__ import annotations

import sys
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgpack import packb, unpackb

from zfabric import messages as m
from zfabric import wire
from zfabric.errors import LocalProtocolError, RemoteProtocolError
from zfabric.testing import strategies

KINDS = sorted(strategies.BY_KIND, key=lambda kind: kind.__name__)


def test_every_kind_of_message_has_a_strategy_here() -> None:
    assert set(typing.get_args(m.Message)) == set(strategies.BY_KIND)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=40)
@given(data=st.data())
def test_a_message_comes_back_equal(kind: type, data: st.DataObject) -> None:
    message = data.draw(strategies.BY_KIND[kind])
    token, epoch, ack = data.draw(st.tuples(*[strategies.u64] * 3))
    seq = data.draw(st.integers(1, (1 << 64) - 1)) if wire.is_sequenced(message) else 0
    frames = [bytes(frame) for frame in wire.encode(message, token, epoch, seq, ack)]
    header, back = wire.decode(frames)
    assert back == message and type(back) is kind
    assert (header.token, header.epoch, header.seq, header.ack) == (token, epoch, seq, ack)
    assert header.version == wire.PROTOCOL
    assert len(frames) <= wire.MAX_FRAMES


@given(message=strategies.messages)
def test_a_body_knows_its_size_and_is_packed_once_for_every_header(message: m.Message) -> None:
    body = wire.encode_body(message)
    assert body.nbytes == sum(map(len, body.frames))
    seq = 7 if wire.is_sequenced(message) else 0
    first, again = ([wire.encode_header(body.kind, 5, 6, seq, ack), *body.frames] for ack in (0, 3))
    assert wire.decode(first)[1] == wire.decode(again)[1] == message


def test_bulk_travels_untouched_and_uncopied() -> None:
    data = memoryview(b"x" * 1000)
    frames = wire.encode(m.Chunk(1, 0, [1000], data))
    assert frames[2] is data
    _, chunk = wire.decode(frames)
    assert isinstance(chunk, m.Chunk) and chunk.data is data


def test_columns_of_ids_are_eight_bytes_each() -> None:
    one, two = (len(wire.encode_body(m.Release([1 << 62] * n)).frames[0]) for n in (10, 20))
    assert two - one == 80


@pytest.mark.skipif(sys.byteorder == "big", reason="the test writes little-endian by hand")
def test_ids_are_little_endian_on_every_machine() -> None:
    (body,) = wire.encode_body(m.Free([1, 258])).frames
    assert unpackb(body) == [b"\1" + b"\0" * 7 + b"\2\1" + b"\0" * 6]


@pytest.mark.parametrize(
    "message",
    [
        m.Release([-1]),
        m.Release([1 << 64]),
        m.Run([], [1], [1], ["no number"], [b""]),  # type: ignore[list-item]
        m.Answer(1, object()),  # type: ignore[arg-type]
        m.Bye("\ud800"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_cannot_be_packed_is_our_own_fault(message: m.Message) -> None:
    with pytest.raises(LocalProtocolError, match=type(message).__name__):
        wire.encode(message)


# --- Versions -----------------------------------------------------------------------------------


def other_version(message: m.Message, version: int, seq: int = 0) -> list[bytes]:
    frames = [bytes(frame) for frame in wire.encode(message, 1, 2, seq, 0)]
    header = unpackb(frames[0])
    header[1] = version
    return [packb(header), *frames[1:]]


@pytest.mark.parametrize("version", [0, wire.PROTOCOL + 1, 1 << 40])
def test_hello_and_refuse_of_another_version_can_be_read(version: int) -> None:
    hello = m.Hello(m.WORKER, "w", "9.9", "3.14.0", "host", 1, slots=2)
    for message in (hello, m.Refuse("version", "two columns")):
        header, back = wire.decode(other_version(message, version))
        assert back == message
        assert header.version == version


def test_anything_else_of_another_version_is_refused_before_its_body_is_read() -> None:
    frames = other_version(m.Release([1]), wire.PROTOCOL + 1, seq=1)
    with pytest.raises(RemoteProtocolError) as caught:
        wire.decode([frames[0], b"\xc1 not even msgpack"])
    assert caught.value.reason == "version"
    unknown = unpackb(frames[0])
    unknown[2] = 255
    with pytest.raises(RemoteProtocolError) as caught:
        wire.decode([packb(unknown), frames[1]])
    assert caught.value.reason == "version"
