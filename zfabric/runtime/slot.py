"""A slot: runs one row after another. `python -m zfabric.runtime.slot ...` is one as a process.

See slot_protocol for what it shares with its supervisor. It imports little, because a process
that starts in 40 ms can be replaced in 40 ms: no zmq, no numpy, no msgpack. Whatever a task
raises, SystemExit and KeyboardInterrupt included, is that task's error and nothing else.
"""

from __future__ import annotations

import gc
import marshal
import mmap
import os
import reprlib
import socket
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable
from errno import EAGAIN
from time import monotonic_ns
from types import CoroutineType
from typing import Any

from zfabric.codec import layout
from zfabric.codec.arguments import load_call, split_own
from zfabric.codec.exceptions import dump_exception
from zfabric.codec.functions import load_function
from zfabric.codec.serialise import dumps, unpack
from zfabric.core.retry import class_names, with_names
from zfabric.core.supervisor_effects import SKIPPED
from zfabric.ids import counter_of
from zfabric.messages import ERROR, VALUE
from zfabric.runtime import slot_context
from zfabric.runtime import slot_protocol as p
from zfabric.runtime.slabs import Slabs
from zfabric.runtime.slot_context import SlotContext
from zfabric.runtime.slot_protocol import BATCH_END, FLUSH_NS
from zfabric.runtime.slot_streams import Streams
from zfabric.runtime.slot_values import MISSING, InFile, inlay, mapped, mapped_shared, outlay
from zfabric.runtime.surroundings import LOOK_NS, SlotSpoilt, Surroundings

FLUSH_ROWS = 128
FIRST_ROWS = 4
"""Rows in a batch after rows that have written something; it doubles while they do not."""
RECV_NBYTES = 1 << 16
ANCILLARY = socket.CMSG_SPACE(4 * 64)
PICKLE = b"\x80"
"""How a payload begins that is one pickle stream, and not a blob of several frames."""


