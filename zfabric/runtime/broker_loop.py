"""The broker's loop: one thread that moves messages between sockets and the machine.

Everything that is decided, is decided in `core.broker` and `core.scheduler`. `runtime.broker` makes
a process of it, with keys, journal and recording; `runtime.embedded` lets a worker share it.
"""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from zfabric import __version__
from zfabric.config import Settings
from zfabric.core.admission import Admission
from zfabric.core.broker import BrokerMachine
from zfabric.core.session_record import SessionRecord
from zfabric.errors import ChannelClosed, TransportError
from zfabric.ids import MAX_SESSION
from zfabric.runtime.host_memory import resident, usual_limit
from zfabric.runtime.lifecycle import StopRequest
from zfabric.transport import Listener, Poller

if TYPE_CHECKING:
    from zfabric.runtime.guard import BrokerGuard
    from zfabric.runtime.journal import JournalKeeper

log = logging.getLogger(__name__)

DRAIN = 512
"""Messages taken in per turn at most, so that no flood keeps answers from leaving."""

DRAIN_BYTES = 4 * 1024 * 1024
"""Bytes taken in per turn, about: of relays for instance, which keep nobody waiting for long."""

GROWN = 32 * 1024 * 1024
"""Bytes by which this process has grown since the last tick when it looks for the reason."""

GROWN_S = 0.1
"""When to look again."""

GROUP_S = 0.001
"""For which a busy broker with a journal collects what arrives, so that one sync to the disk serves
more of it."""

GROUP = range(8, 512)
"""Ends and entries of a turn for which that is done. Below nobody but a lone caller may wait."""

WARN_S = 5.0
"""Between two warnings of the same trouble."""

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
        journal: JournalKeeper | None = None,
    ) -> None:
        self._journal = journal
        self.listener = listener
        self.machine = machine
        self._stop = stop
        self._drain = DRAIN
        self._tick_at = 0.0
        self._full = False
        self._memory = resident("self")
        self._warn_at = 0.0
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
            if self._journal is not None:
                self._gather()
            self.machine.turn()
            if self._journal is not None:
                self._journal.write(monotonic())
            self.send()
        self.close()
        return stop.requested

    def _gather(self) -> None:
        """Group commit: a sync takes as long as some fifty tasks, so a turn with a journal is not
        ended while more comes in. What it has to say waits for the sync in any case."""
        journal = self.machine.journal
        assert journal is not None
        until = monotonic() + GROUP_S
        while journal.pending in GROUP and (left := until - monotonic()) > 0:
            ready = self._poller.wait(left)
            if not ready:
                return
            for thing in ready:
                if thing is not self.listener:
                    self._stop.check(thing)
            self.receive(monotonic())

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
                self._tick_at = min(self._tick_at, self._guard.look(now))
            self._look_for_endless(now)
            self._look_for_strangers(now)
            if damaged := getattr(self.listener, "damaged", 0):
                self.machine.counts["bad:damaged"] = damaged

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

    def _look_for_strangers(self, now: float) -> None:
        """Say so, not too often, when descriptors run out."""
        n_new = self.listener.refused - self.machine.counts["bad:descriptors"]
        if n_new and now >= self._warn_at:
            self._warn_at = now + WARN_S
            self.machine.counts["bad:descriptors"] += n_new
            log.warning(
                "descriptors run out: %d connections were shut before they said who they are;"
                " peers that are connected are served. Raise the hard limit (ulimit -Hn)",
                n_new,
            )

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
        import json
        import tempfile

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


def machine_arguments(
    address: str, settings: Settings, admission: Admission | None = None
) -> dict[str, Any]:
    """Of a BrokerMachine that begins now."""
    epoch = int.from_bytes(os.urandom(4), "little") or 1
    if not settings.broker_bytes:
        settings = replace(settings, broker_bytes=usual_limit())
    return {
        "epoch": epoch,
        "first_number": 1 + epoch % (MAX_SESSION // 2),
        "address": address,
        "version": __version__,
        "python": platform.python_version(),
        "settings": settings,
        "now": monotonic(),
        "admission": admission,
    }
