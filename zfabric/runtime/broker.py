"""The broker's process: one thread that moves messages between sockets and the machine.

Everything that is decided, is decided in `core.broker` and `core.scheduler`. This process never
unpickles anything, and does not even import pickle.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from zfabric import __version__
from zfabric.config import Settings
from zfabric.core.broker import BrokerMachine, SessionRecord
from zfabric.errors import AddressInUse, ChannelClosed, ConfigError, TransportError
from zfabric.runtime.binding import check_exposure, listen_near
from zfabric.runtime.lifecycle import StopRequest, freeze_garbage, tell_ready
from zfabric.transport import Listener, Poller

log = logging.getLogger(__name__)

DRAIN = 512
"""Messages taken in per turn at most, so that no flood keeps answers from leaving."""

RETRY_FULL_S = 0.005
"""When to try a peer again whose link was full."""


class BrokerLoop:
    """Receive, decide, send, until asked to stop."""

    def __init__(self, listener: Listener, machine: BrokerMachine, stop: StopRequest) -> None:
        self._listener = listener
        self._machine = machine
        self._stop = stop
        self._drain = DRAIN
        self._poller = Poller()
        self._poller.add(listener)
        for fd in stop.fds:
            self._poller.add(fd)

    def run(self) -> str:
        """Returns why it ended."""
        machine, stop, poller = self._machine, self._stop, self._poller
        tick_at = monotonic()
        full = False
        while not stop.requested:
            timeout = 0.0 if machine.dirty and not full else tick_at - monotonic()
            if full:
                timeout = min(timeout, RETRY_FULL_S)
            ready = poller.wait(max(0.0, timeout))
            for thing in ready:
                if thing is not self._listener:
                    stop.check(thing)
            now = monotonic()
            self._receive(now)
            if now >= tick_at:
                tick_at = machine.tick(now)
            machine.turn()
            full = self._send()
            if machine.log:
                self._log()
        machine.close()
        self._send()
        return stop.requested

    def _receive(self, now: float) -> None:
        recv = self._listener.recv
        receive = self._machine.receive
        counts = self._machine.counts
        n_bytes = n_messages = 0
        # Finding a socket empty costs as much as a message. Where the last turn found a lone one,
        # the next does not look for more before it has been answered: the poll tells.
        for _ in range(self._drain):
            item = recv()
            if item is None:
                break
            peer, frames = item
            if frames:
                n_messages += 1
                n_bytes += sum(map(len, frames))
                receive(peer, frames, now)
            else:
                self._machine.gone(peer, now)
        self._drain = DRAIN if n_messages != 1 else 1
        if n_messages:
            counts["messages_in"] += n_messages
            counts["bytes_in"] += n_bytes

    def _send(self) -> bool:
        """Everything that the links take. Returns whether some link was full."""
        machine = self._machine
        if machine.replies:
            for peer, frames in machine.replies:
                try:
                    self._listener.send(peer, frames)
                except TransportError:
                    machine.counts["replies_lost"] += 1
            machine.replies.clear()
        full = False
        for record in list(machine.dirty):
            if self._pump(record):
                del machine.dirty[record]
            else:
                full = True
        return full

    def _pump(self, record: SessionRecord) -> bool:
        """Whether all that this session may send now has been taken by its link."""
        if record.peer is None:
            return True  # _route makes it dirty again
        session = record.session
        counts = self._machine.counts
        send = self._listener.send
        peer = record.peer
        try:
            while (frames := session.next_frames()) is not None:
                if not send(peer, frames):
                    return False
                session.sent()
                counts["messages_out"] += 1
                counts["bytes_out"] += sum(map(len, frames))
        except ChannelClosed:
            self._machine.gone(peer, monotonic())
        return True

    def _log(self) -> None:
        for level, text in self._machine.log:
            log.log(level, "%s", text)
        self._machine.log.clear()


def serve(
    address: str,
    *,
    strict: bool = False,
    connection_file: str | os.PathLike[str] | None = None,
    insecure: bool = False,
    announce: Callable[[str], None] | None = None,
    lifeline_fd: int | None = None,
    ready_fd: int | None = None,
    orphaned_directory: str | None = None,
    settings: Settings | None = None,
) -> int:
    """Run a broker until SIGTERM, SIGINT or the end of the lifeline. Returns the exit code.

    address: where to listen.  strict: a used port is an error, not a reason to take the next.
    connection_file: where to write {"address": ...} once it listens.
    announce: called with the lines that tell people how to join.
    orphaned_directory: removed when the lifeline ends, as the parent cannot do it any more.
    """
    with StopRequest(lifeline_fd) as stop:
        try:
            settings = settings or Settings.load()
            check_exposure(address, insecure)
            listener = listen_near(address, strict=strict, max_frame=settings.max_frame)
        except (ConfigError, AddressInUse) as exc:
            log.error("%s", exc)
            return 2
        machine = BrokerMachine(
            epoch=int.from_bytes(os.urandom(4), "little") or 1,
            address=listener.address,
            version=__version__,
            python=platform.python_version(),
            settings=settings,
            now=monotonic(),
        )
        try:
            if connection_file is not None:
                _write_connection_file(Path(connection_file), listener.address)
            if announce is not None:
                announce(join_lines(listener.address))
            tell_ready(ready_fd, listener.address)
            freeze_garbage()
            why = BrokerLoop(listener, machine, stop).run()
        finally:
            listener.close(linger_s=0.2)
            if connection_file is not None:
                Path(connection_file).unlink(missing_ok=True)
            if orphaned_directory is not None and stop.orphaned:
                shutil.rmtree(orphaned_directory, ignore_errors=True)
    log.info("broker stopped: %s", why)
    return 0


def join_lines(address: str) -> str:
    """What to type to join."""
    return (
        f"zfabric broker at {address}\n"
        f"  workers:  zfabric worker {address}\n"
        f"  clients:  zfabric.Client({address!r})"
    )


def _write_connection_file(path: Path, address: str) -> None:
    """All at once, so that nobody reads half of it, and for this user only."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump({"address": address, "version": __version__}, file)
    part.replace(path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="zfabric broker: %(message)s")
    sys.exit(serve(**json.loads(sys.argv[1])))
