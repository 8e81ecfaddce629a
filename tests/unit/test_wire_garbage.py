"""The parser is total: whatever arrives, it gives a message or a counted RemoteProtocolError."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgpack import ExtType, packb, unpackb

from zfabric import messages as m
from zfabric import wire
from zfabric.errors import RemoteProtocolError
from zfabric.testing import strategies
from zfabric.wire.coding import _KINDS
from zfabric.wire.header import MAGIC, MAX_HEADER, PROTOCOL

REASONS = {
    "frame-count",
    "header-too-long",
    "header-garbage",
    "header-field",
    "magic",
    "version",
    "kind",
    "sequence",
    "body",
    "body-garbage",
}


def outcome(frames: list[bytes]) -> str:
    """A message's name or the reason of its refusal; any other exception passes."""
    try:
        header, message = wire.decode(frames)
    except RemoteProtocolError as exc:
        assert exc.reason in REASONS
        return exc.reason
    assert isinstance(header, wire.Header)
    return type(message).__name__


def header_of(kind: int, seq: int | None = None) -> bytes:
    if seq is None:
        seq = 1 if kind in _KINDS and _KINDS[kind].sequenced else 0
    return bytes(wire.encode_header(kind, 1, 1, seq, 0))


@settings(max_examples=300)
@given(frames=st.lists(st.binary(max_size=100), max_size=10))
def test_random_frames(frames: list[bytes]) -> None:
    assert outcome(frames) in REASONS


anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), (1 << 64) - 1),
        st.floats(),
        st.text(max_size=8),
        st.binary(max_size=24),
        st.builds(ExtType, st.integers(0, 127), st.binary(max_size=4)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers(0, 9)), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=400)
@given(
    kind=st.sampled_from(sorted(_KINDS)),
    fields=st.lists(anything, max_size=12),
    bulk=st.lists(st.binary(max_size=8), max_size=7),
    fit=st.booleans(),
)
def test_well_packed_nonsense(
    kind: int, fields: list[object], bulk: list[bytes], fit: bool
) -> None:
    if fit:
        n = _KINDS[kind].n_fields
        fields = (fields + [0] * n)[:n]
    outcome([header_of(kind), packb(fields), *bulk])


@settings(max_examples=600)
@given(data=st.data())
def test_damaged_messages(data: st.DataObject) -> None:
    message = data.draw(strategies.messages)
    seq = 3 if wire.is_sequenced(message) else 0
    frames = [bytes(frame) for frame in wire.encode(message, 1, 2, seq, 4)]
    outcome(data.draw(strategies.damaged(frames)))


@pytest.mark.parametrize("kind", sorted(_KINDS), ids=lambda kind: _KINDS[kind].message.__name__)
@settings(max_examples=8)
@given(data=st.data())
def test_cut_off_anywhere(kind: int, data: st.DataObject) -> None:
    message = data.draw(strategies.BY_KIND[_KINDS[kind].message])
    header, body, *bulk = wire.encode(message, 1, 2, int(_KINDS[kind].sequenced), 4)
    for end in range(len(body)):
        assert outcome([bytes(header), bytes(body[:end]), *map(bytes, bulk)]) in REASONS
    for end in range(len(header)):
        assert outcome([bytes(header[:end]), bytes(body), *map(bytes, bulk)]) in REASONS


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\x90"


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1
        b"\xdf\xff\xff\xff\xff",  # a map
        b"\xc6\xff\xff\xff\xff",  # a byte string
        b"\xdb\xff\xff\xff\xff",  # a text
        b"\xc9\xff\xff\xff\xff\x01",  # an extension
        b"\x91\xdd\xff\xff\xff\xff",
        b"\x91\xc6\x7f\xff\xff\xff" + b"x" * 64,
    ],
    ids=["array", "map", "bin", "str", "ext", "array-in-array", "bin-in-array"],
)
def test_a_huge_declared_length_costs_nothing(body: bytes) -> None:
    tracemalloc.start()
    try:
        for kind in _KINDS:
            assert outcome([header_of(kind), body]) in {"body", "body-garbage"}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert outcome([body[:MAX_HEADER], b"\x90"]) in {"header-garbage", "magic"}


@pytest.mark.parametrize("depth", [10, 500, 1500, 100_000, 1_000_000])
def test_deep_nesting(depth: int) -> None:
    for kind in (1, 4, 17, 25, 30):
        assert outcome([header_of(kind), nested(depth)]) in {"body", "body-garbage"}
    assert _KINDS[4].n_fields == 3
    assert outcome([header_of(4), b"\x93\x00" + nested(depth) + b"\x00"]) in REASONS


