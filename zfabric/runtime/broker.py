"""The broker's process: the loop of `runtime.broker_loop`, with keys, a journal and a recording.

This process never unpickles anything, and does not even import pickle.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from zfabric import __version__
from zfabric.config import Settings
from zfabric.core.broker import BrokerMachine
from zfabric.core.journal import JournalDamaged
from zfabric.errors import AddressInUse, ConfigError
from zfabric.messages import WORKER
from zfabric.runtime.binding import check_exposure, link_options, listen_near, reachable
from zfabric.runtime.broker_loop import BrokerLoop, machine_arguments
from zfabric.runtime.guard import BrokerGuard, ring_for
from zfabric.runtime.journal import Journal, JournalKeeper
from zfabric.runtime.lifecycle import (
    StopRequest,
    allow_many_descriptors,
    freeze_garbage,
    remove_orphan,
    tell_ready,
)
from zfabric.runtime.recording import RecordedMachine, Recorder
from zfabric.transport import Poller

log = logging.getLogger(__name__)


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
    allow_many_descriptors()
    with StopRequest(lifeline_fd) as stop:
        try:
            settings = settings or Settings.load()
            ring = ring_for(address, keys, insecure)
            if ring is None:
                check_exposure(address, insecure)
            recorder = Recorder(record) if record is not None else None
            guard = None if ring is None else BrokerGuard(ring)
            listener = listen_near(
                address,
                strict=strict,
                **link_options(address, settings),
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
            arguments = machine_arguments(told, settings, admission)
            if book is not None:
                arguments.update(saved=book.entries(), generation=book.generation)
            if recorder is not None:
                machine: BrokerMachine = RecordedMachine(recorder, **arguments)
            else:
                machine = BrokerMachine(**arguments)
            keeper = None if book is None else JournalKeeper(book, machine)
            if connection_file is not None:
                _write_connection_file(Path(connection_file), told)
            if guard is not None:
                guard.watch(machine, told, monotonic())
            if announce is not None:
                announce(join_lines(told, guard))
            tell_ready(ready_fd, listener.address)
            freeze_garbage()
            why = BrokerLoop(listener, machine, stop, Poller(), guard, keeper).run()
        except JournalDamaged as exc:
            log.error("the journal %s is damaged: %s. Put a copy of it in place", journal, exc)
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