class Slot:
    """The whole slot but for how it was started.

    sock: a blocking stream socket to the supervisor.  tokens: an eventfd, a non-blocking
    semaphore.  page: PAGE_NBYTES of shared memory.
    """

    def __init__(
        self, sock: socket.socket, tokens: int, page: mmap.mmap, number: int, in_thread: bool
    ) -> None:
        self._sock = sock
        self._tokens = tokens
        self._page = memoryview(page)
        self._words = self._page[: p.N_WORDS * 8].cast("Q")
        self._in_thread = in_thread
        self._send_lock = threading.Lock()
        self._slabs = Slabs(self._send_slab)
        self._functions: dict[int, Callable[..., Any]] = {}
        self._blobs: dict[int, bytes] = {}
        self._names: dict[int, str] = {}
        self._inline_limit = 4096
        self._inbox = bytearray()
        self._received = memoryview(bytearray(RECV_NBYTES))
        self._fds: deque[int] = deque()
        self._rows: list[Any] = []
        self._kept: dict[int, bytes] = {}
        self._mappings: dict[int, memoryview] = {}
        """Stored values that several rows may read: the supervisor says how long."""
        self._skipping = False
        """The token of the next row was gone: rows are dropped until RESET."""
        self._claimed = 0
        self._end = p.BATCH
        """Where the next record of the batch goes."""
        self._spent_ns = 0
        """Of the rows in the batch."""
        self._most = FLUSH_ROWS
        """Rows in a batch."""
        self._look_at = 0
        """monotonic_ns: when to look at what rows have left behind; 0: at once."""
        self._n_careful = 0
        """Rows still to be looked after one by one, as a row has changed something."""
        self._spoilt = ""
        """Why the slot ends as soon as it has told what it finished."""
        self._is_copy: list[bool] = []
        """Not empty in a process that a task forked."""
        self.streams: Streams | None = None
        self.surroundings: Surroundings | None = None
        self.context = SlotContext(number, self._tell_blocked)

    def capture(self, secret: bytes) -> None:
        """Say of what this process writes by which row it was."""
        self.streams = Streams(secret, self.context, self._words)

    def own_process(self) -> None:
        """Have each row find this process as the first one did, and copies of it run none."""
        mend = self.streams.mend if self.streams is not None else bool
        self.surroundings = Surroundings(mend)
        self.context.settle = self.surroundings.settle
        os.register_at_fork(after_in_child=lambda: self._is_copy.append(True))

    def serve(self) -> None:
        """Run rows until the supervisor closes the socket."""
        slot_context.enter(self.context, whole_process=not self._in_thread)
        try:
            self._send(p.FRAME.pack(0, p.READY))
            while self._read():
                if self._rows:
                    rows, self._rows = self._rows, []
                    if not self._skipping:
                        self._run(rows)
        except OSError:
            pass  # The supervisor is gone, or a task has closed our descriptors.
        except SlotSpoilt as exc:
            print(f"zfabric: process {os.getpid()} ends, another one follows: {exc}", flush=True)
        finally:
            slot_context.enter(None, whole_process=not self._in_thread)
            if self.context.client is not None:
                self.context.client.close()
            self._slabs.close()

    # --- rows ---------------------------------------------------------------------------------

    def _run(self, rows: list[Any]) -> None:
        """Run rows in order until one has no token. Flushes after 1 ms, but not at the end."""
        take, tokens, words, page = os.eventfd_read, self._tokens, self._words, self._page
        context, functions, limit = self.context, self._functions, self._inline_limit
        is_copy = self._is_copy
        record, record_nbytes = p.RECORD.pack_into, p.RECORD.size
        claimed, now = self._claimed, monotonic_ns()
        flush_at, batch_ns = claimed + self._most, now - self._spent_ns
        for row in rows:
            try:
                take(tokens)
            except BlockingIOError:
                self._skipping = True
                break
            words[1] = now
            claimed += 1
            words[0] = claimed
            status = VALUE
            args: Any
            kwargs: Any
            result: Any
            frames: Any
            blob: Any
            args = kwargs = None
            try:
                payload = row[3]
                context.task_id = row[0]
                context.attempt = row[1]
                if len(row) == 4 and payload[:1] == PICKLE:
                    function = functions.get(row[2])
                    if function is None:
                        function = self._load_function(row[2])
                        flush_at = claimed  # to see whether it writes anything
                    args, kwargs = load_call(payload)
                    result = function(*args, **kwargs)
                    args = kwargs = None
                    if type(result) is CoroutineType:
                        result = run_coroutine(result)
                    frames = dumps(result, "result")
                    result = None
                    blob = frames[0]
                    if len(frames) > 1 or len(blob) > limit:
                        status, blob = outlay(frames, limit, self._slabs)
                    frames = None
                else:
                    status, blob = self._run_linked(row)
                    if not self._look_at:
                        flush_at = claimed
            except BaseException as exc:
                result = frames = None
                blob = dump_exception(exc, where=self._where(row, args, kwargs))
                status, blob = ERROR, with_names(blob, class_names(type(exc)))
                args = kwargs = None
                _cut_loose(exc)
            if is_copy:
                os._exit(0)  # The task has forked, and came back twice.
            nbytes = 0 if type(blob) is InFile else len(blob)
            end = self._end + record_nbytes + nbytes
            if end <= BATCH_END and type(blob) is not InFile:
                record(page, self._end, status, nbytes, row[0])
                page[end - nbytes : end] = blob
                self._end = end
                words[2] = claimed
                now = monotonic_ns()
                if now - batch_ns <= FLUSH_NS and claimed < flush_at:
                    continue
                self._spent_ns = now - batch_ns
                self._flush()
            else:
                self._spent_ns = now - batch_ns
                self._flush()
                self._send_alone(row[0], status, blob, monotonic_ns() - now)
                words[2] = words[3] = claimed
                if self._spoilt:
                    raise SlotSpoilt(self._spoilt)
            blob = None
            batch_ns = now = monotonic_ns()
            flush_at = claimed + self._most
        self._claimed = claimed
        self._spent_ns = now - batch_ns

    def _run_linked(self, row: Any) -> tuple[int, Any]:
        """Run a row that has dependencies, rows that follow it, or large arguments."""
        id_, _, fn, payload, *links = row
        values: Any = ()
        frames: Any = None
        if links and links[0]:
            values, frames = inlay(links[0], self._kept, args_last=not payload)
            links[0] = None
            row[4] = None
            if values is MISSING:
                return SKIPPED, b""
        if frames is None:
            frames = unpack(split_own(payload)[1])
        function = self._functions.get(fn)
        if function is None:
            function = self._load_function(fn)
        args: Any
        kwargs: Any
        args, kwargs = load_call(frames, values)
        values = frames = None
        result = function(*args, **kwargs)
        args = kwargs = None
        if type(result) is CoroutineType:
            result = run_coroutine(result)
        frames = dumps(result, "result")
        status, blob = outlay(frames, self._inline_limit, self._slabs)
        if links and links[1] and status == VALUE:
            self._kept[id_] = blob
        return status, blob

    def _where(self, row: Any, args: Any, kwargs: Any) -> str:
        """The line above a remote traceback: which call it was, and where it ran."""
        call = f"{self._names.get(row[2], 'task')}-{counter_of(row[0])}"
        if args is not None:
            call += f"({_summary(args, kwargs)})"
        return f"{call} on worker {self.context.worker}, process {os.getpid()}:"

    def _load_function(self, fn: int) -> Callable[..., Any]:
        """Functions are loaded by the first row that calls them, whose error a failure is."""
        function = load_function(self._blobs[fn])
        self._functions[fn] = function
        self._look_at = 0
        return function

    # --- towards the supervisor ---------------------------------------------------------------

    def _flush(self) -> None:
        """Send the batch. Nothing is lost if the process dies half-way: see slot_protocol."""
        words, end = self._words, self._end
        first = words[p.BATCH_FIRST]
        if words[p.FINISHED] > first:
            self._look_around()
            spent, self._spent_ns = self._spent_ns, 0
            start = p.BATCH - p.RESULTS_HEAD.size
            p.RESULTS_HEAD.pack_into(
                self._page, start, end - start - p.FRAME.size, p.RESULTS, first, spent
            )
            self._send(self._page[start:end])
            self._end = p.BATCH
            words[p.BATCH_FIRST] = words[p.FINISHED]
            if self._spoilt:
                raise SlotSpoilt(self._spoilt)

    def _send_alone(self, id_: int, status: int, blob: Any, spent_ns: int) -> None:
        """Send one record that does not fit the batch; the batch has been flushed."""
        self._look_around()
        fds = []
        kind = p.RESULTS
        if type(blob) is InFile:
            held = blob
            fds, kind = [blob.fd], p.FILE
            blob = marshal.dumps((blob.sizes, None), 2)
        body = p.HEAD.pack(self._words[p.FINISHED], spent_ns) + p.RECORD.pack(
            status, len(blob), id_
        )
        data = p.FRAME.pack(len(body) + len(blob), kind) + body
        with self._send_lock:
            if fds:
                socket.send_fds(self._sock, [data[:1]], fds)
                held.close()
                data = data[1:]
            self._sock.sendall(data + blob)

    def _look_around(self) -> None:
        """What rows have left behind: put back what they changed in this process, and tell whose
        it is what was written below Python. While there is any of that, rows are reported one by
        one, as nothing else keeps what they write apart."""
        # In this order: where a row has put a file of its own in place of stdout, the mark that
        # follows its output would land in there.
        if self.surroundings is not None and self._tidy():
            self._n_careful = FLUSH_ROWS
        wrote = self.streams is not None and self.streams.end_of_row()
        if self._n_careful:
            self._n_careful -= 1
            self._most = 1
        elif wrote:
            self._most = 1
        elif self._most < FLUSH_ROWS:
            self._most = max(2 * self._most, FIRST_ROWS)

    def _tidy(self) -> bool:
        """Look, if it is time to; whether anything was changed."""
        assert self.surroundings is not None
        now = monotonic_ns()
        if now < self._look_at and self._most == FLUSH_ROWS:
            return False
        self._look_at = now + LOOK_NS
        try:
            return self.surroundings.tidy()
        except SlotSpoilt as exc:
            self._spoilt = str(exc)
            return False

    def _send(self, data: bytes | memoryview) -> None:
        with self._send_lock:
            self._sock.sendall(data)

    def _send_slab(self, fd: int) -> None:
        frame = p.FRAME.pack(0, p.SLAB)
        with self._send_lock:
            socket.send_fds(self._sock, [frame[:1]], [fd])
            self._sock.sendall(frame[1:])

    def _tell_blocked(self, blocked: bool) -> None:
        try:
            self._send(p.FRAME.pack(0, p.BLOCKED if blocked else p.UNBLOCKED))
        except OSError:
            pass  # The supervisor is gone; the slot's loop finds out by itself.

    # --- from the supervisor ------------------------------------------------------------------

    def _read(self) -> bool:
        """Take in frames; False when the supervisor closed. Sends the batch before it waits."""
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        if self._words[p.FINISHED] == self._words[p.BATCH_FIRST]:
            flags = socket.MSG_CMSG_CLOEXEC
        try:
            nbytes, ancillary, _, _ = self._sock.recvmsg_into([self._received], ANCILLARY, flags)
        except OSError as exc:
            if exc.errno != EAGAIN:
                return False
            self._flush()
            return True
        for level, kind, fds in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds.extend(array("i", fds))
        if not nbytes:
            return False
        inbox = self._inbox
        inbox += self._received[:nbytes]
        at = 0
        size = p.FRAME.size
        while len(inbox) - at >= size:
            nbytes, kind = p.FRAME.unpack_from(inbox, at)
            if len(inbox) - at < size + nbytes:
                break
            self._on_frame(kind, inbox[at + size : at + size + nbytes])
            at += size + nbytes
        del inbox[:at]
        return True

    def _on_frame(self, kind: int, body: bytearray | memoryview) -> None:
        if kind == p.ROWS:
            rows = marshal.loads(body)
            for row in rows:
                if len(row) > 4:
                    self._map_values(row)
            self._rows += rows
        elif kind == p.RESET:
            self._on_reset()
        elif kind == p.FUNCTIONS:
            for fn, name, blob in marshal.loads(body):
                self._blobs[fn] = blob
                self._names[fn] = name
        elif kind == p.LARGE:
            self._on_frame(body[0], mapped(self._fds.popleft()))
        elif kind == p.CONFIG:
            config = marshal.loads(body)
            self.context.address = config["address"]
            self.context.worker = config["worker"]
            self._inline_limit = config["inline_limit"]
            if config["log_level"] and not self._in_thread:
                import logging

                text = "%(asctime)s %(levelname)s %(name)s: %(message)s"
                logging.basicConfig(level=config["log_level"], format=text)
        elif kind == p.FORGET:
            for fn in marshal.loads(body):
                self._blobs.pop(fn, None)
                self._names.pop(fn, None)
                self._functions.pop(fn, None)
        elif kind == p.UNMAP:
            for id_ in marshal.loads(body):
                self._mappings.pop(id_, None)

    def _on_reset(self) -> None:
        """The rows before it run if they have tokens; all the others are the supervisor's."""
        rows, self._rows = self._rows, []
        if not self._skipping:
            self._run(rows)
        self._flush()
        self._skipping = False
        self._kept.clear()
        self._send(p.FRAME.pack(0, p.RESET_DONE))

    def _map_values(self, row: Any) -> None:
        """Descriptors come in the order of the frames that name them."""
        places = row[4]
        for index, place in enumerate(places):
            if type(place) is tuple:
                sizes, data = place[:2]
                if len(place) == 4:
                    if place[2]:
                        nbytes = layout.nbytes_of(sizes)
                        self._mappings[data] = mapped_shared(self._fds.popleft(), nbytes, place[3])
                    places[index] = (sizes, self._mappings[data])
                elif data is None:
                    nbytes = layout.nbytes_of(sizes)
                    places[index] = (sizes, mapped(self._fds.popleft(), nbytes, place[2]))
                else:
                    places[index] = (sizes, memoryview(bytearray(data)))


