"""One value that is too large to ride along in rows: its frames, and the memory that they lie in.

A small one (up to 64 KiB) is bytes. A larger one lies in a memfd: slots get the descriptor and
map it, so no slot copies it and none can hurt another's view; the kernel frees it with the last
user, so a crash leaves nothing behind. Values are immutable once they are in.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import sys
import threading
from collections.abc import Sequence

from zfabric.codec import layout
from zfabric.core.transfer import Destination
from zfabric.errors import CodecError
from zfabric.runtime.segments import SMALLEST, Segments
from zfabric.runtime.slabs import whole_pages
from zfabric.runtime.slot_protocol import IN_BAND
from zfabric.runtime.slot_values import mapped
from zfabric.runtime.spill import Spilled

HUGE = 4 * 2**20
"""Bytes from which on it is worth asking for huge pages, of 2 MiB as a rule, and freeing takes the
kernel a millisecond."""

_serials = itertools.count(1)


class _File:
    """A memfd as a destination. Writing a cold file is twice as fast as touching its pages through
    a mapping, and lets other threads run meanwhile.

    is_own: whether the descriptor is closed with this."""

    __slots__ = ("_fd", "_is_own")

    def __init__(self, fd: int, is_own: bool = False) -> None:
        self._fd = fd
        self._is_own = is_own

    def __del__(self) -> None:
        if self._is_own:
            os.close(self._fd)

    def __setitem__(self, part: slice, data: bytes | memoryview) -> None:
        view = memoryview(data)
        at = part.start
        while view:
            written = os.pwrite(self._fd, view, at)
            at += written
            view = view[written:]


class _Memory:
    """A memoryview as a destination. numpy copies without the interpreter's lock, so where the
    process has loaded it anyway, other threads run meanwhile."""

    __slots__ = ("_area", "_numpy")

    def __init__(self, area: memoryview) -> None:
        numpy = sys.modules.get("numpy")
        self._numpy = numpy if hasattr(numpy, "frombuffer") else None
        self._area = area
        if self._numpy is not None:
            self._area = self._numpy.frombuffer(area, "u1")

    def __setitem__(self, part: slice, data: bytes | memoryview) -> None:
        if self._numpy is not None:
            data = self._numpy.frombuffer(data, "u1") if len(data) else data
        if len(data):
            self._area[part] = data


class Value:
    """One value: its frames' sizes in bytes, and their area as `codec.layout` lays them out.

    nbytes: of the area.  fd: the memfd with it, -1 for a small one, which is in memory of its
    own. The memory lives as long as somebody has a view of it.  offset: where in it the area
    begins.  slab: (its number, bytes of it that are in use) of a file that holds more values.
    serial: names that memory: it is another one after a stay on disk.  is_shown: whether a slot
    keeps it mapped, perhaps.
    """

    __slots__ = (
        "_area",
        "_writer",
        "fd",
        "is_shown",
        "lock",
        "nbytes",
        "offset",
        "serial",
        "sizes",
        "slab",
        "spilled",
    )

    def __init__(
        self, sizes: Sequence[int], area: memoryview | None, fd: int = -1, nbytes: int = 0
    ) -> None:
        self.sizes = tuple(sizes)
        self.nbytes = nbytes if area is None else area.nbytes
        self.fd = fd
        self.offset = 0
        self.slab: tuple[int, int] | None = None
        self.serial = next(_serials)
        self.is_shown = False
        self._area = area
        self._writer: _File | None = None
        self.lock = threading.Lock()
        """Held while it moves between memory and disk. Never taken by who has a store's lock."""
        self.spilled: Spilled | None = None
        """Where it is on disk, when it is not in memory."""

    @classmethod
    def from_bytes(cls, sizes: Sequence[int], data: bytes | bytearray) -> Value:
        """Raises CodecError when the sizes do not add up to the data."""
        layout.split(memoryview(data), sizes)
        return cls(sizes, memoryview(data))

    @classmethod
    def from_file(cls, sizes: Sequence[int], fd: int) -> Value:
        """Takes over `fd`, a file that begins with the whole area. Raises CodecError when it does
        not, being too short."""
        try:
            nbytes = layout.nbytes_of(sizes)
            size = os.fstat(fd).st_size
            if nbytes > size:
                raise CodecError(f"a file of {size} bytes is too short for a value's frames")
        except BaseException:
            os.close(fd)
            raise
        return cls(sizes, None, fd, nbytes)

    @classmethod
    def from_slab(cls, sizes: Sequence[int], fd: int, offset: int, is_whole: bool = False) -> Value:
        """As `from_file`, for a file in which the area begins at `offset` and others follow.

        is_whole: all of the file is in use, for all that is known; else it is up to here.
        """
        try:
            nbytes, there = layout.nbytes_of(sizes), os.fstat(fd)
            if offset < 0 or offset % mmap.PAGESIZE or not 0 < nbytes <= there.st_size - offset:
                raise CodecError(f"a slab of {there.st_size} bytes has no value at {offset}")
        except BaseException:
            os.close(fd)
            raise
        value = cls(sizes, None, fd, nbytes)
        value.offset = offset
        value.slab = there.st_ino, there.st_size if is_whole else whole_pages(offset + nbytes)
        return value

    @classmethod
    def allocate(cls, sizes: Sequence[int], segments: Segments | None = None) -> Value:
        """Room for a value whose bytes are yet to come, in `destination`.

        segments: gives the memory of a large one, if it can.
        Raises CodecError for sizes that make no sense, OSError when there is no memory.
        """
        nbytes = layout.nbytes_of(sizes)
        if nbytes <= IN_BAND:
            return cls(sizes, memoryview(bytearray(nbytes)))
        if segments is not None and nbytes >= SMALLEST:
            with contextlib.suppress(OSError):
                writer, fd = segments.take(nbytes)
                file = _File(writer, is_own=True)
                value = cls.from_file(sizes, fd)
                value._writer = file
                return value
        fd = os.memfd_create("zfabric-value", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise
        return cls.from_file(sizes, fd)

    @classmethod
    def private(cls, sizes: Sequence[int]) -> Value:
        """As `allocate`, in memory of this process alone, writable for good: for a client.

        Huge pages where the kernel gives them: they take a third of the time to fill.
        """
        nbytes = layout.nbytes_of(sizes)
        if nbytes <= IN_BAND:
            return cls(sizes, memoryview(bytearray(nbytes)))
        try:
            area = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as exc:
            raise OSError(errno.ENOMEM, f"no {nbytes} bytes of memory for a value") from exc
        if nbytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                area.madvise(mmap.MADV_HUGEPAGE)
        return cls(sizes, memoryview(area))

    @property
    def destination(self) -> Destination:
        """Where to write its parts as they come. To be asked for once."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            return writer
        return _Memory(self.area) if self.fd < 0 else _File(self.fd)

    @property
    def area(self) -> memoryview:
        """All its bytes. A file is mapped when this is first asked for: slots map it themselves,
        and Python's mmap keeps a second descriptor."""
        if self._area is None:
            if self.fd < 0:
                raise OSError(errno.EBADF, "a value is not in memory")
            try:
                area = mmap.mmap(
                    self.fd, self.nbytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=self.offset
                )
            except ValueError as exc:
                raise OSError(errno.EINVAL, f"a value cannot be mapped: {exc}") from exc
            self._area = memoryview(area)
        return self._area

    def chunk(self, offset: int, length: int) -> memoryview | None:
        """Bytes [offset, offset + length) of the area, fewer at its end; no copy.

        None: the range makes no sense. Raises OSError when it cannot be mapped.
        """
        if not 0 <= offset <= self.nbytes or length < 0:
            return None
        return self.area[offset : offset + length].toreadonly()

    def read(self) -> bytes:
        """All its bytes, as a copy, without mapping a file. Raises OSError."""
        if self._area is not None or self.fd < 0:
            return bytes(self.area)
        parts, at = [], 0
        while at < self.nbytes:
            part = os.pread(self.fd, self.nbytes - at, self.offset + at)
            if not part:
                raise OSError(errno.EIO, "a value's file is shorter than the value")
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def unshared(self) -> Value:
        """The same bytes as memory that may be written to: what is written stays in this process,
        and costs a page each. This value gives its descriptor away for that."""
        if self.fd < 0:
            return self
        nbytes = self.nbytes if self.slab else 0
        area = mapped(os.dup(self.fd), nbytes, self.offset)
        self.close()
        return Value(self.sizes, area)

    def copied(self) -> Value:
        """The same bytes in memory of this process alone; this value gives its descriptor back.
        Raises OSError."""
        fresh = Value.private(self.sizes)
        left, at = fresh.area, self.offset
        while left:
            n = os.preadv(self.fd, [left], at)
            if not n:
                raise OSError(errno.EIO, "a value's file is shorter than the value")
            left, at = left[n:], at + n
        self.close()
        return fresh

    @property
    def is_closed(self) -> bool:
        """Whether its descriptor was given back and it was not mapped."""
        return self.fd < 0 and self._area is None

    def leave_memory(self, part: Spilled) -> tuple[int, memoryview | None]:
        """It is on disk now; whoever has a view of the memory keeps it.

        Returns its descriptor, which is the caller's to close, and mapping: for a large value
        either takes the kernel milliseconds, for which nobody should wait at a lock.
        """
        gone = self.fd, self._area
        self.fd, self._area = -1, None
        self.offset, self.slab = 0, None
        self.spilled = part
        return gone

    def enter_memory(self, fresh: Value) -> None:
        """Take over the memory of a value that was read from disk."""
        self.fd, fresh.fd = fresh.fd, -1
        self.serial = fresh.serial
        self._area = fresh._area
        self.spilled = None

    def close(self) -> None:
        """Give the descriptor back; a second time does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __del__(self) -> None:
        self.close()
