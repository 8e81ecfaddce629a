"""Values of middle size, many in one piece of shared memory.

A value beyond what the socket carries used to take a file of its own, and a message of its own to
pass its descriptor: half a millisecond for 128 KiB in all, of which the copy is a tenth. A slot now
writes such values one behind the other into a slab, whose descriptor the supervisor gets once; a
row's record only says where its value lies, so rows are reported many at a time.

A slab is one of `segments`: it is written over when nobody has any value of it. Until then each of
them keeps all of its memory, so who holds values counts what is lost by that (`SlabBook`).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from zfabric.codec import layout
from zfabric.runtime.segments import Segments, is_settled

SLAB_NBYTES = 4 * 2**20

LARGEST = 2**18
"""Bytes of a value that goes into a slab; of what is left at a slab's end at most."""

KEPT_NBYTES = 2 * SLAB_NBYTES
"""Of slabs that a slot keeps, to use them again."""

Write = Callable[[int, Sequence[Any], int], None]
"""(file descriptor, parts, offset in bytes): writes them there, one behind the other."""


def whole_pages(nbytes: int) -> int:
    """`nbytes` rounded up: what can be mapped begins with a page."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


class Slabs:
    """What one slot writes. hand_over: called with the descriptor of each new slab, for reading.

    Slabs are counted from 1, in the order in which they are handed over.
    """

    def __init__(self, hand_over: Callable[[int], None]) -> None:
        self._hand_over = hand_over
        self._segments = Segments(KEPT_NBYTES)
        self._writer = -1
        self._inode = 0
        self._end = SLAB_NBYTES
        self._number = 0

    def write(self, frames: Sequence[Any], nbytes: int, write: Write) -> tuple[int, int]:
        """(slab, offset) of a value of `nbytes`, at most LARGEST, that lies there now.

        Raises OSError when there is no memory; nothing is left then.
        """
        if self._end + nbytes > SLAB_NBYTES:
            self._begin()
        if os.fstat(self._writer).st_ino != self._inode:
            # A task has closed it, and has a file of its own under the number.
            self._writer, self._end = -1, SLAB_NBYTES
            raise OSError(errno.EBADF, "a slab was closed by somebody else")
        offset = self._end
        write(self._writer, layout.join(frames), offset)
        self._end = whole_pages(offset + nbytes)
        return self._number, offset

    def _begin(self) -> None:
        self._let_go()
        writer, reader = self._segments.take(SLAB_NBYTES)
        try:
            if not is_settled(reader):
                raise OSError(errno.EBADF, "a slab was closed by somebody else")
            self._inode = os.fstat(writer).st_ino
            self._hand_over(reader)
        except BaseException:
            os.close(writer)
            raise
        finally:
            os.close(reader)
        self._writer, self._end = writer, 0
        self._number += 1

    def _let_go(self) -> None:
        writer, self._writer, self._end = self._writer, -1, SLAB_NBYTES
        if writer >= 0 and os.fstat(writer).st_ino == self._inode:
            os.close(writer)

    def close(self) -> None:
        """Keep nothing any more; what others have stays theirs."""
        self._let_go()
        self._segments.close()

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self._let_go()


class SlabBook:
    """The slabs of which a store holds values, and what is lost in them.

    slack: bytes of all these slabs that belong to no value here.
    """

    def __init__(self) -> None:
        self._extents: dict[int, int] = {}
        self._ids: OrderedDict[int, dict[int, int]] = OrderedDict()
        """By slab: whole pages in bytes by value; the slab last added to is last."""
        self.slack = 0

    def enter(self, slab: int, extent: int, id_: int, nbytes: int) -> None:
        """A value is held from now on. slab: any number that names it.  extent: bytes of the slab
        that are in use, as far as is known."""
        ids = self._ids.setdefault(slab, {})
        self._ids.move_to_end(slab)
        used = ids[id_] = whole_pages(nbytes)
        before = self._extents.get(slab, 0)
        self._extents[slab] = max(before, extent)
        self.slack += self._extents[slab] - before - used

    def leave(self, slab: int, id_: int) -> None:
        """It is not any more, or not there. One that is not known does not matter."""
        ids = self._ids.get(slab)
        if ids is None or id_ not in ids:
            return
        self.slack += ids.pop(id_)
        if not ids:
            del self._ids[slab]
            self.slack -= self._extents.pop(slab)

    def sparse(self) -> list[int]:
        """The values of the slab in which most is lost; one that may still be written to is left
        alone. Empty: there is none."""
        slabs = list(self._ids)[:-1]
        slabs = [slab for slab in slabs if self._lost(slab) > 0]
        return list(self._ids[max(slabs, key=self._lost)]) if slabs else []

    def _lost(self, slab: int) -> int:
        return self._extents[slab] - sum(self._ids[slab].values())
