"""Values on disk: a few unnamed files, with a checksum for each value.

The files never have a name, so only this process can open them, and a kill leaves nothing behind.
A value is appended to the current file; a file whose values are all gone is closed, which frees its
space. So there is one descriptor per FILE_NBYTES on disk, however small the values are.
"""

from __future__ import annotations

import os
import tempfile
import threading
import zlib
from typing import NamedTuple

from zfabric.core.transfer import Destination
from zfabric.errors import CodecError

FILE_NBYTES = 256 * 2**20
"""Bytes after which a new file is begun."""

PIECE = 4 * 2**20


class _File:
    __slots__ = ("end", "fd", "n_values")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.end = 0
        self.n_values = 0


class Spilled(NamedTuple):
    """Where a value lies."""

    file: _File
    offset: int
    nbytes: int
    checksum: int


class SpillFiles:
    """directory: where; "" for the system's for temporary files. Any thread may use this."""

    def __init__(self, directory: str = "") -> None:
        self._directory = directory or tempfile.gettempdir()
        self._lock = threading.Lock()
        self._current: _File | None = None

    def write(self, data: memoryview) -> Spilled:
        """Put bytes on disk. Raises OSError when it is full or fails; nothing is kept then."""
        with self._lock:
            file = self._current
            if file is None or file.end >= FILE_NBYTES:
                file = self._current = _File(_unnamed(self._directory))
            offset = file.end
            file.end += data.nbytes
            file.n_values += 1
        checksum = 0
        try:
            for start in range(0, data.nbytes, PIECE):
                piece = data[start : start + PIECE]
                checksum = zlib.crc32(piece, checksum)
                at = offset + start
                while piece:
                    written = os.pwrite(file.fd, piece, at)
                    at += written
                    piece = piece[written:]
        except OSError:
            self._let_go(file)
            raise
        return Spilled(file, offset, data.nbytes, checksum)

    def read(self, part: Spilled, to: Destination) -> None:
        """Bring bytes back. Raises CodecError when they are not what was written, OSError."""
        checksum = at = 0
        while at < part.nbytes:
            piece = os.pread(part.file.fd, min(PIECE, part.nbytes - at), part.offset + at)
            if not piece:
                raise CodecError("a value on disk is shorter than it was")
            checksum = zlib.crc32(piece, checksum)
            to[at : at + len(piece)] = piece
            at += len(piece)
        if checksum != part.checksum:
            raise CodecError("a value on disk is not what was written there")

    def free(self, part: Spilled) -> None:
        """Forget a value. Once for each."""
        self._let_go(part.file)

    def _let_go(self, file: _File) -> None:
        with self._lock:
            file.n_values -= 1
            if not file.n_values:
                if self._current is file:
                    self._current = None
                os.close(file.fd)


def _unnamed(directory: str) -> int:
    """A file without a name. Raises OSError."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError):  # not every file system has such files
        fd, path = tempfile.mkstemp(prefix="zfabric-", dir=directory)
        os.unlink(path)
        return fd


def usual_limit() -> int:
    """Bytes: six tenths of this host's memory, or of what its container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            total = min(total, int(file.read()))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return total * 6 // 10
