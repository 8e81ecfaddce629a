"""Values on disk, or packed in memory: a few unnamed files that hold many values each.

The files never have a name, so only this process can open them, and a kill leaves nothing behind.
A value is appended to the current file; a file whose values are all gone is closed, which frees its
space. So there is one descriptor per FILE_NBYTES on disk, however small the values are.

In memory the same thing packs small values, each of which would take a descriptor of its own.
There a freed value's pages are given back at once, and nothing needs a checksum.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import threading
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from zfabric.core.transfer import Destination
from zfabric.errors import CodecError

FILE_NBYTES = 256 * 2**20
"""Bytes after which a new file is begun."""

PIECE = 4 * 2**20

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_fallocate: Any = None
"""glibc's, once it was looked for; False where there is none."""


class _File:
    __slots__ = ("end", "fd", "n_values")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.end = 0
        self.n_values = 0


class Spilled(NamedTuple):
    """Where a value lies."""

    files: SpillFiles
    file: _File
    offset: int
    nbytes: int
    checksum: int


class SpillFiles:
    """directory: where; "" for the system's for temporary files.  in_memory: there, and nowhere
    else. Any thread may use this.

    Checksums begin with a number drawn here, so that bytes of another run do not fit them.
    """

    def __init__(self, directory: str = "", in_memory: bool = False) -> None:
        self._directory = directory
        self._in_memory = in_memory
        self._seed = int.from_bytes(os.urandom(8), "little")
        self._lock = threading.Lock()
        self._current: _File | None = None

    def write(self, data: memoryview) -> Spilled:
        """Put bytes on disk. Raises OSError when it is full or fails; nothing is kept then."""
        with self._lock:
            file = self._current
            if file is None or file.end >= FILE_NBYTES:
                file = self._current = _File(
                    os.memfd_create("zfabric-pack", os.MFD_CLOEXEC)
                    if self._in_memory
                    else _unnamed(self._directory)
                )
            offset = file.end
            file.end += data.nbytes
            if self._in_memory:
                file.end = _whole_pages(file.end)
            file.n_values += 1
        checksum = self._seed
        try:
            for start in range(0, data.nbytes, PIECE):
                piece = data[start : start + PIECE]
                if not self._in_memory:
                    checksum = xxh3_64_intdigest(piece, checksum)
                at = offset + start
                while piece:
                    written = os.pwrite(file.fd, piece, at)
                    at += written
                    piece = piece[written:]
        except OSError:
            self._let_go(file)
            raise
        return Spilled(self, file, offset, data.nbytes, checksum)

    def read(self, part: Spilled, to: Destination) -> None:
        """Bring bytes back. Raises CodecError when they are not what was written, OSError."""
        checksum, at = self._seed, 0
        while at < part.nbytes:
            length = min(PIECE, part.nbytes - at)
            piece = os.pread(part.file.fd, length, part.offset + at)
            if len(piece) < length:
                raise CodecError("a value on disk is shorter than it was")
            if not self._in_memory:
                checksum = xxh3_64_intdigest(piece, checksum)
            to[at : at + len(piece)] = piece
            at += len(piece)
        if checksum != part.checksum:
            raise CodecError("a value on disk is not what was written there")

    def free(self, part: Spilled) -> None:
        """Forget a value. Once for each."""
        with contextlib.suppress(OSError, ValueError):  # then they go with the file
            if self._in_memory:
                _give_back(part)
            else:
                _punch(part.file.fd, part.offset, part.nbytes)
        self._let_go(part.file)

    def _let_go(self, file: _File) -> None:
        with self._lock:
            file.n_values -= 1
            if not file.n_values:
                if self._current is file:
                    self._current = None
                os.close(file.fd)


def why_unsafe(directory: str) -> str:
    """Why values should not go to this directory: others could put files in place of ours. "" when
    they could not; a directory that is missing is for those to tell who write to it."""
    try:
        mode = os.stat(directory).st_mode
    except OSError:
        return ""
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
        return (
            f"the spill directory {directory} may be written by others: "
            f"chmod go-w {directory}, or name another one"
        )
    return ""


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _give_back(part: Spilled) -> None:
    """Return a packed value's pages to the kernel; the file keeps its length."""
    nbytes = _whole_pages(part.nbytes)
    if os.fstat(part.file.fd).st_size < part.offset + nbytes:
        nbytes = part.nbytes
    with mmap.mmap(part.file.fd, nbytes, offset=part.offset) as pages:
        pages.madvise(mmap.MADV_REMOVE)


def _punch(fd: int, offset: int, nbytes: int) -> None:
    """Give these bytes of a file on disk back, where its file system can; it keeps its length."""
    global _fallocate
    if _fallocate is None:
        import ctypes  # as tempfile below

        _fallocate = getattr(ctypes.CDLL(None), "fallocate64", False)
        if _fallocate:
            _fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if _fallocate and nbytes:
        _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, nbytes)


def _unnamed(directory: str) -> int:
    """A file without a name. Raises OSError."""
    import tempfile  # 10 ms that a worker which never spills need not pay

    directory = directory or tempfile.gettempdir()
    trouble = why_unsafe(directory)
    if trouble:
        raise PermissionError(errno.EPERM, trouble)
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError):  # not every file system has such files
        fd, path = tempfile.mkstemp(prefix="zfabric-", dir=directory)
        os.unlink(path)
        return fd