def test_bad_utf8_and_lone_surrogates() -> None:
    for text in (b"\xa2\xff\xfe", b"\xa3\xed\xa0\x80", b"\xa1\x80"):
        assert outcome([header_of(16), b"\x91" + text]) == "body-garbage"
        assert outcome([header_of(3), b"\x92" + text + b"\xa0"]) == "body-garbage"


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "frame-count"),
        ([b""], "frame-count"),
        ([b"", b""], "header-garbage"),
        ([header_of(4)] * 9, "frame-count"),
        ([b"\x00" * (MAX_HEADER + 1), b""], "header-too-long"),
        ([b"GET / HTTP/1.1\r\n", b"Host: x"], "header-garbage"),
        ([packb([MAGIC + 1, 1, 4, 0, 0, 0, 0]), b"\x90"], "magic"),
        ([packb([MAGIC, 1, 4, 0, 0, 0]), b"\x90"], "magic"),
        ([packb({"a": 1}), b"\x90"], "magic"),
        ([packb([MAGIC, 1, 4, -1, 0, 0, 0]), b"\x90"], "header-field"),
        ([packb([MAGIC, 1, 4, True, 0, 0, 0]), b"\x90"], "header-field"),
        ([packb([MAGIC, 1, 4, 0, 0, 0, 0.0]), b"\x90"], "header-field"),
        ([packb([MAGIC, PROTOCOL + 1, 4, 0, 0, 0, 0]), b"\x90"], "version"),
        ([packb([MAGIC, PROTOCOL, 255, 0, 0, 0, 0]), b"\x90"], "kind"),
        ([header_of(17, seq=0), b"\x90"], "sequence"),
        ([header_of(4, seq=1), b"\x90"], "sequence"),
        ([header_of(4), b"\x90"], "body"),
        ([header_of(4), packb([0, []]), b"bulk"], "body"),
        ([header_of(49), packb([0, 0, []])], "body"),
        ([header_of(4), packb([0, list(range(17))])], "body"),
        ([header_of(18), packb([b"1234567"])], "body"),
        ([header_of(30), packb([b"", b"", b"", [], -1])], "body"),
        ([header_of(30), packb([b"x" * 8, b"x" * 8, b"\xff", [b""], 0])], "body"),
        ([header_of(30), packb([b"x" * 8, b"x" * 8, b"\x01", [b"123"], 0])], "body"),
        ([header_of(24), packb([b"x" * 8, b"\0", ["text"]])], "body"),
        ([header_of(16), packb(["x" * 5000])], "body"),
    ],
)
def test_each_reason(frames: list[bytes], reason: str) -> None:
    assert outcome(frames) == reason


@pytest.mark.parametrize(
    "deps",
    [
        [[0, []], [0, []]],  # twice
        [[1, []], [0, []]],  # descending
        [[2, []]],  # beyond the rows
        [[-1, []]],
        [[True, []]],
        [[0, [[1, 3, 0]]]],  # no such way
        [[0, [[1, False, b""]]]],
        [[0, [[1, m.INLINE, "text"]]]],
        [[0, [[1, m.LOCAL, -1]]]],
        [[0, [[1, m.REMOTE, [5]]]]],
        [[0, [[1, m.REMOTE, [5, [[1]]]]]]],
        [[0, [[1, m.REMOTE, [5, [[1, 2]]]]]]],
        [[0, [[1 << 64 - 1, m.LOCAL]]]],
    ],
)
def test_sparse_columns_are_checked(deps: list[object]) -> None:
    two = b"\1" + b"\0" * 15
    assert outcome([header_of(25), packb([[], two, two, two, [b"", b""], deps])]) == "body"


def test_options_out_of_range() -> None:
    one = b"\1" + b"\0" * 7
    good = [0, 1, {"GPU": 1}, ["w"], "key"]
    for place, bad in [(0, 1 << 40), (1, -1), (2, {"GPU": -1}), (3, [1]), (4, "k" * 5000)]:
        options = good[:place] + [bad] + good[place + 1 :]
        frames = [header_of(17), packb([[], one, one, [b""], [], [[0, options]]])]
        assert outcome(frames) == "body"
    for amount in (float("nan"), float("inf")):
        options = [0, 0, {"GPU": amount}, [], ""]
        assert outcome([header_of(17), packb([[], one, one, [b""], [], [[0, options]]])]) == "body"


def test_a_reason_is_constant_though_the_text_is_not() -> None:
    texts = set()
    for junk in (b"\xc1", b"\xc1\xc1", b"\x91"):
        with pytest.raises(RemoteProtocolError) as caught:
            wire.decode([header_of(4), junk])
        assert caught.value.reason == "body-garbage"
        texts.add(str(caught.value))
    assert all("Beat" in text for text in texts)
    assert unpackb(header_of(4))[0] == MAGIC
