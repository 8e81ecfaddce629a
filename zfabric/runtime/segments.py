"""Memory for large values that several processes map, used again while its pages are warm.

The kernel makes the pages of a fresh memfd one by one: 2.2 GB/s, where writing to one that was
used before reaches 4. So a process keeps the files that it has made, up to a bound, and writes the
next value over one that nobody has any more.

**Who has it, the kernel knows.** A value is handed out by a descriptor of its own, opened for
reading only, and with a shared lock on it (`flock`). Whoever gets that descriptor, or a copy of
it, or maps it, keeps the lock, also on the way through a socket; the last one that lets go, or
dies, frees it. A file is written over only when its maker can lock it alone. No process has to
tell another one, and none can forget to.

The file cannot shrink or grow (it is sealed), so nobody who has mapped it can be killed by that;
and nobody but its maker has it open for writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from time import monotonic

SMALLEST = 2**20
"""Bytes of a value from which on its memory is worth keeping."""

MOST_FILES = 64
"""That are kept: each takes a descriptor, and a user's program may have 1024 of them in all."""

KEEP_S = 10.0
"""For which memory is kept that nobody asks for: between two values of one program, not longer."""

FIXED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def size_class(nbytes: int) -> int:
    """The size of a file for so many bytes: at most an eighth more, in eight steps per doubling."""
    step = max(4096, 1 << max(0, (nbytes - 1).bit_length() - 4))
    return -(-nbytes // step) * step


class Segments:
    """What one process has made. Any thread may use it, but no forked child.

    most: bytes that are kept.  nbytes: that are kept now, whether somebody has them or not.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: list[tuple[int, int]] = []
        """(descriptor, bytes), the least recently used first."""
        self._pid = os.getpid()
        self._used_at = 0.0
        self.nbytes = 0

    def take(self, nbytes: int) -> tuple[int, int]:
        """(writer, reader): two descriptors of a file of `nbytes` or a little more, both the
        caller's to close. The file is theirs while the reader, or a copy or mapping of it, lives.

        What lies in it is of no meaning. Raises OSError when there is no memory, or no /proc.
        """
        size = size_class(nbytes)
        with self._lock:
            self._used_at = monotonic()
            for index, (fd, each) in enumerate(self._kept):
                if each == size and self._is_free(fd):
                    self._kept.append(self._kept.pop(index))
                    return _handed_out(fd)
            fd = os.memfd_create("zfabric-value", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(fd, size)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, FIXED)
                both = _handed_out(fd)
            except BaseException:
                os.close(fd)
                raise
            self._kept.append((fd, size))
            self.nbytes += size
            self._trim(self._most)
            return both

    def _is_free(self, fd: int) -> bool:
        if os.getpid() != self._pid:  # a parent's: its descriptors are no proof here
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(fd, fcntl.LOCK_UN)
        except OSError:
            return False
        return True

    def _trim(self, most: int) -> None:
        while self.nbytes > most or len(self._kept) > MOST_FILES:
            fd, size = self._kept.pop(0)
            os.close(fd)
            self.nbytes -= size

    def tick(self, now: float) -> float | None:
        """Let go of what was kept for long enough. In how many seconds to call it again, None for
        not before the next take()."""
        with self._lock:
            left_s = self._used_at + KEEP_S - now
            if left_s <= 0:
                self._trim(0)
            return left_s if self._kept else None

    def close(self) -> None:
        """Keep nothing any more. What others have stays theirs; take() works on."""
        with self._lock:
            self._trim(0)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self._trim(0)


def _handed_out(fd: int) -> tuple[int, int]:
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(reader, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.dup(fd), reader
    except BaseException:
        os.close(reader)
        raise


def is_settled(fd: int) -> bool:
    """Whether others may map a file without fear: it has its size for good, and it is either
    sealed against writing or was handed out for reading by one who keeps to the lock."""
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if seals & FIXED != FIXED:
        return False
    is_reader = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    return is_reader or bool(seals & fcntl.F_SEAL_WRITE)
