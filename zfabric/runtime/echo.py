"""Writing what tasks wrote to the worker's own stdout and stderr, without ever waiting for it."""

from __future__ import annotations

import os
import threading
from collections import deque

MOST = 4 << 20
"""Bytes that wait for a slow reader at most."""


class Echo:
    """A thread that writes; it begins with the first piece."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._n_waiting = 0
        self._n_dropped = 0
        self._due = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def write(self, fd: int, data: bytes) -> None:
        """Write to a descriptor, soon."""
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
            self._pieces.append((fd, data))
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
                    if self._closing:
                        return
                    self._due.wait()
                fd, data = self._pieces.popleft()
            left = memoryview(data)
            try:
                while left:
                    left = left[os.write(fd, left) :]
            except OSError:
                pass  # nobody reads it any more
            with self._due:
                self._n_waiting -= len(data)