def run_coroutine(coroutine: CoroutineType[Any, Any, Any]) -> Any:
    """What an `async def` task returns; it has an event loop of its own."""
    import asyncio

    return asyncio.run(coroutine)


def _summary(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Arguments in a few words each, whatever their own repr does."""
    shown = []
    for name, value in [*(("", arg) for arg in args[:4]), *list(kwargs.items())[:4]]:
        try:
            text = reprlib.repr(value)
        except Exception:  # a user's object may raise anything
            text = f"<{type(value).__name__}>"
        shown.append(f"{name}={text}" if name else text)
    if len(args) > 4 or len(kwargs) > 4:
        shown.append("...")
    return ", ".join(shown)


def _cut_loose(exc: BaseException | None) -> None:
    """Free what the frames of a reported exception hold: arguments may be large."""
    seen = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        exc.__traceback__ = None
        exc = exc.__context__


def main(arguments: list[str]) -> None:
    """The process: `slot NUMBER SUPERVISOR_PID SOCKET TOKENS PAGE SECRET`.

    The third to fifth are descriptors. SECRET, in hex: stdout and stderr are a pipe, see
    slot_streams; "": they are the worker's.
    """
    number, parent, sock_fd, tokens, page_fd = map(int, arguments[:5])
    secret = bytes.fromhex(arguments[5])
    _die_with(parent)
    _die_first()
    page = mmap.mmap(page_fd, p.PAGE_NBYTES)
    os.close(page_fd)
    sock = socket.socket(fileno=sock_fd)
    for fd in (sock_fd, tokens):
        os.set_inheritable(fd, False)
    slot = Slot(sock, tokens, page, number, in_thread=False)
    if secret:
        slot.capture(secret)
    else:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    slot.own_process()
    gc.collect()
    gc.freeze()
    try:
        slot.serve()
    except KeyboardInterrupt:
        pass
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                pass
    # Threads that tasks left behind must not keep the process.
    os._exit(0)


def _die_first() -> None:
    """Where the host runs out of memory, a task shall die and not the supervisor."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("800")
    except OSError:
        pass


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its supervisor dies, however that comes about."""
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, 9, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    # As a module of its own name, so that whatever imports it finds this one.
    from zfabric.runtime import slot as _slot

    _slot.main(sys.argv[1:])
