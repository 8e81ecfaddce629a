"""The broker's process: one thread that moves messages between sockets and the machine.

Everything that is decided, is decided in `core.broker` and `core.scheduler`. This process never
unpickles anything, and does not even import pickle.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

from zfabric import __version__
from zfabric.config import Settings
from zfabric.core.admission import Admission
from zfabric.core.broker import BrokerMachine
from zfabric.core.journal import Entry, JournalDamaged
from zfabric.core.session_record import SessionRecord
from zfabric.errors import AddressInUse, ChannelClosed, ConfigError, TransportError
from zfabric.ids import MAX_SESSION
from zfabric.messages import WORKER
from zfabric.runtime.binding import check_exposure, listen_near, reachable
from zfabric.runtime.guard import LOOK_S, BrokerGuard, ring_for
from zfabric.runtime.host_memory import resident, usual_limit
from zfabric.runtime.journal import RETRY_S, Journal, JournalFailed
from zfabric.runtime.lifecycle import StopRequest, freeze_garbage, tell_ready
from zfabric.runtime.recording import RecordedMachine, Recorder
from zfabric.transport import Listener, Poller

log = logging.getLogger(__name__)

DRAIN = 512
"""Messages taken in per turn at most, so that no flood keeps answers from leaving."""

DRAIN_BYTES = 4 * 1024 * 1024
"""Bytes taken in per turn, about: of relays for instance, which keep nobody waiting for long."""

GROWN = 32 * 1024 * 1024
"""Bytes by which this process has grown since the last tick when it looks for the reason."""

GROWN_S = 0.1
"""When to look again."""

RETRY_FULL_S = 0.005
"""When to try a peer again whose link was full."""


class BrokerLoop:
    """Receive, decide, send, until asked to stop."""

    def __init__(
        self,
        listener: Listener,
        machine: BrokerMachine,
        stop: StopRequest,
        poller: Poller,
        guard: BrokerGuard | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._journal = journal
        self._unwritten: list[Entry] = []
        """Of a turn whose transaction failed. Nothing of that turn may leave."""
        self._withheld: set[SessionRecord] = set()
        self._write_at = 0.0
        self.listener = listener
        self.machine = machine
        self._stop = stop
        self._drain = DRAIN
        self._tick_at = 0.0
        self._full = False
        self._memory = resident("self")
        self._looks = 0
        """How often to look for endless messages before it is taken for something else."""
        self._poller = poller
        self._guard = guard
        poller.add(listener)
        for fd in stop.fds:
            poller.add(fd)

    def run(self) -> str:
        """Returns why it ended."""
        stop, poller = self._stop, self._poller
        while not stop.requested:
            ready = poller.wait(self.sleep_s(monotonic()))
            for thing in ready:
                if thing is not self.listener:
                    stop.check(thing)
            self.receive(monotonic())
            self.machine.turn()
            if self._journal is not None:
                self.write(self._journal, monotonic())
            self.send()
        self.close()
        return stop.requested

    def sleep_s(self, now: float) -> float:
        """How long to wait for events at most."""
        tick_at = min(self._tick_at, self.machine.scheduler.due_at)
        timeout = 0.0 if self.machine.dirty and not self._full else tick_at - now
        return max(0.0, min(timeout, RETRY_FULL_S) if self._full else timeout)

    def receive(self, now: float) -> None:
        """What has arrived, and what time brought about."""
        self._drain_listener(now)
        if now >= self._tick_at or now >= self.machine.scheduler.due_at:
            self._tick_at = self.machine.tick(now)
            if self._guard is not None:
                self._guard.look(now)
                self._tick_at = min(self._tick_at, now + LOOK_S)
            self._look_for_endless(now)

    def _look_for_endless(self, now: float) -> None:
        """What grows may be a message that somebody never ends: see transport.endless."""
        memory = resident("self")
        grown, self._memory = memory - self._memory, memory
        if grown < GROWN and not self._looks:
            return
        self._looks = 10 if grown >= GROWN else self._looks - 1
        self._tick_at = min(self._tick_at, now + GROWN_S)
        n_shut = self.listener.shut_endless()
        if n_shut:
            self.machine.counts["bad:endless"] += n_shut
            log.warning("%d connections were shut: much came over them, but no message", n_shut)

    def write(self, journal: Journal, now: float) -> None:
        """This turn's entries to the disk, before anything that follows from them is sent.

        While that fails, sessions that this turn spoke with or about hear nothing, messages that
        would have to be written are not taken in, and it is tried again now and then.
        """
        machine = self.machine
        assert machine.journal is not None
        entries = machine.journal.take()
        if not self._withheld:
            if not entries:
                return
            try:
                journal.commit(entries, machine.snapshot)
            except JournalFailed as exc:
                machine.journal_trouble = str(exc)
                log.error("%s; no work is taken until it can", exc)
                self._withheld.update(machine.sessions.values())
                self._write_at = now + RETRY_S
            return
        if now < self._write_at:
            return
        self._write_at = now + RETRY_S
        try:
            journal.recover(machine.snapshot)
        except JournalFailed as exc:
            machine.journal_trouble = str(exc)
            return
        log.warning("the journal %s can be written again", journal.path)
        machine.journal_trouble = ""
        self._withheld.clear()

    def close(self) -> None:
        """Tell everybody."""
        self.machine.close()
        self.send()

    def _drain_listener(self, now: float) -> None:
        recv = self.listener.recv
        receive = self.machine.receive
        counts = self.machine.counts
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
                if n_bytes > DRAIN_BYTES:
                    break
            else:
                self.machine.gone(peer, now)
        self._drain = DRAIN if n_messages != 1 else 1
        if n_messages:
            counts["messages_in"] += n_messages
            counts["bytes_in"] += n_bytes

    def send(self) -> None:
        """Everything that the links take."""
        machine = self.machine
        if machine.replies:
            for peer, frames in machine.replies:
                try:
                    self.listener.send(peer, frames)
                except TransportError:
                    machine.counts["replies_lost"] += 1
            machine.replies.clear()
            if self._guard is not None:
                self._guard.evict()
        self._full = False
        for record in list(machine.dirty):
            if self._pump(record):
                machine.dirty.pop(record, None)
            else:
                self._full = True
        if machine.log:
            self._log()
        if machine.stalls:
            self._report()

    def _pump(self, record: SessionRecord) -> bool:
        """Whether all that this session may send now has been taken by its link."""
        if record.peer is None:
            return True  # _route makes it dirty again
        if record in self._withheld:
            return False
        session = record.session
        counts = self.machine.counts
        send = self.listener.send
        peer = record.peer
        try:
            while (frames := session.next_frames()) is not None:
                if not send(peer, frames):
                    return False
                session.sent()
                counts["messages_out"] += 1
                counts["bytes_out"] += sum(map(len, frames))
        except ChannelClosed:
            self.machine.gone(peer, monotonic())
            return record.peer is None
        except TransportError as exc:
            self.machine.end_unsendable(record, str(exc), monotonic())
        return True

    def _log(self) -> None:
        for level, text in self.machine.log:
            log.log(level, "%s", text)
        self.machine.log.clear()

    def _report(self) -> None:
        """A fabric without progress: how it stands goes to a file, for `zfabric replay`."""
        for state in self.machine.stalls:
            try:
                fd, path = tempfile.mkstemp(prefix="zfabric-stall-", suffix=".json")
                with os.fdopen(fd, "w") as file:
                    json.dump(state, file, indent=1, default=str)
            except OSError as exc:
                log.warning("no report of it could be written: %s", exc)
            else:
                log.warning("how it stands: zfabric replay %s", path)
        self.machine.stalls.clear()


def serve(
    address: str,
    *,
    strict: bool = False,
    connection_file: str | os.PathLike[str] | None = None,
    insecure: bool = False,
    keys: str | None = None,
    announce: Callable[[str], None] | None = None,
    lifeline_fd: int | None = None,
    ready_fd: int | None = None,
    orphaned_directory: str | None = None,
    record: str | os.PathLike[str] | None = None,
    journal: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
) -> int:
    """Run a broker until SIGTERM, SIGINT or the end of the lifeline. Returns the exit code.

    address: where to listen.  strict: a used port is an error, not a reason to take the next.
    connection_file: where to write {"address": ...} once it listens.
    keys: the directory of the keys that it admits; see guard.ring_for for the usual ones.
    announce: called with the lines that tell people how to join.
    orphaned_directory: removed when the lifeline ends, as the parent cannot do it any more.
    record: a new file for all events, see runtime.recording.
    journal: a file from which it goes on after a restart, see docs/reliability.md.
    """
    with StopRequest(lifeline_fd) as stop:
        try:
            settings = settings or Settings.load()
            ring = ring_for(address, keys, insecure)
            if ring is None:
                check_exposure(address, insecure)
            if record is not None and journal is not None:
                raise ConfigError("a broker with a journal keeps no record: its events begin there")
            recorder = Recorder(record) if record is not None else None
            guard = None if ring is None else BrokerGuard(ring)
            listener = listen_near(
                address,
                strict=strict,
                max_frame=settings.max_frame,
                **({} if guard is None else {"security": guard.security}),
            )
        except (ConfigError, AddressInUse) as exc:
            log.error("%s", exc)
            return 2
        told = reachable(listener.address)
        admission = None if guard is None else guard.admission(listener, settings)
        book: Journal | None = None
        try:
            if journal is not None:
                book = Journal(journal)
            machine = new_machine(told, settings, admission, recorder, book)
            if connection_file is not None:
                _write_connection_file(Path(connection_file), told)
            if guard is not None:
                guard.watch(machine, told, monotonic())
            if announce is not None:
                announce(join_lines(told, guard))
            tell_ready(ready_fd, listener.address)
            freeze_garbage()
            why = BrokerLoop(listener, machine, stop, Poller(), guard, book).run()
        except JournalDamaged as exc:
            log.error("the journal %s is damaged: %s; nothing was changed", journal, exc)
            return 2
        except ConfigError as exc:
            log.error("%s", exc)
            return 2
        finally:
            listener.close(linger_s=0.2)
            if guard is not None:
                guard.close()
            if connection_file is not None:
                _remove_connection_file(Path(connection_file), told)
            if recorder is not None:
                recorder.close()
            if book is not None:
                book.close()
            remove_orphan(orphaned_directory, stop)
    log.info("broker stopped: %s", why)
    return 0


def remove_orphan(directory: str | None, stop: StopRequest) -> None:
    """Clean up for a parent that cannot do it any more."""
    if directory is not None and stop.orphaned:
        shutil.rmtree(directory, ignore_errors=True)


def new_machine(
    address: str,
    settings: Settings,
    admission: Admission | None = None,
    recorder: Recorder | None = None,
    journal: Journal | None = None,
) -> BrokerMachine:
    """A broker that has just begun, or goes on with a journal. Raises JournalDamaged."""
    epoch = int.from_bytes(os.urandom(4), "little") or 1
    if not settings.broker_bytes:
        settings = replace(settings, broker_bytes=usual_limit())
    arguments: dict[str, Any] = {
        "epoch": epoch,
        "first_number": 1 + epoch % (MAX_SESSION // 2),
        "address": address,
        "version": __version__,
        "python": platform.python_version(),
        "settings": settings,
        "now": monotonic(),
        "admission": admission,
    }
    if journal is not None:
        arguments.update(saved=journal.entries(), generation=journal.generation)
    return RecordedMachine(recorder, **arguments) if recorder else BrokerMachine(**arguments)


def join_lines(address: str, guard: BrokerGuard | None = None) -> str:
    """What to type to join: one line for workers, one for clients."""
    if guard is None:
        return (
            f"zfabric broker at {address}\n"
            f"  workers:  zfabric worker {address}\n"
            f"  clients:  zfabric.Client({address!r})"
        )
    lines = [f"zfabric broker at {address}, with keys"]
    for role, member in guard.first_of_each_role().items():
        path = str(guard.ring.join_path(member))
        how = f"zfabric worker {path}" if role == WORKER else f"zfabric.Client({path!r})"
        lines.append(f"  {role}s:  {how}")
    lines.append(
        "  from other machines: copy that file there (a secret, mode 0600), or pipe it:\n"
        "            zfabric keys join NAME | ssh HOST zfabric worker -"
    )
    return "\n".join(lines)


def _remove_connection_file(path: Path, address: str) -> None:
    """Unless another broker has put its own there meanwhile."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json.loads(path.read_text()).get("address") == address:
            path.unlink()


def _write_connection_file(path: Path, address: str) -> None:
    """All at once, so that nobody reads half of it, and for this user only."""
    part = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump({"address": address, "version": __version__}, file)
        part.replace(path)
    except OSError as exc:
        part.unlink(missing_ok=True)
        raise ConfigError(f"the connection file {path} cannot be written: {exc.strerror}") from exc


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="zfabric broker: %(message)s")
    sys.exit(serve(**json.loads(sys.argv[1])))
