"""Values as a slot takes them in and gives them out: inline blobs, laid-out areas, files."""

from __future__ import annotations

import contextlib
import fcntl
import marshal
import mmap
import os
from collections.abc import Sequence
from typing import Any

from zfabric.codec import layout
from zfabric.codec.serialise import loads, loads_inline, pack, unpack
from zfabric.messages import STORED, VALUE
from zfabric.runtime.segments import SMALLEST, Segments
from zfabric.runtime.slabs import LARGEST, Slabs
from zfabric.runtime.slot_protocol import IN_BAND

MAX_PARTS = 512
"""Buffers per writev; the kernel takes 1024."""

MISSING = object()
"""Stands for the values of a row of which one was not left in the slot."""


class InFile:
    """A stored value in a memfd that is still the slot's. sizes: of its frames, in bytes."""

    __slots__ = ("fd", "sizes")

    def __init__(
        self, frames: Sequence[Any], sizes: list[int], segments: Segments | None = None
    ) -> None:
        """segments: gives the memory of a large one, if it can.

        Raises OSError when there is no memory; nothing is left then.
        """
        self.sizes = sizes
        nbytes = layout.nbytes_of(sizes)
        if segments is not None and nbytes >= SMALLEST:
            with contextlib.suppress(OSError):
                writer, self.fd = segments.take(nbytes)
                try:
                    write_all(writer, layout.join(frames))
                    return
                except BaseException:
                    self.close()
                    raise
                finally:
                    os.close(writer)
        self.fd = os.memfd_create("zfabric-value", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            write_all(self.fd, layout.join(frames))
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, sealed())
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Close the descriptor; a second time does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            self.close()


def sealed() -> int:
    """The seals of a memfd whose bytes others may map without fear."""
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def write_all(fd: int, parts: Sequence[Any], offset: int = 0) -> None:
    """Write all parts, one behind the other from `offset` on. Writing a cold file is twice as fast
    as touching it through a mapping, for the kernel then takes no fault per page."""
    views = [memoryview(part) for part in parts if len(part)]
    at, place = 0, offset
    while at < len(views):
        written = os.pwritev(fd, views[at : at + MAX_PARTS], place)
        place += written
        while at < len(views) and written >= len(views[at]):
            written -= len(views[at])
            at += 1
        if written:
            views[at] = views[at][written:]


def outlay(frames: list[Any], inline_limit: int, slabs: Slabs | None = None) -> tuple[int, Any]:
    """(status, payload) of a result that may be too large to ride along.

    The payload is bytes, or an InFile for what is too large for the socket too.
    slabs: where those lie that are not much too large, if that can be.
    """
    sizes = [len(frame) for frame in frames]
    nbytes = layout.nbytes_of(sizes)
    if nbytes <= inline_limit:
        blob = pack(frames)
        if len(blob) <= inline_limit:
            return VALUE, blob
    if nbytes <= IN_BAND - 1024 and len(sizes) < 64:
        return STORED, marshal.dumps((sizes, b"".join(layout.join(frames))), 2)
    if slabs is not None and nbytes <= LARGEST:
        with contextlib.suppress(OSError):
            return STORED, marshal.dumps((sizes, slabs.write(frames, nbytes, write_all)), 2)
    return STORED, InFile(frames, sizes)


def mapped(fd: int, nbytes: int = 0, offset: int = 0) -> memoryview:
    """Part of a file as private memory, writable: what is written stays here. Closes `fd`.

    nbytes: 0 for all that is there.  offset: a multiple of a page.
    """
    try:
        nbytes = nbytes or os.fstat(fd).st_size - offset
        if not nbytes:
            return memoryview(bytearray())
        access = mmap.PROT_READ | mmap.PROT_WRITE
        return memoryview(mmap.mmap(fd, nbytes, mmap.MAP_PRIVATE, access, offset=offset))
    finally:
        os.close(fd)


def mapped_shared(fd: int, nbytes: int, offset: int = 0) -> memoryview:
    """Part of a file as memory that is shared, and so read-only. Closes `fd`.

    nbytes: more than 0.  offset: a multiple of a page.
    """
    try:
        return memoryview(mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset))
    finally:
        os.close(fd)


def inlay(places: Sequence[Any], kept: dict[int, bytes], args_last: bool) -> tuple[Any, Any]:
    """(values, frames of the call) from the places that a row names.

    places: as core.supervisor_effects.SendRows tells, with (sizes, area) for stored values.
    args_last: the last place holds the call's arguments; else the frames returned are None.
    Returns (MISSING, None) when a value was not left here.
    """
    values: list[Any] = []
    last = len(places) - 1
    for index, place in enumerate(places):
        if type(place) is int:
            place = kept.pop(place, None)
            if place is None:
                return MISSING, None
        if type(place) is bytes:
            if args_last and index == last:
                return values, unpack(place)
            values.append(loads_inline(place))
        else:
            sizes, area = place
            frames = layout.split(area, sizes)
            if args_last and index == last:
                return values, frames
            values.append(loads(frames, writable=not area.readonly))
    return values, None
