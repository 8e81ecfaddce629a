"""What a task changes in its process beside its result, and how it is put back for the next one.

The working directory, the environment, umask, signals, timers, limits and descriptors 0 to 2
belong to the process, so a task that leaves them changed would hurt whichever one happens to come
next in its slot. A slot looks after the first call of each function, then every LOOK_NS; once
something was changed it looks after each of the rows that follow, until many in a row have left
things alone. What cannot be put back, and descriptors that run out, end the slot: the worker starts
another one, and no row is blamed.

Not looked at, because nobody could say what of it is meant to stay: modules and their globals,
`sys.path`, threads. They end with the slot at the latest.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import sys
from collections.abc import Callable

LOOK_NS = 10_000_000
SAVED_FD = 100
"""Our copies of descriptors 0 to 2 and of the directory are above it: `os.closerange(3, 64)` and
the like should end a slot by its socket, which everybody notices."""
SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGALRM,
    signal.SIGCHLD,
    signal.SIGPIPE,
)
LIMITS = tuple(
    getattr(resource, f"RLIMIT_{name}")
    for name in "AS CORE CPU DATA FSIZE NOFILE NPROC STACK".split()
)


class SlotSpoilt(Exception):
    """A task left something behind that cannot be put back; the text says what."""


class Surroundings:
    """The state of this process as tasks are to find it; of its main thread."""

    def __init__(self, mend_streams: Callable[[], bool]) -> None:
        """mend_streams: sets sys.stdout and sys.stderr again; whether they were changed."""
        self._mend_streams = mend_streams
        self._directory = -1
        self._saved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, SAVED_FD) for fd in range(3)]
        self._files = [_file(fd) for fd in range(3)]
        self.settle()

    def settle(self) -> None:
        """What is now is what tasks are to find: an initializer has run."""
        if self._directory >= 0:
            os.close(self._directory)
        self._path = _path()
        fd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._directory = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, SAVED_FD)
        os.close(fd)
        self._environ = _environ().copy()
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._handlers = [signal.getsignal(number) for number in SIGNALS]
        self._limits = [resource.getrlimit(limit) for limit in LIMITS]
        self._depth = sys.getrecursionlimit()
        self._most_fds = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2

    def tidy(self) -> bool:
        """Put back what was changed; whether anything was. Raises SlotSpoilt where it cannot."""
        try:
            changed = [
                self._tidy_files(),
                self._mend_streams(),
                self._tidy_directory(),
                self._tidy_environ(),
                self._tidy_signals(),
                self._tidy_limits(),
            ]
            lowest = os.dup(self._saved[0])
            os.close(lowest)
        except (OSError, ValueError) as exc:
            raise SlotSpoilt(f"a task has left behind what cannot be put back: {exc}") from exc
        if lowest > self._most_fds:
            raise SlotSpoilt(f"tasks have left {lowest} descriptors open")
        return any(changed)

    def _tidy_files(self) -> bool:
        changed = False
        for fd in range(3):
            if _file(fd) != self._files[fd]:
                os.dup2(self._saved[fd], fd)
                changed = True
        return changed

    def _tidy_directory(self) -> bool:
        if _path() == self._path:
            return False
        os.fchdir(self._directory)  # also where it was removed meanwhile
        return True

    def _tidy_environ(self) -> bool:
        now = _environ()
        if now == self._environ:
            return False
        for name in now.keys() - self._environ.keys():
            del os.environb[name]
        for name, value in self._environ.items():
            if now.get(name) != value:
                os.environb[name] = value
        return True

    def _tidy_signals(self) -> bool:
        changed = False
        if signal.setitimer(signal.ITIMER_REAL, 0)[0]:
            changed = True
        for number, handler in zip(SIGNALS, self._handlers):
            now = signal.getsignal(number)
            if now is not handler and now != handler and handler is not None:
                signal.signal(number, handler)
                changed = True
        if signal.pthread_sigmask(signal.SIG_BLOCK, ()) != self._mask:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            changed = True
        return changed

    def _tidy_limits(self) -> bool:
        changed = os.umask(self._umask) != self._umask
        for limit, was in zip(LIMITS, self._limits):
            if resource.getrlimit(limit) != was:
                resource.setrlimit(limit, was)
                changed = True
        if sys.getrecursionlimit() != self._depth:
            sys.setrecursionlimit(self._depth)
            changed = True
        return changed


def _path() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _environ() -> dict[bytes, bytes]:
    # Its dict of encoded names: comparing two of them takes a third of a microsecond, comparing
    # two os.environ fifty.
    return os.environ._data  # type: ignore[attr-defined, no-any-return]


def _file(fd: int) -> tuple[int, int]:
    """Which file a descriptor is, (-1, -1): it is closed."""
    try:
        found = os.fstat(fd)
    except OSError:
        return -1, -1
    return found.st_dev, found.st_ino
