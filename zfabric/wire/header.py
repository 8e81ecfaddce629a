"""The header: the first frame of each message, 15 to 45 bytes.

    [magic, protocol version, kind, session token, epoch, sequence number, ack]

The places of these seven never change, nor do Hello and Refuse, so that any two versions can
tell each other why they do not talk.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from msgpack import packb, unpackb

from zfabric.errors import RemoteProtocolError

MAGIC = 0x7AFB
"""No other protocol's first bytes decode to a msgpack array that begins with this number."""

PROTOCOL = 2
"""Raised by one with each change that an older peer would misread."""

MAX_HEADER = 64
"""Bytes. Seven integers need at most 1 + 7 * 9."""

MAX_FRAMES = 8
"""Frames per message: header, body, and what a Relay carries."""

_ONLY_INT = {int}


class Header(NamedTuple):
    """What a message says before anything of its meaning is read."""

    kind: int
    token: int
    """The session it belongs to; 0 on data channels."""
    epoch: int
    """The broker's incarnation as the sender knows it; 0 before Welcome."""
    seq: int
    """1, 2, ... for messages in sequence; 0 for the others."""
    ack: int
    """The highest number that the sender has received in sequence."""
    version: int = PROTOCOL


_SEQ_AND_ACK = Struct(">BQBQ")
_UINT64 = 0xCF
"""msgpack's mark of an unsigned 64-bit integer."""


def header_start(kind: int, token: int, epoch: int) -> bytes:
    """What all headers of a session's messages of one kind begin with."""
    parts: bytes = packb((MAGIC, PROTOCOL, kind, token, epoch))
    return bytes([parts[0] + 2]) + parts[1:]  # an array of two more


def header_end(seq: int, ack: int) -> bytes:
    """The rest of a header."""
    return _SEQ_AND_ACK.pack(_UINT64, seq, _UINT64, ack)


def encode_header(kind: int, token: int, epoch: int, seq: int, ack: int) -> bytes:
    """The header's frame, in this protocol version."""
    return header_start(kind, token, epoch) + header_end(seq, ack)


def decode_header(frame: bytes) -> Header:
    """Raises RemoteProtocolError on anything that is not a header of ours, of any version."""
    if len(frame) > MAX_HEADER:
        raise RemoteProtocolError("header-too-long", f"a header of {len(frame)} bytes")
    try:
        parts = unpackb(frame)
    except Exception as exc:  # msgpack raises several unrelated kinds on garbage
        raise RemoteProtocolError("header-garbage", str(exc)) from None
    if type(parts) is not list or len(parts) != 7 or parts[0] != MAGIC:
        raise RemoteProtocolError("magic", "not a message of zfabric")
    if set(map(type, parts)) != _ONLY_INT or min(parts) < 0:
        raise RemoteProtocolError("header-field", "a header field is not an unsigned integer")
    _, version, kind, token, epoch, seq, ack = parts
    return Header(kind, token, epoch, seq, ack, version)
