"""Moving one value in parts: the side that wants it, as a machine without I/O.

The receiver pulls: it asks for a few parts at a time, so what is under way is never more than
WINDOW parts, however slow the link and however large the value. The first request is small: it
brings the sizes, from which the destination is allocated, and proves that the source answers.

Several sources are tried one after the other, each from the beginning: a value that was computed
twice may not be the same, byte for byte. An answer that comes after its source was given up is
ignored.

An upload is the same thing the other way round: a Put offers the beginning, and the receiver
asks for the rest with Fetch, which is answered by Put.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from zfabric.codec import layout
from zfabric.codec.compress import decompress_into
from zfabric.config import DEFAULTS, Settings
from zfabric.errors import CodecError
from zfabric.messages import Fetch, Put

WINDOW = 6
"""Parts asked for and not received: 12 MiB keep a link of 10 Gbit/s and 10 ms full, and are what
a transfer may take of the sender's memory and of a link's queues."""

FIRST_NBYTES = 64 * 1024

RELAY_PART = 256 * 1024
"""Bytes of a part that comes by way of the broker, which is busy with it for so long."""

RELAY_PARTS = 16
"""Such parts asked for at a time by one end, whatever the number of values."""

FIRST_ANSWER_S = 1.0
"""Until a source that was never heard counts as out of reach."""

PROGRESS_S = 15.0
"""Until one that has answered counts as gone. One part takes 17 s at 1 Mbit/s, but four are
asked for ahead, and any of them counts."""


class Destination(Protocol):
    """Where a value's bytes go: a writable memoryview, or a file."""

    def __setitem__(self, part: slice, data: bytes | memoryview, /) -> None: ...


