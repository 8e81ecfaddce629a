"""Large frames between two processes of one host: the reader fetches them from the writer's memory.

Linux lets a process read the memory of another one of the same user (process_vm_readv): one copy
from where a frame lies to where it will live, without the kernel's network buffers, and without
any of the writer's time, so it does not matter that the writer's Python is busy. Whether that is
possible is tried out for each connection, since containers with their own process numbers, other
users and hardened kernels (yama's ptrace_scope) say no; then frames go as chunks by ZeroMQ.

**What a reader gets is what was meant.** The writer keeps a frame until the reader says that it has
it. But a writer may give up (a comm is aborted) while the reader has yet to look, and then the
memory may hold anything. So each end of a comm has a cell, a random word in memory that is never
freed, and wipes it *before* it drops frames. The reader fetches the frame first and the word
after it, in one call: if the word is still there, the frame was there all the time. The same word
shows at the beginning that a number names the process that is meant, in this very namespace.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
from typing import Any

_OFFER = struct.Struct("<QQ16s")
_WORD = 16
_PAGE = 4096


class _Span(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def _system_call() -> Any:
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None), "process_vm_readv", None)
    if call is not None:
        spans = ctypes.POINTER(_Span)
        unsigned = ctypes.c_ulong
        call.argtypes = (ctypes.c_int, spans, unsigned, spans, unsigned, unsigned)
        call.restype = ctypes.c_ssize_t
    return call


_readv = _system_call()

_pages: list[Any] = []  # never freed: a late reader may still look at a cell
_free: list[tuple[Any, int]] = []  # page, offset
_lock = threading.Lock()
_mute: set[int] = set()  # processes that could be read at first and then could not


class Cell:
    """A word of ours that a neighbour can read; it is gone before the frames are."""

    def __init__(self) -> None:
        with _lock:
            if not _free:
                page = ctypes.create_string_buffer(_PAGE)
                _pages.append(page)
                _free.extend((page, start) for start in range(0, _PAGE, _WORD))
            self._place: tuple[Any, int] | None = _free.pop()
        page, start = self._place
        word = os.urandom(_WORD)
        page[start : start + _WORD] = word
        self.offer = _OFFER.pack(os.getpid(), ctypes.addressof(page) + start, word)
        """What the other end needs for a `Neighbour`."""

    def wipe(self) -> None:
        """Call before frames are dropped that may still be read. Twice is fine."""
        with _lock:
            place, self._place = self._place, None
            if place is not None:
                page, start = place
                page[start : start + _WORD] = bytes(_WORD)
                _free.append(place)


class Neighbour:
    """A process of this host whose memory we may read. Raises OSError when it is none."""

    def __init__(self, offer: Any) -> None:
        if _readv is None or len(offer) != _OFFER.size:
            raise OSError("no memory is offered that could be read here")
        self.process, self._cell, self._word = _OFFER.unpack(offer)
        if self.process in _mute or not 0 < self.process < 1 << 31:
            raise OSError(f"process {self.process} cannot be read")
        self._seen = ctypes.create_string_buffer(_WORD)
        self._fetch(0, 0, 0)

    def fetch(self, address: int, place: memoryview) -> None:
        """Copy len(place) > 0 bytes at an address of its memory into writable memory of ours.

        Without the GIL. Raises OSError if they are not there (any more): it is gone, or gave up.
        """
        try:
            self._fetch(address, address_of(place), len(place))
        except OSError:
            self._fetch(0, 0, 0)  # raises if the process is gone, or gave up: nothing to remember
            # It does offer, but this memory cannot be read (some drivers' cannot): its next comm
            # uses chunks.
            _mute.add(self.process)
            raise

    def _fetch(self, there: int, here: int, nbytes: int) -> None:
        seen = self._seen
        ours = (_Span * 2)((here, nbytes), (ctypes.addressof(seen), _WORD))
        theirs = (_Span * 2)((there, nbytes), (self._cell, _WORD))
        seen[:] = bytes(_WORD)
        got = _readv(self.process, ours, 2, theirs, 2, 0)
        if got != nbytes + _WORD or seen.raw != self._word:
            raise OSError(f"process {self.process} has dropped what it offered, or is gone")


def address_of(view: Any) -> int:
    """Where the bytes of something flat, of at least one byte, lie."""
    if isinstance(view, memoryview) and not view.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))
    import numpy

    return int(numpy.frombuffer(view, numpy.uint8).__array_interface__["data"][0])
