"""Frames through blosc and back.

blosc shuffles the bytes of the items (all first bytes, then all second bytes, ...) before lz4 sees
them, which is what makes floats compressible at memory speed. It gives up the GIL only after
`set_releasegil(True)`, and then takes its threads per call: few, since several frames are usually
under way at once.

A compressed frame has a header of its own that travels beside it, 24 bytes:

    "ZC", header version: u8, codec's format version: u8, codec name: 12 bytes padded with zeros,
    raw size: u64 (little-endian)

A receiver believes neither it nor the header inside the blosc data: both sizes must agree, and be
within its own limit, before it takes memory.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pickle import PickleBuffer
from struct import Struct
from typing import Any, NamedTuple

from zfabric.codec.serialise import Buffer
from zfabric.errors import CodecError

CODEC = "blosc-lz4"
HEADER_SIZE = 24

_HEADER = Struct("<2sBB12sQ")
_MAGIC = b"ZC"
_VERSION = 1
_BLOSC_HEADER = 16  # bytes; blosc's own, at the front of its data
_BLOSC_FORMAT = 2  # its first byte
_LEVEL = 5

WORST_RATIO = 0.9
"""What the finished frame may take of its raw size; a sample can be wrong, this is measured."""


class Compressed(NamedTuple):
    """A frame that was compressed: what to send, and the header that must go with it."""

    header: bytes
    data: bytes


class Header(NamedTuple):
    """What a compressed frame says of itself."""

    codec: str
    codec_version: int
    raw_nbytes: int

    def pack(self) -> bytes:
        """As bytes for the wire."""
        name = self.codec.encode()
        return _HEADER.pack(_MAGIC, _VERSION, self.codec_version, name, self.raw_nbytes)


@lru_cache(None)
def _blosc() -> Any:
    import blosc

    blosc.set_releasegil(True)
    # Half of a small machine, two threads of a large one: the rest belongs to the tasks.
    blosc.set_nthreads(1 if (os.cpu_count() or 1) < 4 else 2)
    return blosc


def codecs() -> tuple[str, ...]:
    """Names of what this side can decompress, for a peer to choose from; may be empty."""
    try:
        _blosc()
    except ImportError:
        return ()
    return (CODEC,)


def compressed_size(sample: Buffer, itemsize: int) -> int:
    """Bytes that the sample takes when compressed: what the sampler asks for."""
    return len(_compress(memoryview(sample), itemsize))


def compress(buffer: Any, itemsize: int) -> Compressed | None:
    """The frame compressed, or None where that does not pay: send it raw then.

    buffer: contiguous, of any shape.  itemsize: bytes of an item, >= 1.
    None also for frames that blosc does not take: empty ones and those of 2 GiB and more.
    """
    flat = PickleBuffer(buffer).raw()
    blosc = _blosc()
    if not len(flat) or len(flat) > blosc.MAX_BUFFERSIZE:
        return None
    data = _compress(flat, itemsize)
    if len(data) + HEADER_SIZE > WORST_RATIO * len(flat):
        return None
    return Compressed(Header(CODEC, _BLOSC_FORMAT, len(flat)).pack(), data)


def _compress(flat: memoryview, itemsize: int) -> bytes:
    blosc = _blosc()
    if not 1 < itemsize <= blosc.MAX_TYPESIZE:
        itemsize = 1
    shuffle = blosc.SHUFFLE if itemsize > 1 else blosc.NOSHUFFLE
    data: bytes = blosc.compress(flat, itemsize, _LEVEL, shuffle, "lz4")
    return data


def parse_header(header: Buffer) -> Header:
    """The header of a compressed frame. Raises CodecError if it is none that we know."""
    if len(header) != HEADER_SIZE:
        raise CodecError(f"a compression header has {HEADER_SIZE} bytes, not {len(header)}")
    magic, version, codec_version, name, raw_nbytes = _HEADER.unpack(header)
    if magic != _MAGIC or version != _VERSION:
        raise CodecError(f"an unknown compression header, version {version}")
    if name != CODEC.encode().ljust(12, b"\0") or codec_version != _BLOSC_FORMAT:
        raise CodecError(f"an unknown codec {name!r}, version {codec_version}")
    return Header(CODEC, codec_version, raw_nbytes)


def raw_nbytes(header: Buffer, data: Buffer, limit: int) -> int:
    """Bytes that the frame will take when decompressed: 1 .. limit, safe to allocate.

    Raises CodecError if the two headers disagree with each other, with the data or the limit.
    """
    nbytes = parse_header(header).raw_nbytes
    if not 0 < nbytes <= limit:
        raise CodecError(f"a compressed frame says it has {nbytes} bytes; the limit is {limit}")
    if len(data) < _BLOSC_HEADER:
        raise CodecError(f"compressed data of {len(data)} bytes is too short")
    blosc = _blosc()
    front = bytes(memoryview(data)[:_BLOSC_HEADER])
    inner, packed, _ = blosc.get_cbuffer_sizes(front)
    if front[0] != _BLOSC_FORMAT or inner != nbytes or packed != len(data):
        raise CodecError(
            f"a compressed frame of {len(data)} bytes says {nbytes} bytes raw, "
            f"but its data say {inner} raw, {packed} packed"
        )
    if not blosc.cbuffer_validate(data):
        raise CodecError("compressed data that are not safe to decompress")
    return nbytes


def decompress_into(header: Buffer, data: Buffer, dest: Buffer) -> None:
    """Decompress one frame into `dest`, which is writable and as long as the raw frame.

    Raises CodecError if anything does not fit; `dest` may then hold part of the frame.
    """
    into = memoryview(dest)
    if into.readonly or not into.c_contiguous:
        raise CodecError("the place to decompress into is not writable, contiguous memory")
    nbytes = raw_nbytes(header, data, limit=into.nbytes)
    if nbytes != into.nbytes:
        raise CodecError(f"a frame of {nbytes} bytes does not fill a place of {into.nbytes}")
    blosc = _blosc()
    place = (ctypes.c_char * nbytes).from_buffer(into)
    try:
        written = blosc.decompress_ptr(data, ctypes.addressof(place))
    except blosc.blosc_extension.error as exc:
        raise CodecError(f"compressed data are damaged: {exc}") from exc
    if written != nbytes:
        raise CodecError(f"compressed data gave {written} of {nbytes} bytes")
