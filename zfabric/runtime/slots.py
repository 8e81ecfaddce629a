"""Starting slots, as processes or threads, and finding out how one died."""

from __future__ import annotations

import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from time import monotonic_ns

from zfabric.runtime.slot_link import SlotLink
from zfabric.runtime.slot_output import SlotOutput
from zfabric.runtime.slot_protocol import PAGE_NBYTES

log = logging.getLogger(__name__)

KILL_WAIT_S = 1.0


ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Unless the worker's environment says otherwise: there is a slot per core, and linear algebra
that starts a thread per core in each of them spends its time on their waiting for one another."""


class Slots:
    """All slots of one worker.  links: by slot number.  outputs: of those that are processes, by
    slot number, where they are captured."""

    def __init__(self, kind: str, capture: bool = False) -> None:
        """kind: "process" or "thread".  capture: read what slots write, rather than have it go
        where this process's own output goes. Whoever asks for that has to read it."""
        self._capture = capture
        self.outputs: dict[int, SlotOutput] = {}
        self._threads = kind == "thread"
        self.links: dict[int, SlotLink] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._ending: list[subprocess.Popen[bytes]] = []
        self._oom_kills = _oom_kills()

    def start(self, number: int) -> SlotLink:
        """Start a slot; it reports READY. Raises OSError when there is no room for it."""
        ours, theirs = socket.socketpair()
        tokens = page_fd = -1
        try:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            tokens = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            page_fd = os.memfd_create("zfabric-slot", os.MFD_CLOEXEC)
            os.ftruncate(page_fd, PAGE_NBYTES)
            page = mmap.mmap(page_fd, PAGE_NBYTES)
            if self._threads:
                self._start_thread(number, theirs, os.dup(tokens), page)
            else:
                self._start_process(number, theirs, tokens, page_fd)
                theirs.close()
        except BaseException:
            ours.close()
            theirs.close()
            if tokens >= 0:
                os.close(tokens)
            raise
        finally:
            if page_fd >= 0:
                os.close(page_fd)
        link = SlotLink(number, ours, tokens, page)
        self.links[number] = link
        return link

    def _start_process(self, number: int, sock: socket.socket, tokens: int, page: int) -> None:
        fds = (sock.fileno(), tokens, page)
        arguments = [str(n) for n in (number, os.getpid(), *fds)]
        secret, output = b"", None
        if self._capture:
            secret = os.urandom(8)
            read, output = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(read, False)
            self.outputs[number] = SlotOutput(read, secret)
        # A session of its own: Ctrl-C at the terminal is the supervisor's affair, and killing
        # the slot's process group takes along what tasks have started.
        try:
            self._processes[number] = subprocess.Popen(
                [sys.executable, "-m", "zfabric.runtime.slot", *arguments, secret.hex()],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**ONE_THREAD, **os.environ},
            )
        except BaseException:
            self._close_output(number)
            raise
        finally:
            if output is not None:
                os.close(output)

    def _close_output(self, number: int) -> None:
        output = self.outputs.pop(number, None)
        if output is not None:
            output.close()

    def _start_thread(self, number: int, sock: socket.socket, tokens: int, page: mmap.mmap) -> None:
        from zfabric.runtime.slot import Slot

        def serve() -> None:
            try:
                Slot(sock, tokens, page, number, in_thread=True).serve()
            finally:
                sock.close()
                os.close(tokens)

        threading.Thread(target=serve, name=f"zfabric-slot-{number}", daemon=True).start()

    def pid(self, number: int) -> int:
        """The slot's process id, 0 for a thread."""
        process = self._processes.get(number)
        return process.pid if process else 0

    def kill(self, number: int) -> None:
        """End a slot that is a process, and all that its tasks have started."""
        process = self._processes.get(number)
        if process is not None:
            _kill_group(process.pid)

    def exit_fd(self, number: int) -> int:
        """A descriptor that becomes readable when the slot's process ends; -1 for a thread. The
        slot's socket does not always tell: what a task forked may hold it open."""
        process = self._processes.get(number)
        if process is None:
            return -1
        try:
            return os.pidfd_open(process.pid)
        except OSError:  # an old kernel, or no descriptors left: the socket has to do
            return -1

    def bury(self, number: int) -> str:
        """A slot has closed its socket: how it died, in a sentence. Its link is closed."""
        link = self.links.pop(number)
        running_s = (monotonic_ns() - link.started_ns()) * 1e-9 if link.is_running() else None
        link.close()
        self._close_output(number)
        process = self._processes.pop(number, None)
        if process is None:
            return f"slot {number}, a thread, ended"
        text = f"slot {number} (pid {process.pid}) " + self._end(process)
        if running_s is not None:
            text += f"; its task had run for {running_s:.3g} s"
        return text

    def _end(self, process: subprocess.Popen[bytes]) -> str:
        """Kill whatever is left of a process and its group, and tell how it died."""
        _kill_group(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except ChildProcessError:
            return "is gone"
        code = os.waitstatus_to_exitcode(status)
        process.returncode = code
        if code < 0:
            try:
                how = f"was killed by {signal.Signals(-code).name}"
            except ValueError:
                how = f"was killed by signal {-code}"
        else:
            how = f"ended with exit code {code}"
        text = f"{how}; its peak memory was {usage.ru_maxrss / 1024:.0f} MiB"
        kills = _oom_kills()
        if -code == signal.SIGKILL and kills > self._oom_kills:
            text += ", and this host ran out of memory meanwhile"
        self._oom_kills = kills
        return text

    def stop(self, number: int) -> None:
        """End an idle slot: it closes its nested client and leaves by itself."""
        self.links.pop(number).close()
        self._close_output(number)
        process = self._processes.pop(number, None)
        if process is not None:
            self._ending.append(process)
        self.reap()

    def reap(self) -> None:
        """Look for stopped slots that have ended."""
        self._ending = [process for process in self._ending if process.poll() is None]

    def kill_all(self) -> None:
        """End all slots and what they started, now. Threads end after their running task."""
        for link in self.links.values():
            link.close()
        self.links.clear()
        for number in list(self.outputs):
            self._close_output(number)
        processes = [*self._processes.values(), *self._ending]
        self._processes.clear()
        self._ending = []
        for process in processes:
            if process.poll() is None:
                _kill_group(process.pid)
        for process in processes:
            try:
                process.wait(KILL_WAIT_S)
            except subprocess.TimeoutExpired:
                log.warning("slot process %d does not die; it is left to the system", process.pid)


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _oom_kills() -> int:
    """How many processes this host's kernel has killed for lack of memory."""
    try:
        with open("/proc/vmstat") as lines:
            for line in lines:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0
