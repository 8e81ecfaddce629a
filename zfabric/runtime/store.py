"""The worker's values that are too large to ride along in rows.

A small one (up to 64 KiB) is bytes. A larger one lies in a memfd: slots get the descriptor and
map it, so no slot copies it and none can hurt another's view; the kernel frees it with the last
user, so a crash leaves nothing behind. Values are immutable once they are in.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence

from zfabric.codec import layout
from zfabric.core.transfer import Destination
from zfabric.errors import CodecError
from zfabric.runtime.slot_protocol import IN_BAND
from zfabric.runtime.slot_values import mapped

HUGE = 4 * 2**20
"""Bytes from which on it is worth asking for huge pages, of 2 MiB as a rule."""


class _File:
    """A memfd as a destination. Writing a cold file is twice as fast as touching its pages through
    a mapping, and lets other threads run meanwhile."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

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
    own. The memory lives as long as somebody has a view of it.
    """

    __slots__ = ("_area", "fd", "nbytes", "sizes")

    def __init__(
        self, sizes: Sequence[int], area: memoryview | None, fd: int = -1, nbytes: int = 0
    ) -> None:
        self.sizes = tuple(sizes)
        self.nbytes = nbytes if area is None else area.nbytes
        self.fd = fd
        self._area = area

    @classmethod
    def from_bytes(cls, sizes: Sequence[int], data: bytes | bytearray) -> Value:
        """Raises CodecError when the sizes do not add up to the data."""
        layout.split(memoryview(data), sizes)
        return cls(sizes, memoryview(data))

    @classmethod
    def from_file(cls, sizes: Sequence[int], fd: int) -> Value:
        """Takes over `fd`, a file with the whole area. Raises CodecError when it is too short."""
        try:
            nbytes = os.fstat(fd).st_size
            if layout.nbytes_of(sizes) > nbytes:
                raise CodecError(f"a file of {nbytes} bytes is too short for a value's frames")
        except BaseException:
            os.close(fd)
            raise
        return cls(sizes, None, fd, nbytes)

    @classmethod
    def allocate(cls, sizes: Sequence[int]) -> Value:
        """Room for a value whose bytes are yet to come, in `area`.

        Raises CodecError for sizes that make no sense, OSError when there is no memory.
        """
        nbytes = layout.nbytes_of(sizes)
        if nbytes <= IN_BAND:
            return cls(sizes, memoryview(bytearray(nbytes)))
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
        """Where to write its parts as they come."""
        return _Memory(self.area) if self.fd < 0 else _File(self.fd)

    @property
    def area(self) -> memoryview:
        """All its bytes. A file is mapped when this is first asked for: slots map it themselves,
        and Python's mmap keeps a second descriptor."""
        if self._area is None:
            try:
                area = mmap.mmap(self.fd, self.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
            except ValueError as exc:
                raise OSError(errno.EINVAL, f"a value cannot be mapped: {exc}") from exc
            self._area = memoryview(area)
        return self._area

    def unshared(self) -> Value:
        """The same bytes as memory that may be written to: what is written stays in this process,
        and costs a page each. This value gives its descriptor away for that."""
        if self.fd < 0:
            return self
        area = mapped(os.dup(self.fd))
        self.close()
        return Value(self.sizes, area)

    def close(self) -> None:
        """Give the descriptor back; a second time does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class Store:
    """Values by id.  n_values, nbytes: what it holds now. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._values: dict[int, Value] = {}
        self.nbytes = 0

    @property
    def n_values(self) -> int:
        """How many values it holds."""
        return len(self._values)

    def __contains__(self, id_: int) -> bool:
        return id_ in self._values

    def put(self, id_: int, value: Value) -> None:
        """Hold a value from now on; one that was there under the id goes."""
        with self._lock:
            self.free((id_,))
            self._values[id_] = value
            self.nbytes += value.nbytes

    def get(self, id_: int) -> Value | None:
        """The value, None if it is not here."""
        return self._values.get(id_)

    @contextlib.contextmanager
    def holding(self, id_: int) -> Iterator[Value | None]:
        """The value, which nobody frees meanwhile; None if it is not here."""
        with self._lock:
            yield self._values.get(id_)

    def chunk(self, id_: int, offset: int, length: int) -> memoryview | None:
        """Bytes [offset, offset + length) of a value's area, fewer at its end; no copy.

        None: it is not here, or the range makes no sense.
        """
        with self._lock:
            return self._part(id_, offset, length)

    def _part(self, id_: int, offset: int, length: int) -> memoryview | None:
        value = self._values.get(id_)
        if value is None or not 0 <= offset <= value.nbytes or length < 0:
            return None
        return value.area[offset : offset + length].toreadonly()

    def free(self, ids: Iterable[int]) -> None:
        """Forget values; those that are not here do not matter."""
        with self._lock:
            for id_ in ids:
                value = self._values.pop(id_, None)
                if value is not None:
                    self.nbytes -= value.nbytes
                    value.close()

    def clear(self) -> None:
        """Forget all values."""
        self.free(list(self._values))
