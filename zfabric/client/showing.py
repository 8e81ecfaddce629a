"""`Client(show_logs=True)`: what tasks write appears here as they write it, a prefix per line."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from queue import Full, Queue

WAITING = 256
"""Messages that wait for a slow terminal; further ones are left out. `logs()` has them."""


class LogPrinter:
    """Prints in a thread of its own, which begins with the first output.

    name_of: what to call a task.
    """

    def __init__(self, name_of: Callable[[int], str]) -> None:
        self._name_of = name_of
        self._queue: Queue[list[tuple[str, int, bytes]] | None] = Queue(WAITING)
        self._thread: threading.Thread | None = None

    def __call__(self, pieces: list[tuple[int, int, bytes]]) -> None:
        """Print it soon: tasks, bytes that are missing, texts. For one thread only: the one that
        receives."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="zfabric-logs", daemon=True)
            self._thread.start()
        try:
            # Their names now: when it is printed, the futures may have gone.
            self._queue.put_nowait([(self._name_of(id_), *piece) for id_, *piece in pieces])
        except Full:
            pass

    def close(self, timeout_s: float = 1.0) -> None:
        """Print what is there, as far as that goes in time."""
        if self._thread is not None:
            try:
                self._queue.put(None, timeout=timeout_s)
            except Full:
                return
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            lines = []
            for name, missing, text in item:
                if missing:
                    lines.append(f"[{name}] [... {missing} bytes left out ...]\n")
                shown = text.decode(errors="replace").splitlines()
                lines += [f"[{name}] {line}\n" for line in shown]
            try:
                sys.stdout.write("".join(lines))
                sys.stdout.flush()
            except (OSError, ValueError):
                pass  # nobody reads it any more
