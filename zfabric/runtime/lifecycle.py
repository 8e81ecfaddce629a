"""How a process of the fabric learns that it should end: a signal, or its parent's death."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
from types import FrameType, TracebackType


class StopRequest:
    """SIGTERM, SIGINT and a lifeline as descriptors that a Poller can wait for.

    lifeline_fd: the read end of a pipe whose write end the parent holds and never writes to; its
    end of file says that the parent is gone, even by `kill -9`.

    Use as a context manager in the main thread. `requested` says why, or is "".
    """

    def __init__(self, lifeline_fd: int | None = None) -> None:
        self.lifeline_fd = lifeline_fd
        self.requested = ""
        self.orphaned = False
        """The lifeline ended."""
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> StopRequest:
        self._old = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        self._old_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        os.close(self._read_fd)
        os.close(self._write_fd)
        if self.lifeline_fd is not None:
            os.close(self.lifeline_fd)

    @property
    def fds(self) -> list[int]:
        """To be added to the Poller; call `check` when one is ready."""
        return [self._read_fd] + ([self.lifeline_fd] if self.lifeline_fd is not None else [])

    def check(self, fd: int) -> None:
        """One of the descriptors is readable."""
        if fd == self.lifeline_fd:
            self.requested = self.requested or "its parent is gone"
            self.orphaned = True
        else:
            with contextlib.suppress(BlockingIOError):
                os.read(self._read_fd, 4096)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name


def allow_many_descriptors() -> None:
    """Each peer is a socket and each large value a file; the usual limit of 1024 is for programs
    that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def freeze_garbage() -> None:
    """Keep what start-up made out of the collector's way, and let it look at young objects only:
    a full collection over a million task records would stop the fabric for a second, and the
    machines keep no cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1_000_000)


def tell_ready(ready_fd: int | None, text: str) -> None:
    """Tell the parent that this process can be used, and where."""
    if ready_fd is not None:
        with contextlib.suppress(OSError):
            os.write(ready_fd, text.encode() + b"\n")
        os.close(ready_fd)


def remove_orphan(directory: str | None, stop: StopRequest) -> None:
    """Clean up for a parent that cannot do it any more."""
    if directory is not None and stop.orphaned:
        import shutil

        shutil.rmtree(directory, ignore_errors=True)
