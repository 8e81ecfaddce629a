"""The worker's values that are too large to ride along in rows, and which of them are in memory.

Those that were used least recently go to disk when memory is short, and come back on demand; small
ones that take too many descriptors are packed into files in memory.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic

from zfabric.errors import CodecError
from zfabric.runtime.host_memory import available_share
from zfabric.runtime.segments import Segments
from zfabric.runtime.slabs import SlabBook
from zfabric.runtime.spill import Spilled, SpillFiles
from zfabric.runtime.value import HUGE, Value

log = logging.getLogger(__name__)


SPILL_AT = 0.6
"""Of the limit: from here on values are moved to disk."""

PAUSE_AT = 0.8
"""Of the limit: from here on new work waits for that."""

RETRY_S = 5.0
"""After which a disk that failed is tried again."""

TRIAL_NBYTES = 64 * 1024
"""What is written to see whether it takes values again."""

SCARCE = 0.1
"""Of the host's memory: while a disk takes nothing, new work waits when less than that is free."""

MAPPING_SHARE = 1 / 16
"""Of the limit: what one slot may keep mapped of values, some of which may have left the store; and
what values that have left may take of slabs, beyond which the others there are packed."""

PACKED_NBYTES = 2**20
"""Values up to this size are packed, many in one file, when they take too many descriptors."""

MOST_DESCRIPTORS = 8192
"""Of such values, or a quarter of what the process may have, if that is less."""

UNLIMITED_MAPPINGS = 2**30
"""Bytes: the same where there is no limit."""

SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What says that the process has too much of something now, and nothing of the value."""


class Store:
    """Values by id. Any thread may use it.

    limit: bytes of values in memory at most; 0: no limit.  files: where values go before that.
    on_change: called, in any thread, when `is_full` may have changed, values were lost, or values
    that slots may keep mapped have left memory.
    most_descriptors: that small values may take; 0: by what the process may have.
    mapping_limit: bytes that one slot may keep mapped.
    nbytes, spilled_nbytes: of values in memory, and on disk.  shared_nbytes: of those in memory
    that slots and others on this host map.  slabs: in which some of them lie.
    trouble: why the disk does not take values, "" when it does.

    From SPILL_AT of the limit on a thread moves those that were used least recently to disk. Small
    values that take too many descriptors are packed, by the same thread. They come back when
    somebody asks for them.
    """

    def __init__(
        self,
        limit: int = 0,
        files: SpillFiles | None = None,
        on_change: Callable[[], None] = lambda: None,
        most_descriptors: int = 0,
    ) -> None:
        self._lock = threading.RLock()
        self._values: dict[int, Value] = {}
        self._in_memory: OrderedDict[int, Value] = OrderedDict()
        """Those that have memory of their own, the least recently used first."""
        self._small: OrderedDict[int, Value] = OrderedDict()
        """Those of them that could be packed, in the same order."""
        self._packed: OrderedDict[int, Value] = OrderedDict()
        self._packs = SpillFiles(in_memory=True)
        self._most_descriptors = most_descriptors or min(
            MOST_DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        )
        self._limit = limit
        self.mapping_limit = int(MAPPING_SHARE * limit) or UNLIMITED_MAPPINGS
        self.segments = Segments(self.mapping_limit)
        """Memory of values that came here, beyond what the limit counts once they are gone."""
        self._files = files
        self._on_change = on_change
        self._need = threading.Event()
        self._spiller: threading.Thread | None = None
        self._closing = False
        self._lost: list[int] = []
        self._left: list[int] = []
        self._leftover: deque[Value] = deque()
        """Freed values whose memory and disk is still to be given back."""
        self._retry_at = 0.0
        self._told_full = False
        self._is_scarce = False
        """Whether the host was short of memory when the disk last took nothing."""
        self.slabs = SlabBook()
        self._most_slack = self.mapping_limit
        self.nbytes = 0
        self.spilled_nbytes = 0
        self.shared_nbytes = 0
        self.trouble = ""

    @property
    def n_values(self) -> int:
        """How many values it holds."""
        return len(self._values)

    @property
    def is_full(self) -> bool:
        """Whether new work should wait until more values are on disk, as `on_change` told last.

        Not how it is at this very moment, in which another thread may be amid a step: whoever saw
        that would take it for the last word, and nobody would be told of the next.
        """
        return self._told_full

    def _is_over(self) -> bool:
        """Whether it is full now. A disk that takes nothing is not waited for, as nothing may ever
        be freed but by more work, while the host has memory left: a worker that stands still is
        better than one that the kernel kills."""
        if not self._limit or self.nbytes <= PAUSE_AT * self._limit:
            return False
        return not self.trouble or self._is_scarce

    def __contains__(self, id_: int) -> bool:
        return id_ in self._values

    def put(self, id_: int, value: Value) -> None:
        """Hold a value from now on; one that was there under the id goes."""
        if id_ in self._values or self._leftover:
            self.free((id_,))
        with self._lock:
            self._values[id_] = value
            self._has_memory(id_, value)
            self.nbytes += value.nbytes
        while len(self._small) > 2 * self._most_descriptors and self._pack_one():
            pass
        self._look()
        self._tell_full()

    def allocate(self, sizes: Sequence[int]) -> Value:
        """See Value.allocate; in memory that other values have left, where there is some."""
        return Value.allocate(sizes, self.segments)

    def get(self, id_: int) -> Value | None:
        """The value, in memory; None if it is not here."""
        with self.holding(id_) as value:
            return value

    def is_on_disk(self, id_: int) -> bool:
        """Whether it has to be read from disk before it can be used."""
        value = self._values.get(id_)
        part = None if value is None else value.spilled
        return part is not None and part.files is not self._packs

    def peek(self, id_: int) -> Value | None:
        """The value, wherever it is; None if it is not here."""
        return self._values.get(id_)

    @contextlib.contextmanager
    def holding(self, id_: int) -> Iterator[Value | None]:
        """The value, which stays in memory meanwhile; None if it is not here.

        Raises OSError when it is on disk, and there is no memory or descriptor to bring it back.
        """
        while True:
            with self._lock:
                value = self._values.get(id_)
                if value is None or value.spilled is None:
                    if value is not None:
                        self._in_memory.move_to_end(id_)
                        if id_ in self._small:
                            self._small.move_to_end(id_)
                    yield value
                    return
            self._bring_back(id_, value)

    def copy(self, id_: int) -> tuple[tuple[int, ...], bytes] | None:
        """A value's sizes, and its bytes from wherever they are: takes no descriptor and leaves the
        value there. None: it is not here. Raises OSError, CodecError when it cannot be read."""
        value = self._values.get(id_)
        if value is None:
            return None
        with value.lock:
            part = value.spilled
            if part is not None:
                data = bytearray(value.nbytes)
                part.files.read(part, memoryview(data))
                return value.sizes, bytes(data)
            return value.sizes, value.read()

    def chunk(self, id_: int, offset: int, length: int) -> memoryview | None:
        """Bytes [offset, offset + length) of a value's area, fewer at its end; no copy.

        None: it is not here, or the range makes no sense.
        """
        with self.holding(id_) as value:
            return None if value is None else value.chunk(offset, length)

    def free(self, ids: Iterable[int]) -> None:
        """Forget values; those that are not here do not matter."""
        gone = []
        with self._lock:
            for id_ in ids:
                value = self._values.pop(id_, None)
                if value is not None:
                    gone.append(value)
                    self._small.pop(id_, None)
                    if value.slab is not None:
                        self.slabs.leave(value.slab[0], id_)
                    if self._in_memory.pop(id_, None):
                        self.nbytes -= value.nbytes
                        self._unshare(value)
                    elif self._packed.pop(id_, None):
                        self.nbytes -= value.nbytes
        has_huge = any(value.nbytes >= HUGE for value in gone)
        self._leftover.extend(gone)
        gone.clear()  # or its memory might be freed when this returns
        self._clean_up()
        if has_huge or self.slabs.slack > self._most_slack:
            self._wake_thread()
        self._tell_full()

    def _tell_full(self) -> None:
        """Say that `is_full` has changed. What was said last is what counts: if each thread
        compared with what it saw before its own step, a change between the steps of two would be
        said by neither, and a worker would pause for ever."""
        with self._lock:
            if self._is_over() is self._told_full:
                return
            self._told_full = not self._told_full
        self._on_change()

    def _clean_up(self, huge: bool = False) -> None:
        """Let go of freed values, but for those that are just on their way to or from disk.

        huge: also of those whose pages take the kernel milliseconds, or a tenth of a second for a
        gigabyte: a thread that has calls to answer leaves them to the other one.
        """
        huge = huge or self._closing
        for _ in range(len(self._leftover)):
            try:
                value = self._leftover.popleft()
            except IndexError:  # another thread was faster
                return
            if value.nbytes >= HUGE and not huge:
                self._leftover.append(value)
                continue
            if not value.lock.acquire(blocking=False):
                self._leftover.append(value)
                continue
            try:
                part, value.spilled = value.spilled, None
                value.close()
            finally:
                value.lock.release()
            if part is not None:
                if part.files is not self._packs:
                    with self._lock:
                        self.spilled_nbytes -= part.nbytes
                part.files.free(part)

    def clear(self) -> None:
        """Forget all values."""
        self.free(list(self._values))

    def close(self) -> None:
        """Forget all values and end the thread."""
        self._closing = True
        self._need.set()
        if self._spiller is not None:
            self._spiller.join(5.0)
        self.clear()
        self.segments.close()

    # --- memory and disk ----------------------------------------------------------------------

    def _has_memory(self, id_: int, value: Value) -> None:
        self._in_memory[id_] = value
        if value.fd >= 0:
            self.shared_nbytes += value.nbytes
        if value.slab is not None:
            slab, extent = value.slab
            self.slabs.enter(slab, extent, id_, value.nbytes)
        if value.fd >= 0 and value.nbytes <= PACKED_NBYTES:
            self._small[id_] = value

    def _unshare(self, value: Value) -> None:
        """It is not in memory of its own any more, which it still has."""
        if value.fd >= 0:
            self.shared_nbytes -= value.nbytes

    def why_no_room(self, nbytes: int) -> str:
        """What to tell whose value of that size found no room."""
        disk = f"; its disk takes nothing: {self.trouble}" if self.trouble else ""
        return (
            f"a worker's memory limit is reached: of {self._limit} bytes {self.nbytes} are in use,"
            f" and {nbytes} more were to come{disk}"
        )

    def make_room(self, nbytes: int) -> bool:
        """Move values to disk, here and now, until so many more bytes are within the limit.

        False: they are not, as the disk takes no more, or the limit is below that.
        """
        while self._limit and self.nbytes + nbytes > self._limit:
            if nbytes > self._limit or not self._spill_one():
                return False
        return True

    def lost(self) -> list[int]:
        """Values that could not be brought back from disk, since this was last asked."""
        with self._lock:
            lost, self._lost = self._lost, []
            return lost

    def left(self) -> list[int]:
        """Values that went to disk and that slots may still have mapped, since this was last
        asked."""
        with self._lock:
            left, self._left = self._left, []
            return left

    def _look(self) -> None:
        if (
            len(self._small) <= self._most_descriptors
            and not self._leftover
            and self.slabs.slack <= self._most_slack
            and (not self._limit or self._files is None or self.nbytes <= SPILL_AT * self._limit)
        ):
            return
        self._wake_thread()

    def _wake_thread(self) -> None:
        with self._lock:
            if self._spiller is None and not self._closing:
                self._spiller = threading.Thread(
                    target=self._spill, name="zfabric-spill", daemon=True
                )
                self._spiller.start()
        self._need.set()

    def _spill(self) -> None:
        """The thread."""
        while not self._closing:
            self._need.wait(RETRY_S if self.trouble else None)
            self._need.clear()
            self._clean_up(huge=True)
            while not self._closing and len(self._small) > self._most_descriptors:
                if not self._pack_one():
                    break
            while not self._closing and self.slabs.slack > self._most_slack:
                if not self._pack_slab():
                    break
            while self._limit and not self._closing and self.nbytes > SPILL_AT * self._limit:
                if not self._spill_one():
                    break
            else:
                if self.trouble and not self._closing:
                    self._try_disk()

    def _try_disk(self) -> None:
        """No value has to go to the disk that took none: see whether it would, for who asks."""
        assert self._files is not None
        try:
            part = self._files.write(memoryview(bytes(TRIAL_NBYTES)))
        except OSError as exc:
            self.trouble = str(exc)
            return
        part.files.free(part)
        self.trouble = ""
        self._tell_full()

    def _spill_one(self) -> bool:
        """Move the value that was used least recently to disk. False: nothing can be moved."""
        if self._files is None or monotonic() < self._retry_at:
            return False
        with self._lock:
            among = self._packed or self._in_memory
            if not among:
                return False
            id_, value = next(iter(among.items()))
            among.move_to_end(id_)  # so that another thread takes another one
        try:
            if among is self._packed:
                return self._spill_packed(id_, value, self._files)
            with value.lock:
                if value.spilled is not None or value.is_closed:
                    return True
                part = self._files.write(value.area)
        except OSError as exc:
            if not self.trouble:
                log.warning("values stay in memory, the disk does not take them: %s", exc)
            self.trouble = str(exc)
            self._retry_at = monotonic() + RETRY_S
            self._is_scarce = available_share() < SCARCE
            self._tell_full()
            return False
        self.trouble = ""
        self._moved(id_, value, part)
        return True

    def _spill_packed(self, id_: int, value: Value, files: SpillFiles) -> bool:
        """Move a packed value to disk. Raises OSError."""
        with value.lock:
            packed = value.spilled
            if packed is None or packed.files is not self._packs:
                return True
            data = memoryview(bytearray(packed.nbytes))
            self._packs.read(packed, data)
            part = files.write(data)
            with self._lock:
                if self._packed.get(id_) is value:
                    del self._packed[id_]
                    self.nbytes -= value.nbytes
                    self.spilled_nbytes += part.nbytes
                    value.spilled, part = part, packed
        part.files.free(part)
        self.trouble = ""
        self._tell_full()
        return True

    def _pack_one(self) -> bool:
        """Move the small value that was used least recently into a file with others. False:
        nothing can be moved."""
        with self._lock:
            if not self._small:
                return False
            id_, value = next(iter(self._small.items()))
            self._small.move_to_end(id_)
        return self._pack(id_, value)

    def _pack_slab(self) -> bool:
        """Do so with the values of the slab of which the least is in use, which ends it. False:
        there is none that it would help with."""
        with self._lock:
            found = [(id_, self._values.get(id_)) for id_ in self.slabs.sparse()]
        before = self.slabs.slack
        for id_, value in found:
            if value is not None and not self._pack(id_, value):
                return False
        return self.slabs.slack < before

    def _pack(self, id_: int, value: Value) -> bool:
        """Move one of them. False: there is no memory for that."""
        try:
            with value.lock:
                if value.spilled is not None or value.fd < 0:
                    return True
                data = os.pread(value.fd, value.nbytes, value.offset)
                part = self._packs.write(memoryview(data))
        except OSError as exc:
            log.warning("values cannot be packed: %s", exc)
            return False
        self._moved(id_, value, part)
        return True

    def _moved(self, id_: int, value: Value, part: Spilled) -> None:
        """The value's bytes are in a file too: its own memory goes, unless it is not here now."""
        was_shown = False
        fd, area = -1, None
        with value.lock, self._lock:
            has_moved = self._values.get(id_) is value and value.spilled is None
            if has_moved:
                del self._in_memory[id_]
                self._unshare(value)
                self._small.pop(id_, None)
                if part.files is self._packs:
                    self._packed[id_] = value
                else:
                    self.nbytes -= value.nbytes
                    self.spilled_nbytes += part.nbytes
                if value.slab is not None:
                    self.slabs.leave(value.slab[0], id_)
                fd, area = value.leave_memory(part)
                was_shown, value.is_shown = value.is_shown, False
                if was_shown:
                    self._left.append(id_)
        del area
        if fd >= 0:
            os.close(fd)
        if not has_moved:
            part.files.free(part)
        self._tell_full()
        if was_shown:
            self._on_change()

    def _bring_back(self, id_: int, value: Value) -> None:
        """From disk to memory. A value that cannot be read any more is forgotten, and `lost`.

        Raises OSError when there is no memory or descriptor for it now; it stays where it is.
        """
        with value.lock:
            part = value.spilled
            if part is None:
                return
            try:
                fresh = self.allocate(value.sizes)
                part.files.read(part, fresh.destination)
            except (OSError, CodecError) as exc:
                if getattr(exc, "errno", None) in SHORT:
                    raise
                log.error("a value is lost: %s", exc)
                fresh = None
            with self._lock:
                here = self._values.get(id_) is value
                if here:
                    if self._packed.pop(id_, None) is not None:
                        self.nbytes -= value.nbytes
                    else:
                        self.spilled_nbytes -= part.nbytes
                    value.spilled = None
                if here and fresh is not None:
                    value.enter_memory(fresh)
                    self._has_memory(id_, value)
                    self.nbytes += value.nbytes
                elif here:
                    del self._values[id_]
                    self._lost.append(id_)
            if here:
                part.files.free(part)
        if fresh is None:
            self._on_change()
        self._look()
        self._tell_full()
