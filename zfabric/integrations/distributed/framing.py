"""A message of distributed (a list of frames) as messages of the transport, and back.

A small message is one transport message:

    "D", fetched: u24, number of frames: u32, (length of frame: u64) * number, the frames' bytes

`fetched` is how many pieces of the other end's memory were fetched since it was told last: so an
answer takes along what would be a message of its own, which wakes two threads at each end.

A large one has no bytes behind its lengths; they follow as chunks, in order, as many as it takes:

    "C", bytes                                   as they are
    "Z", header of zfabric.codec, bytes          compressed by blosc
    "M", address: u64, number of bytes: u64      to be fetched from the sender's memory

Where the receiver can read the sender's memory, a message of up to PIECE bytes is one transport
message of three frames; an address of 0 stands for the next bytes of the last frame:

    the head, (address: u64, number of bytes: u64) * parts, the small frames' bytes

The receiver lands them in memory of its own, writable, since arrays are built on top of it. Each
frame gets its own, so that an array that is kept does not keep its neighbours; only the frames at
the front that are `bytes` (msgpack and pickle, read once and dropped) share one. The top bit of a
length says that the frame continues the memory of the one before it.

Nothing here knows sockets or asyncio.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from pickle import PickleBuffer
from typing import Any, NamedTuple

from zfabric.codec.compress import Compressed, decompress_into, parse_header
from zfabric.integrations.distributed.memory import address_of
from zfabric.transport.contract import LARGE

CHUNK = 512 * 1024
"""Bytes per transport message. Larger ones come from the kernel into cold memory and leave the
caches before they are copied to their place: over loopback a GiB takes 0.97 s of processor time
with 0.5 MiB, 1.1 s with 2 MiB, 1.2 s with one frame per array; 64 KiB cost 2.0 s in calls."""

WHOLE = 2 * 1024 * 1024
"""Bytes up to which a frame is one chunk all the same: the receiver then keeps the memory into
which ZeroMQ has read it, and copies nothing. 1 MB comes a third sooner by that."""

INLINE = 256 * 1024
"""Bytes up to which a message is joined and sent as one: below, a copy costs less than a frame."""

FETCH = 32 * 1024
"""Bytes from which on a frame of a larger message is fetched and not copied: a call costs 4 us."""

PIECE = 32 * 1024 * 1024
"""Bytes that are fetched from a neighbour's memory at once: some 6 ms in which the event loop
waits. Each piece wants the GIL back once, which takes 5 ms where a task holds it."""

MOST_TOLD = (1 << 24) - 1
"""Pieces that the head of one message can tell of."""

DATA, RAW, PACKED, MEMORY = b"D", b"C", b"Z", b"M"
"""First letters of what carries data, and spends credit."""

HELLO, CREDIT, CLOSE, NEIGHBOUR, FETCHED = b"H", b"W", b"X", b"N", b"F"
"""First letters of the words between two links."""

SPAN = struct.Struct("<QQ")
"""Address and number of bytes, of "M"."""

_HEAD = struct.Struct("<II")
_TAG = DATA[0]
_SAME = 1 << 63
_MAX_FRAMES = 1 << 24
_MAX_BYTES = 1 << 48


class Held(NamedTuple):
    """A transport message that names memory of ours, which must stay until it was fetched."""

    words: Sequence[Any]
    """What is sent."""
    pieces: Sequence[Any]
    """The memory."""
    nbytes: int
    """What it spends of the credit."""


Messages = Iterator[Sequence[Any] | Held]


def flat(frame: Any) -> Any:
    """A frame whose len() counts bytes. Copies only what is not contiguous."""
    if type(frame) is bytes:
        return frame
    view = memoryview(frame)
    if view.ndim == 1 and view.format == "B" and view.contiguous:
        return view
    if not view.nbytes:
        return memoryview(b"")  # a view with a zero in its shape cannot be cast
    return PickleBuffer(view).raw() if view.contiguous else memoryview(bytes(view))


def head_of(frames: Sequence[Any], n_fetched: int = 0) -> bytes:
    """The head of a message with these flat frames: how many, how long, which share memory.

    n_fetched: pieces to tell of, 0 to MOST_TOLD.
    """
    fields = []
    front = False
    for frame in frames:
        shares = front
        front = type(frame) is bytes and (front or not fields)
        fields.append(len(frame) | (_SAME if shares and front else 0))
    return _HEAD.pack(_TAG | n_fetched << 8, len(frames)) + struct.pack(f"<{len(fields)}Q", *fields)


def split(
    frames: Sequence[Any],
    compress: Callable[[Any], Compressed | None] | None = None,
    fetched: bool = False,
    told: Callable[[], int] | None = None,
) -> Messages:
    """The transport messages of one message, made one by one as they are asked for.

    frames: flat; those that are not `bytes` must not change until they are sent.
    compress: for each chunk: compressed, or None if it should go as it is.
    fetched: the receiver can read our memory, so large frames stay where they are, as `Held`.
    told: asked when the first one is made: of how many fetched pieces its head shall tell.
    """
    head = head_of(frames, 0 if told is None else told())
    nbytes = sum(map(len, frames))
    if nbytes <= INLINE:
        yield (b"".join((head, *frames)),)
        return
    if fetched and nbytes <= PIECE:
        yield _gathered(head, frames, nbytes)
        return
    yield (head,)
    small: list[Any] = []
    gathered = 0
    for frame in frames:
        nbytes = len(frame)
        if not nbytes:
            continue  # a chunk of no bytes would come after the last that is waited for
        if nbytes + gathered <= INLINE:
            small.append(frame)
            gathered += nbytes
            continue
        if small:
            yield RAW, b"".join(small)
            small, gathered = [], 0
        if nbytes <= INLINE:
            small.append(frame)
            gathered = nbytes
            continue
        view = memoryview(frame).toreadonly()
        if fetched:
            base = address_of(view)
            for start in range(0, nbytes, PIECE):
                part = view[start : start + PIECE]
                yield Held((MEMORY, SPAN.pack(base + start, len(part))), (part,), len(part))
            continue
        step = WHOLE if nbytes <= WHOLE else CHUNK
        for start in range(0, nbytes, step):
            part = view[start : start + step]
            packed = None if compress is None else compress(part)
            if packed is None:
                yield RAW, part
            else:
                yield PACKED, packed.header, packed.data
    if small:
        yield RAW, b"".join(small)


def _gathered(head: bytes, frames: Sequence[Any], nbytes: int) -> Held:
    """All of a message in one: the large frames by their addresses, the small ones themselves."""
    spans: list[int] = []
    joined: list[Any] = []
    pieces: list[Any] = []
    run = 0  # bytes of small frames since the last large one
    for frame in frames:
        if len(frame) < FETCH:
            joined.append(frame)
            run += len(frame)
            continue
        if run:
            spans += (0, run)
            run = 0
        pieces.append(frame)
        spans += (address_of(frame), len(frame))
    if run:
        spans += (0, run)
    words = (head, struct.pack(f"<{len(spans)}Q", *spans), b"".join(joined))
    return Held(words, pieces, nbytes)


def spans_of(packed: Any) -> Iterator[tuple[int, int]]:
    """Address and number of bytes of each part of a message in one. Raises struct.error."""
    return SPAN.iter_unpack(packed)


def small(head: Any) -> list[memoryview] | None:
    """The frames of a message that is all in its head and all of which share memory.

    None: it is another sort of message, or makes no sense; `Assembly` knows.
    """
    nframes = _nframes(head)
    start = _HEAD.size + 8 * nframes
    if len(head) == start or nframes > 16:
        return None
    _, *rest = fields = struct.unpack_from(f"<{nframes}Q", head, _HEAD.size)
    for field in rest:
        if not field & _SAME:
            return None
    place = memoryview(bytearray(memoryview(head)[start:]))
    frames = []
    start = 0
    for field in fields:
        end = start + (field & ~_SAME)
        frames.append(place[start:end])
        start = end
    return frames if start == len(place) else None


def n_fetched(head: Any) -> int:
    """Of how many fetched pieces a head tells. Raises struct.error if it is none."""
    return int(_HEAD.unpack_from(head)[0]) >> 8


class Assembly:
    """A message on its way in. `frames` are good once `missing` is 0.

    host_array: number of bytes -> writable memory of that size, as a flat memoryview.
    Raises ValueError when a head makes no sense.
    """

    def __init__(self, head: Any, host_array: Callable[[int], memoryview]) -> None:
        nframes = _nframes(head)
        fields = struct.unpack_from(f"<{nframes}Q", head, _HEAD.size)
        self.frames: list[memoryview] = []
        self._places: list[memoryview] = []  # those that are full
        self._place: memoryview | None = None  # the one being filled
        self._filled = 0  # bytes of it
        runs: list[list[int]] = []
        for field in fields:
            if field & _SAME and runs:
                runs[-1].append(field ^ _SAME)
            else:
                runs.append([field & ~_SAME])
        self.missing = sum(map(sum, runs))
        inline = len(head) - _HEAD.size - 8 * nframes
        if self.missing > _MAX_BYTES or inline not in (0, self.missing):
            raise ValueError(f"{self.missing} bytes are announced and {inline} are there")
        self._host_array = host_array
        self._runs = runs
        self._sizes = [sum(lengths) for lengths in runs]
        self._skip_empty()
        if inline:
            self.add(memoryview(head)[len(head) - inline :])

    def add(self, chunk: Any) -> None:
        """Bytes that follow. Raises ValueError if they are more than were announced."""
        if len(chunk) > self.missing:
            raise ValueError(f"{len(chunk)} bytes where {self.missing} are missing")
        self.missing -= len(chunk)
        start = 0
        while start < len(chunk):
            room = self._sizes[len(self._places)] if self._filled == 0 else self._room()
            nbytes = min(room, len(chunk) - start)
            part = chunk if nbytes == len(chunk) else memoryview(chunk)[start : start + nbytes]
            if nbytes == room and self._filled == 0 and nbytes == len(chunk) >= LARGE:
                # All that this place will ever hold came in memory of its own: no copy.
                self._place = writable(chunk)
            else:
                self._open()[self._filled : self._filled + nbytes] = part
            start += nbytes
            self._step(nbytes)

    def add_packed(self, header: Any, data: Any) -> None:
        """A compressed chunk that follows. Raises CodecError or ValueError if it does not fit."""
        decompress_into(header, data, self.room(parse_header(header).raw_nbytes))

    def room(self, nbytes: int) -> memoryview:
        """Where the next bytes belong; the caller puts them there before anything else is added.

        Raises ValueError if they do not fit in one frame.
        """
        if not self.missing or not 0 < nbytes <= self._room():
            raise ValueError(f"a part of {nbytes} bytes does not fit in where it belongs")
        place = self._open()[self._filled : self._filled + nbytes]
        self.missing -= nbytes
        self._step(nbytes)
        return place

    def _open(self) -> memoryview:
        if self._place is None:
            self._place = self._host_array(self._sizes[len(self._places)])
        return self._place

    def _room(self) -> int:
        return self._sizes[len(self._places)] - self._filled

    def _step(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._room() == 0:
            self._close()
            self._skip_empty()

    def _skip_empty(self) -> None:
        while len(self._places) < len(self._sizes) and not self._sizes[len(self._places)]:
            self._close()

    def _close(self) -> None:
        """This place is full: cut it into the frames that share it."""
        place = self._open()
        start = 0
        for nbytes in self._runs[len(self._places)]:
            self.frames.append(place[start : start + nbytes])
            start += nbytes
        self._places.append(place)
        self._place, self._filled = None, 0


def writable(chunk: Any) -> memoryview:
    """A received frame of LARGE bytes or more as writable memory, without a copy.

    libzmq read it into memory that it allocated for this frame alone, and nobody else holds it;
    that pyzmq shows it as read-only is a precaution for frames that are smaller or sent on.
    """
    view = memoryview(chunk)
    if not view.readonly:
        return view
    place = (ctypes.c_ubyte * len(view)).from_address(address_of(view))
    place.owner = chunk  # type: ignore[attr-defined]  # it lives as long as the memory is used
    return memoryview(place).cast("B")


def _nframes(head: Any) -> int:
    if len(head) < _HEAD.size:
        raise ValueError(f"a message's head has {len(head)} bytes")
    tag, nframes = _HEAD.unpack_from(head)
    if tag & 0xFF != _TAG or nframes > _MAX_FRAMES or len(head) < _HEAD.size + 8 * nframes:
        raise ValueError(f"a message's head of {len(head)} bytes announces {nframes} frames")
    return int(nframes)
