"""The supervisor's end of one slot: sends it rows, takes them back, reads what it reports.

A link never blocks: what the socket does not take waits in `_unsent`, and the links' epoll says
when it may go on. See slot_protocol for the rules that both ends follow.
"""

from __future__ import annotations

import contextlib
import marshal
import mmap
import os
import resource
import socket
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from zfabric.codec.arguments import split_own
from zfabric.errors import CodecError, InternalError
from zfabric.messages import STORED
from zfabric.runtime import slot_protocol as p
from zfabric.runtime.kept_mappings import KeptMappings
from zfabric.runtime.slot_values import write_all
from zfabric.runtime.store import Store
from zfabric.runtime.value import Value

RECV_NBYTES = 1 << 16
MAX_READS = 8
"""Buffers read per turn, so that one slot does not hold up the others."""
ANCILLARY = socket.CMSG_SPACE(4 * 64)
FDS_PER_FRAME = 60
DESCRIPTOR_SHARE = 16
"""Of the descriptors that a process may have, the share that one message may bring."""


class Batch(NamedTuple):
    """Rows that ended, in the order in which they were sent. Payloads of STORED are Values."""

    statuses: bytes
    payloads: list[Any]
    busy_s: float
    """How long they took; 0.0 when unknown."""
    ids: list[int]
    """Which rows, as the slot says."""


class Report(NamedTuple):
    """What one turn's reading found.  events: Batch, or a slot_protocol word such as READY."""

    events: list[Batch | int]
    closed: bool


class UnknownSlab(CodecError):
    """A record names a slab that has not been handed over."""