class Source(Protocol):
    """Where they come from: all bytes of the area, or frames that only look like it."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes | memoryview: ...


class Download:
    """One value on its way here.

    n_sources: how many there are to try, numbered from 0; `source` is the current one.
    nbytes: what the value should have, 0 if unknown.
    allocate: gives a place for frames of these sizes; raises OSError if there is none.
    `sizes` and `area` hold the value once `is_done`; `has_failed` when no source is left.
    """

    def __init__(
        self,
        id_: int,
        n_sources: int,
        allocate: Callable[[Sequence[int]], Destination],
        *,
        nbytes: int = 0,
        settings: Settings = DEFAULTS,
        now: float,
    ) -> None:
        self.id = id_
        self.source = 0
        self.sizes: tuple[int, ...] = ()
        self.area: Destination | None = None
        self._n_sources = n_sources
        self._allocate = allocate
        self._nbytes = nbytes
        self._chunk = settings.chunk
        self._begin(now)

    def _begin(self, now: float) -> None:
        self.sizes = ()
        self.area = None
        self._total = -1
        """Bytes of the area, -1 until the first part came."""
        self._next = 0
        """Everything before this offset was asked for."""
        self._expected: dict[int, int] = {}
        """Offset and length of the parts that were asked for and did not come."""
        self._due = now + FIRST_ANSWER_S

    @property
    def has_failed(self) -> bool:
        """Whether every source was tried in vain."""
        return self.source >= self._n_sources

    @property
    def is_done(self) -> bool:
        """Whether the whole value is in `area`."""
        return self._total >= 0 and self._next >= self._total and not self._expected

    @property
    def n_here(self) -> int:
        """Bytes of the area, from its beginning, that have come from the current source."""
        if self.area is None:
            return 0
        return min(self._expected, default=self._next)

    @property
    def wake_at(self) -> float:
        """When to call tick()."""
        return self._due

    def requests(self, part: int = 0, ahead: int = WINDOW) -> list[Fetch]:
        """What to ask the current source for now.

        part: bytes at a time, where that should be less than a chunk.  ahead: parts at a time.
        """
        asked: list[Fetch] = []
        if self.has_failed:
            return asked
        if self._total < 0:
            if not self._expected:
                self._expected[0] = FIRST_NBYTES
                asked.append(Fetch(self.id, 0, FIRST_NBYTES))
            return asked
        part = min(part, self._chunk) if part else self._chunk
        while self._next < self._total and len(self._expected) < ahead:
            length = min(part, self._total - self._next)
            self._expected[self._next] = length
            asked.append(Fetch(self.id, self._next, length))
            self._next += length
        return asked

    def part_came(
        self,
        source: int,
        offset: int,
        sizes: Sequence[int],
        data: bytes | memoryview,
        now: float,
        packing: bytes = b"",
    ) -> None:
        """A Chunk or Put. One that does not fit what was asked for ends the source."""
        length = self._expected.get(offset)
        if source != self.source or length is None:
            return
        try:
            if self._total < 0:
                self._open(sizes)
            area = self.area
            if area is None or tuple(sizes) != self.sizes:
                raise CodecError("the sizes changed under way")
            length = min(length, self._total - offset)
            if packing:
                raw = memoryview(bytearray(length))
                decompress_into(packing, data, raw)
                data = raw
            if len(data) != length:
                raise CodecError(f"{len(data)} bytes came in place of {length}")
            area[offset : offset + length] = data
        except (CodecError, OSError):
            self.source_failed(source, now)
            return
        del self._expected[offset]
        self._due = now + PROGRESS_S

    def came_whole(self, source: int, sizes: Sequence[int]) -> bool:
        """The source has handed over its memory with all of the value; whether that is wanted."""
        if source != self.source or self.is_done:
            return False
        total = layout.nbytes_of(sizes)
        if self._nbytes and total != self._nbytes:
            return False
        self.sizes = tuple(sizes)
        self._total = self._next = total
        self._expected.clear()
        return True

    def _open(self, sizes: Sequence[int]) -> None:
        total = layout.nbytes_of(sizes)
        if self._nbytes and total != self._nbytes:
            raise CodecError(f"a value of {self._nbytes} bytes comes with sizes of {total}")
        self.sizes = tuple(sizes)
        self.area = self._allocate(sizes)
        self._total = total
        self._next = min(FIRST_NBYTES, total)

    def source_failed(self, source: int, now: float) -> None:
        """A source does not have the value, or is out of reach."""
        if source == self.source:
            self.source += 1
            self._begin(now)

    def sent_on(self, source: int, n_new: int, now: float) -> bool:
        """The source has told of `n_new` others, to be asked next, and then the source
        once more. False: it is not the current one."""
        if source != self.source:
            return False
        self._n_sources += n_new + 1
        self.source_failed(source, now)
        return True

    def tick(self, now: float) -> None:
        """Give up a source that is silent for too long."""
        if now >= self._due and not self.is_done:
            self.source_failed(self.source, now)


class Upload:
    """One value on its way to somebody's store. area: all its bytes, laid out."""

    def __init__(
        self,
        id_: int,
        sizes: Sequence[int],
        area: Source,
        *,
        n_targets: int = 1,
        settings: Settings = DEFAULTS,
        now: float,
    ) -> None:
        self.id = id_
        self.target = 0
        self.error = ""
        self.is_done = False
        self._n_targets = n_targets
        self._sizes = tuple(sizes)
        self.area = area
        self._chunk = settings.chunk
        self._due = now + FIRST_ANSWER_S

    @property
    def has_failed(self) -> bool:
        """Whether every way was tried in vain; `error` may say more."""
        return self.target >= self._n_targets

    @property
    def wake_at(self) -> float:
        """When to call tick()."""
        return self._due

    def first(self) -> Put:
        """What to send first on each way."""
        return self._part(0, FIRST_NBYTES)

    def asked(self, target: int, request: Fetch, now: float) -> Put | None:
        """The part that the receiver asks for; None for what makes no sense."""
        if target != self.target or not 0 <= request.offset <= len(self.area):
            return None
        self._due = now + PROGRESS_S
        return self._part(request.offset, min(request.length, self._chunk))

    def _part(self, offset: int, length: int) -> Put:
        return Put(self.id, offset, self._sizes, self.area[offset : offset + length])

    def answered(self, target: int, error: str, now: float) -> None:
        """PutDone came."""
        if target != self.target:
            return
        self.error = error
        if error:
            self.target_failed(target, now)
        else:
            self.is_done = True

    def progressed(self, now: float) -> None:
        """The value is being written where the receiver will look for it."""
        self._due = now + PROGRESS_S

    def target_failed(self, target: int, now: float) -> None:
        """This way does not work."""
        if target == self.target:
            self.target += 1
            self._due = now + FIRST_ANSWER_S

    def tick(self, now: float) -> None:
        """Give up a way that is silent for too long."""
        if now >= self._due and not self.is_done:
            self.target_failed(self.target, now)
