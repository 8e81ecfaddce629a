"""Writing what tasks wrote to the worker's own stdout and stderr, without ever waiting for it.

Lines stay whole where slots write at the same time: the beginning of a line waits a moment for its
end, and no write is longer than a pipe takes at once, as other workers may write there as well.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from select import PIPE_BUF
from time import monotonic

MOST = 4 << 20
"""Bytes that wait for a slow reader at most."""

LINE_S = 0.1
"""How long the beginning of a line waits for its end."""


class Echo:
    """A thread that writes; it begins with the first piece."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._open: dict[int, tuple[int, bytes, float]] = {}
        """By source: where a line goes whose end has not come, its beginning, and since when."""
        self._n_waiting = 0
        """Bytes of both."""
        self._n_dropped = 0
        self._due = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def write(self, fd: int, data: bytes, source: int = 0) -> None:
        """Write to a descriptor, soon. source: whose lines it holds pieces of."""
        with self._due:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="zfabric-echo", daemon=True)
                self._thread.start()
            if self._n_waiting + len(data) > MOST:
                self._n_dropped += len(data)
                return
            if self._n_dropped:
                data = b"\n[... %d bytes left out ...]\n%b" % (self._n_dropped, data)
                self._n_dropped = 0
            self._n_waiting += len(data)
            since = monotonic()
            if source in self._open:
                before, begun, at = self._open.pop(source)
                if before == fd:
                    data, since = begun + data, at
                else:
                    self._pieces.append((before, begun))
            end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
            if len(data) - end > PIPE_BUF:
                end = len(data)  # that is no line
            if end:
                self._pieces.append((fd, data[:end]))
            if end < len(data):
                self._open[source] = fd, data[end:], monotonic() if end else since
            self._due.notify()

    def close(self, timeout_s: float = 0.3) -> None:
        """Write what is left, as far as anybody reads it."""
        with self._due:
            self._closing = True
            self._due.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._due:
                while not self._pieces:
                    wait_s = self._take_open()
                    if self._pieces:
                        break
                    if self._closing:
                        return
                    self._due.wait(wait_s)
                fd, data = self._pieces.popleft()
            try:
                for part in _parts(data):
                    left = memoryview(part)
                    while left:
                        left = left[os.write(fd, left) :]
            except OSError:
                pass  # nobody reads it any more
            with self._due:
                self._n_waiting -= len(data)

    def _take_open(self) -> float | None:
        """Have the lines written whose ends have not come in time. Returns when to look again."""
        now = monotonic()
        wait_s = None
        for source, (fd, data, since) in list(self._open.items()):
            left_s = 0.0 if self._closing else since + LINE_S - now
            if left_s <= 0.0:
                del self._open[source]
                self._pieces.append((fd, data))
            elif wait_s is None or left_s < wait_s:
                wait_s = left_s
        return wait_s


def _parts(data: bytes) -> Iterator[bytes]:
    """Whole lines, as many as a pipe takes at once."""
    begin = 0
    while len(data) - begin > PIPE_BUF:
        end = data.rfind(b"\n", begin, begin + PIPE_BUF) + 1
        if not end:
            end = begin + PIPE_BUF
        yield data[begin:end]
        begin = end
    yield data[begin:]