class SlotLink:
    """number: the slot's.  sock, tokens, page: see slot_protocol; the link owns them."""

    def __init__(self, number: int, sock: socket.socket, tokens: int, page: mmap.mmap) -> None:
        sock.setblocking(False)
        self.number = number
        self.fd = sock.fileno()
        self._sock = sock
        self._tokens = tokens
        self._page = memoryview(page)
        self._words = self._page[: p.N_WORDS * 8].cast("Q")
        self._received = memoryview(bytearray(RECV_NBYTES))
        self._inbox = bytearray()
        self._fds: deque[int] = deque()
        self._slabs: dict[int, int] = {}
        """Descriptors by number, of those that records may still name."""
        self._n_slabs = 0
        self._n_reported = 0
        """Rows whose outcome was taken in: the index of the next one."""
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        self._resetting = False
        self.mappings = KeptMappings()

    # --- towards the slot ---------------------------------------------------------------------

    def send_config(
        self, address: str, worker: str, inline_limit: int, log_level: str = ""
    ) -> None:
        """Tell what tasks may ask about where they run."""
        config = {
            "address": address,
            "worker": worker,
            "inline_limit": inline_limit,
            "log_level": log_level,
        }
        self._send(p.CONFIG, marshal.dumps(config, 2))

    def send_rows(
        self, functions: list[tuple[int, str, bytes]], rows: list[Any], store: Store
    ) -> None:
        """Send rows, behind functions that the slot does not have. Values come from the store.

        Raises CodecError for a value that is not there, OSError without descriptors or memory.
        """
        if functions:
            self._send(p.FUNCTIONS, marshal.dumps(functions, 2))
        if not rows:
            return
        fds: list[int] = []
        has_values = False
        try:
            for row in rows:
                if len(row) > 4:
                    has_values = True
                    self._find_values(row, store, fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        # Tokens first: a row without one would count as taken back.
        os.eventfd_write(self._tokens, len(rows))
        self._send(p.ROWS, marshal.dumps(rows, 2), fds)
        if has_values:
            self._unmap(self.mappings.trim(store.mapping_limit))

    def _find_values(self, row: Any, store: Store, fds: list[int]) -> None:
        """Replace references to the store by what the slot understands. To a call's own large
        arguments the task may write, as they are mapped for it alone: the last of them where they
        are all of the call, else those that its payload names."""
        places = row[4] = list(row[4])
        payload = row[3]
        own: Sequence[int] = (len(places) - 1,)
        if payload:
            with contextlib.suppress(CodecError):  # the slot finds that out too: the task fails
                own = ()
                own = split_own(payload)[0]
        for index, place in enumerate(places):
            if type(place) is tuple:
                mappings = None if index in own else self.mappings
                places[index] = _place(place[0], store, fds, mappings)

    def unmap(self, ids: Sequence[int]) -> None:
        """Values have left the store, or its memory: the slot lets go of what it keeps mapped."""
        self._unmap(self.mappings.discard(ids))

    def _unmap(self, ids: Sequence[int]) -> None:
        if ids:
            self._send(p.UNMAP, marshal.dumps(list(ids), 2))

    def forget(self, fns: Sequence[int]) -> None:
        """Let the slot drop functions."""
        self._send(p.FORGET, marshal.dumps(list(fns), 2))

    def take_back(self, count: int) -> int:
        """Take up to `count` of the rows sent last; how many are ours again, for certain."""
        taken = 0
        try:
            while taken < count:
                os.eventfd_read(self._tokens)
                taken += 1
        except BlockingIOError:
            pass
        if taken and not self._resetting:
            self._resetting = True
            self._send(p.RESET, b"")
        return taken

    @property
    def resetting(self) -> bool:
        """Whether the slot is yet to say that it knows of rows taken back."""
        return self._resetting

    def _send(self, kind: int, body: bytes, fds: Sequence[int] = ()) -> None:
        """fds: go to the slot, and are closed here then."""
        if len(body) > p.MAX_BODY:
            fd = os.memfd_create("zfabric-frame", os.MFD_CLOEXEC)
            write_all(fd, [body])
            fds = [fd, *fds]
            kind, body = p.LARGE, bytes((kind,))
        for start in range(0, len(fds), FDS_PER_FRAME):
            part = list(fds[start : start + FDS_PER_FRAME])
            self._put(p.FRAME.pack(1, p.DESCRIPTORS) + b"\0", part)
        self._put(p.FRAME.pack(len(body), kind) + body, [])

    def _put(self, data: bytes, fds: list[int]) -> None:
        self._unsent.append((memoryview(data), fds))
        if len(self._unsent) == 1:
            self.send_more()

    @property
    def has_unsent(self) -> bool:
        """Whether the socket is full: call send_more() when it has room."""
        return bool(self._unsent)

    def send_more(self) -> None:
        """Send what the socket did not take before. A slot that is gone is noticed by read()."""
        unsent = self._unsent
        while unsent:
            data, fds = unsent[0]
            try:
                if fds:
                    sent = socket.send_fds(self._sock, [data], fds)
                else:
                    sent = self._sock.send(data)
            except BlockingIOError:
                return
            except OSError:
                sent = len(data)
            for fd in fds:
                os.close(fd)
            if sent < len(data):
                unsent[0] = (data[sent:], [])
                return
            unsent.popleft()

    # --- from the slot ------------------------------------------------------------------------

    def read(self) -> Report:
        """All that arrived, up to half a megabyte.

        Raises CodecError, OSError, struct.error: what the slot says is lost, and the slot with it.
        """
        events: list[Batch | int] = []
        for _ in range(MAX_READS):
            try:
                nbytes, ancillary, flags, _ = self._sock.recvmsg_into(
                    [self._received], ANCILLARY, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            except OSError:
                return Report(events, True)
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._fds.extend(array("i", data))
            if flags & socket.MSG_CTRUNC:
                raise CodecError(
                    f"slot {self.number} sent values whose descriptors are lost: this process has"
                    " as many open as it may (ulimit -n)"
                )
            if not nbytes:
                return Report(events, True)
            self._inbox += self._received[:nbytes]
            self._parse(events)
            if nbytes < RECV_NBYTES:
                break
        return Report(events, False)

    def _parse(self, events: list[Batch | int]) -> None:
        inbox, at, size = self._inbox, 0, p.FRAME.size
        while len(inbox) - at >= size:
            nbytes, kind = p.FRAME.unpack_from(inbox, at)
            end = at + size + nbytes
            if len(inbox) < end:
                break
            if kind == p.RESULTS or kind == p.FILE:
                first, busy_ns = p.HEAD.unpack_from(inbox, at + size)
                if kind == p.FILE and not self._fds:
                    raise CodecError(f"slot {self.number} told of a file and sent none")
                fd = self._fds.popleft() if kind == p.FILE else -1
                body = bytes(inbox[at + size + p.HEAD.size : end])
                batch = self._batch(first, body, 1 << 62, busy_ns, fd)
                if batch is not None:
                    events.append(batch)
            else:
                if kind == p.RESET_DONE:
                    self._resetting = False
                if kind == p.SLAB:
                    if not self._fds:
                        raise CodecError(f"slot {self.number} told of a slab and sent none")
                    self._n_slabs += 1
                    self._slabs[self._n_slabs] = self._fds.popleft()
                else:
                    events.append(kind)
            at = end
        del inbox[:at]

    def _batch(self, first: int, body: bytes, n_rows: int, busy_ns: int, fd: int) -> Batch | None:
        """The records of a batch that were not seen by an earlier peek."""
        statuses = bytearray()
        payloads: list[Any] = []
        ids: list[int] = []
        unpack, size = p.RECORD.unpack_from, p.RECORD.size
        at, end = 0, len(body)
        skip = self._n_reported - first
        while at < end and n_rows:
            status, nbytes, id_ = unpack(body, at)
            at += size
            n_rows -= 1
            if skip > 0:
                skip -= 1
            else:
                payload: Any = body[at : at + nbytes]
                if status == STORED:
                    payload = self._value(payload, fd)
                statuses.append(status)
                payloads.append(payload)
                ids.append(id_)
            at += nbytes
        if skip < 0:
            raise InternalError(f"slot {self.number} reported row {first} too early")
        if not payloads:
            return None
        self._n_reported += len(payloads)
        return Batch(bytes(statuses), payloads, busy_ns * 1e-9, ids)

    def _value(self, payload: bytes, fd: int) -> Value:
        """The value of a STORED record."""
        try:
            sizes, data = marshal.loads(payload)
        except (ValueError, EOFError, TypeError) as exc:
            raise CodecError(f"a slot's value cannot be read: {exc}") from exc
        if data is None:
            return Value.from_file(sizes, fd)
        if type(data) is bytes:
            return Value.from_bytes(sizes, data)
        number, offset = data
        slab = self._slabs.get(number, -1)
        if slab < 0:
            raise UnknownSlab(f"slot {self.number} names slab {number}, which it has not sent")
        for old in [each for each in self._slabs if each < number]:
            os.close(self._slabs.pop(old))
        return Value.from_slab(sizes, os.dup(slab), offset)

    def peek(self) -> Batch | None:
        """Rows that the slot finished and has not reported. The batch is read from the page.

        While a row runs the slot leaves the batch alone; if another row has begun by the time
        that it was copied, nothing is taken: the slot is not stuck, and will report by itself.
        """
        words = self._words
        claimed, finished, first = words[p.CLAIMED], words[p.FINISHED], words[p.BATCH_FIRST]
        if finished <= self._n_reported or first > self._n_reported:
            return None  # Nothing, or an earlier batch waits in the socket: read() that first.
        body = bytes(self._page[p.BATCH :])
        if words[p.CLAIMED] != claimed or words[p.BATCH_FIRST] != first:
            return None
        try:
            return self._batch(first, body, finished - first, 0, -1)
        except UnknownSlab:
            return None  # It waits in the socket, ahead of the batch.

    def is_settled(self, now_ns: int) -> bool:
        """After peek(): whether the running row has begun long enough ago for the slot to report
        as soon as it ends, so that nothing can be kept back behind it."""
        hidden = self._words[p.FINISHED] > self._n_reported
        return not hidden and self.is_running() and now_ns - self.started_ns() > p.FLUSH_NS

    def is_running(self) -> bool:
        """Whether a row had begun and not ended; after peek(), it is the first one not reported."""
        return self._words[p.CLAIMED] > max(self._words[p.FINISHED], self._n_reported)

    def begun(self) -> int:
        """The place of the last row that has begun among those not reported; -1: it was reported,
        and none runs."""
        return self._words[p.CLAIMED] - 1 - self._n_reported

    def reading(self) -> None:
        """Let the slot know that its output is being read; heard() ends that."""
        self._words[p.READING] = 1

    def heard(self, nbytes: int) -> None:
        """Let the slot know how much of its output was read."""
        self._words[p.HEARD] += nbytes
        self._words[p.READING] = 0

    def has_output(self) -> bool:
        """Whether rows that were reported have written what was not read so far."""
        return self._words[p.WROTE] > self._words[p.HEARD]

    def started_ns(self) -> int:
        """When the running row began, in nanoseconds of CLOCK_MONOTONIC."""
        return self._words[p.STARTED_NS]

    def close(self) -> None:
        """Close this end: an idle slot ends by itself."""
        self._sock.close()
        if self._tokens >= 0:
            os.close(self._tokens)
            self._tokens = -1
        for fd in (*self._fds, *self._slabs.values()):
            os.close(fd)
        self._fds.clear()
        self._slabs.clear()
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()


def most_descriptors() -> int:
    """That rows which are sent to a slot together may bring it."""
    return max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // DESCRIPTOR_SHARE)


def _place(
    id_: int, store: Store, fds: list[int], mappings: KeptMappings | None
) -> tuple[Any, ...]:
    """A stored value as the slot reads it; a copy of its descriptor goes to `fds` where needed.

    mappings: None for a value that is mapped for one row alone.
    Raises CodecError for a value that the disk has lost.
    """
    if len(fds) >= most_descriptors():
        # Neither this process nor the slot could open all that such a row wants: it gets copies.
        found = store.copy(id_)
        if found is None:
            raise CodecError(f"value {id_:x} is not in the store any more")
        return found
    with store.holding(id_) as value:
        if value is None:
            raise CodecError(f"value {id_:x} is not in the store any more")
        if value.fd < 0:
            return value.sizes, bytes(value.area)
        if mappings is not None and mappings.has(id_, value.serial):
            return value.sizes, id_, False, value.offset
        fds.append(os.dup(value.fd))
        if mappings is None:
            return value.sizes, None, value.offset
        mappings.add(id_, value.serial, value.nbytes)
        value.is_shown = True
        return value.sizes, id_, True, value.offset
