"""Where the frames of a value lie when they are kept or moved as one run of bytes.

A value is a list of frames: its pickle stream and its buffers. Stored, it is one contiguous
area in which each frame begins at a multiple of 64 bytes, so that an array mapped from there is
aligned as well as one from malloc. The sizes alone tell the whole layout.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from zfabric.errors import CodecError

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector register."""

_BELOW, _ABOVE = ALIGNMENT - 1, -ALIGNMENT

MAX_NBYTES = 1 << 46
"""No value is larger; a peer that says so lies."""


def nbytes_of(sizes: Sequence[int]) -> int:
    """Bytes of the whole area. The last frame is not padded.

    Raises CodecError when a size is negative or the sum is beyond any value.
    """
    end = 0
    for size in sizes:
        if size < 0:
            raise CodecError(f"a value with a frame of {size} bytes")
        end = (end + _BELOW & _ABOVE) + size
    if end > MAX_NBYTES:
        raise CodecError("the frames of a value are larger than any value may be")
    return end


def offsets_of(sizes: Sequence[int]) -> list[int]:
    """The first byte of each frame, in bytes from the area's beginning."""
    offsets = []
    end = 0
    for size in sizes:
        start = end + _BELOW & _ABOVE
        offsets.append(start)
        end = start + size
    return offsets


def split(area: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    """The frames of a value as views into its area. Raises CodecError when it is too short."""
    frames = []
    end = 0
    for size in sizes:
        if size < 0:
            raise CodecError(f"a value with a frame of {size} bytes")
        start = end + _BELOW & _ABOVE
        end = start + size
        frames.append(area[start:end])
    if end > area.nbytes:
        raise CodecError(f"{area.nbytes} bytes are too few for frames of {list(sizes)[:8]} bytes")
    return frames


def join(frames: Sequence[bytes | bytearray | memoryview]) -> list[bytes | bytearray | memoryview]:
    """The frames with the padding between them: what to write, in order, to lay them out."""
    parts: list[bytes | bytearray | memoryview] = []
    end = 0
    for frame in frames:
        gap = -end % ALIGNMENT
        if gap:
            parts.append(bytes(gap))
        parts.append(frame)
        end += gap + len(frame)
    return parts


class Laid:
    """Frames as if they were joined, without a copy of them: slices of it are parts to send.

    nbytes: of the whole area.  sizes: of the frames.
    """

    __slots__ = ("_frames", "_offsets", "file", "nbytes", "sizes")

    def __init__(self, frames: Sequence[bytes | bytearray | memoryview]) -> None:
        self._frames = [memoryview(frame).cast("B").toreadonly() for frame in frames]
        self.sizes = [len(frame) for frame in self._frames]
        self._offsets = offsets_of(self.sizes)
        self.nbytes = nbytes_of(self.sizes)
        self.file: object = None
        """The same bytes as somebody wrote them where others can map them."""

    @property
    def frames(self) -> list[memoryview]:
        """The frames, as flat read-only views."""
        return self._frames

    def __len__(self) -> int:
        return self.nbytes

    def __getitem__(self, part: slice) -> bytes | memoryview:
        """Bytes [start, stop): a view where they lie in one frame, else a copy of these few."""
        start, stop, _ = part.indices(self.nbytes)
        if start >= stop:
            return b""
        offsets, frames = self._offsets, self._frames
        # Of several frames that begin at one place all but the last are empty.
        index = bisect_right(offsets, start) - 1
        inner = start - offsets[index]
        if stop - offsets[index] <= len(frames[index]):
            return frames[index][inner : inner + stop - start]
        pieces: list[bytes | memoryview] = []
        at = start
        while at < stop:
            inner, frame = at - offsets[index], frames[index]
            piece: bytes | memoryview = frame[inner : inner + stop - at]
            if not len(piece):
                end = offsets[index + 1] if index + 1 < len(offsets) else stop
                piece = bytes(min(stop, end) - at)
                index += 1
            pieces.append(piece)
            at += len(piece)
        return b"".join(pieces)
