"""The file in which a broker's journal lies: SQLite, in WAL mode.

One transaction per turn, synced to the disk before anything that follows from it is sent. What the
entries mean is `core.journal`'s business; here they are rows of (number, kind, bytes, checksum).
Torn writes and recovery after a crash are SQLite's; whether anything is missing or has changed
`runtime.journal_check` finds out, before the first byte is written.

When the entries written since the last snapshot outweigh it, one transaction puts a snapshot of
all that is alive in place of everything, so the file stays in proportion to what is alive.

After a failure nothing is trusted that the file seems to hold: when a sync fails, the kernel may
have dropped what was not written, and reads on from its cache as if it were there. So a snapshot
goes to a new file, which takes the journal's place when it is on the disk: FILE.part is written and
synced, becomes FILE.new, FILE-wal goes, FILE.new becomes FILE. Whoever opens a journal and finds a
FILE.new finishes that first; it is complete, while a FILE.part may not be.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import monotonic

from zfabric.core.broker import BrokerMachine
from zfabric.core.journal import Entry
from zfabric.errors import ConfigError
from zfabric.runtime.journal_check import (
    APPLICATION,
    CLOSED,
    COMES,
    FORMAT,
    OPEN,
    Chain,
    Damaged,
    NotOurs,
    check,
    check_entries,
)

log = logging.getLogger(__name__)

COMPACT_NBYTES = 16 << 20
"""Bytes of entries below which a snapshot is not worth its while."""

RETRY_S = 0.2
"""Between two tries to write when the disk is full."""


class JournalFailed(Exception):
    """Entries could not be written; the text says why."""


class Journal:
    """An open journal.

    generation: how often a broker has begun with it, this time included.
    Raises ConfigError when the file is no journal, of a newer format, damaged or in use, and then
    has changed nothing in it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            raise ConfigError(f"the journal {path} cannot be kept there: it is no regular file")
        self._nbytes = 0
        """Of entries since the last snapshot."""
        self._kept = 0
        """Of that snapshot."""
        self._lock = _FileLock(self.path)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        path = self.path
        try:
            _finish_rotation(path.resolve())
            _keep_private(path)
        except (OSError, sqlite3.Error) as exc:
            raise ConfigError(f"the journal {path} cannot be opened: {exc}") from exc
        if path.exists() and path.stat().st_size and not _looks_like_sqlite(path):
            raise ConfigError(f"{path} is not a journal of zfabric; nothing was changed")
        self._chain = Chain()
        log_path = _beside(path.resolve(), "-wal")
        self._wants_log = log_path.exists()
        try:
            if path.exists() and path.stat().st_size:
                self._examine()
            elif self._wants_log and log_path.stat().st_size:
                raise ConfigError(
                    f"the journal {path} is empty or gone, and its log {log_path} is not; nothing "
                    "was changed. Put a copy of both in place, or move the log away to begin anew"
                )
            elif not path.exists():
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            self._db = sqlite3.connect(path, isolation_level=None, timeout=0.0)
        except (OSError, sqlite3.Error) as exc:
            raise ConfigError(f"the journal {path} cannot be opened: {exc}") from exc
        try:
            self._begin()
        except BaseException as exc:
            self._db.close()
            if self._wants_log:
                _leave_log(path.resolve())
            if isinstance(exc, sqlite3.Error):
                raise ConfigError(_why_unusable(path, exc)) from exc
            if isinstance(exc, OSError):
                raise ConfigError(f"the journal {path} cannot be written: {exc}") from exc
            raise

    def _examine(self) -> None:
        """Whether the file is a journal that we can go on with; nothing is changed in it."""
        path = self.path.resolve()
        try:
            check(path)
        except NotOurs as exc:
            raise ConfigError(f"the journal {self.path} {exc}; nothing was changed") from exc
        except Damaged as exc:
            raise ConfigError(
                f"the journal {self.path} is damaged: {exc}; nothing was changed. Put a copy of it "
                "and its -wal file in place, or begin with another file"
            ) from exc
        except sqlite3.Error as exc:
            raise ConfigError(_why_unusable(self.path, exc)) from exc

    def _begin(self) -> None:
        db, path = self._db, self.path
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA journal_size_limit=67108864")
        self._chain = check_entries(db, True)
        db.execute("BEGIN IMMEDIATE")
        _lay_out(db)
        self._note(self._chain, OPEN)
        db.execute("INSERT INTO starts DEFAULT VALUES")
        (self.generation,) = db.execute("SELECT max(generation) FROM starts").fetchone()
        db.execute("DELETE FROM starts WHERE generation < ?", (self.generation,))
        self._wants_log = True
        db.execute("COMMIT")
        # From here on the main file says that a log belongs to it, and the log is there.
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        _sync(path.resolve().parent)

    def _note(self, chain: Chain, state: int) -> None:
        self._db.execute("UPDATE state SET n = ?, crc = ?, open = ?", (chain.n, chain.crc, state))

    def entries(self) -> Iterator[Entry]:
        """All there are, in order. Raises ConfigError when the file is damaged."""
        try:
            for kind, data in self._db.execute("SELECT kind, data FROM entries ORDER BY number"):
                self._nbytes += len(data)
                yield kind, data
        except sqlite3.Error as exc:
            raise ConfigError(_why_unusable(self.path, exc)) from exc

    def commit(self, entries: list[Entry], snapshot: Callable[[], Iterable[Entry]]) -> None:
        """Have these on the disk, or raise JournalFailed: then none of them is there.

        snapshot: entries for all that is alive, these included; asked for when it is due.
        """
        self._nbytes += sum(len(data) for _, data in entries)
        if self._nbytes > COMPACT_NBYTES and self._nbytes > self._kept:
            self.rewrite(snapshot)
        else:
            self._write(entries)

    def rewrite(self, snapshot: Callable[[], Iterable[Entry]]) -> None:
        """Put a snapshot in place of all entries."""
        kept = self._write(snapshot(), anew=True)
        self._kept, self._nbytes = kept, 0
        # A long log takes long to check at the next start.
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def recover(self, snapshot: Callable[[], Iterable[Entry]]) -> None:
        """After a failure: a new file with all that is alive takes the place of the old one.
        Raises JournalFailed when that does not work yet; what was acknowledged is in the old one.
        """
        real = self.path.resolve()
        try:
            kept = _write_whole(_beside(real, ".part"), snapshot(), self.generation)
            _beside(real, ".part").replace(_beside(real, ".new"))
            _sync(real.parent)
        except (OSError, sqlite3.Error) as exc:
            _beside(real, ".part").unlink(missing_ok=True)  # its room is wanted
            raise JournalFailed(f"the journal {self.path} cannot be written: {exc}") from exc
        self._let_go()
        try:
            self._open()
        except ConfigError as exc:
            raise JournalFailed(str(exc)) from exc
        self._kept, self._nbytes = kept, 0

    def _write(self, entries: Iterable[Entry], anew: bool = False) -> int:
        db = self._db
        chain = Chain() if anew else Chain(self._chain.n, self._chain.crc)
        rows = [(kind, data, chain.add(kind, data)) for kind, data in entries]
        try:
            db.execute("BEGIN IMMEDIATE")
            if anew:
                db.execute("DELETE FROM entries")
            db.executemany("INSERT INTO entries (kind, data, crc) VALUES (?, ?, ?)", rows)
            self._note(chain, OPEN)
            db.execute("COMMIT")
        except sqlite3.Error as exc:
            try:
                if db.in_transaction:
                    db.execute("ROLLBACK")
            except sqlite3.Error:
                pass
            raise JournalFailed(f"the journal {self.path} cannot be written: {exc}") from exc
        self._chain = chain
        return sum(len(data) for _, data, _ in rows)

    def close(self) -> None:
        """Let go of the file. Everything committed is in it."""
        self._let_go()
        self._lock.release()

    def _let_go(self) -> None:
        noted = False
        try:
            self._note(self._chain, CLOSED)
            noted = True
            self._db.close()
        except sqlite3.Error as exc:
            log.warning("closing the journal %s: %s", self.path, exc)
            self._db.close()
        if not noted:
            _leave_log(self.path.resolve())


class _FileLock:
    """A journal is one process's from before it is looked at, through changes of the file."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError when another one has it, or nothing can be written there."""
        self._path = _beside(path.resolve(), ".lock")
        while True:
            try:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as exc:
                raise ConfigError(f"the journal {path} cannot be opened: {exc}") from exc
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever had it before may have unlinked the file between our open and our lock.
                if os.path.samestat(os.fstat(self._fd), os.stat(self._path)):
                    return
            except BlockingIOError:
                os.close(self._fd)
                raise ConfigError(f"the journal {path} is in use by another broker") from None
            except FileNotFoundError:
                pass
            os.close(self._fd)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._fd)


def _lay_out(db: sqlite3.Connection) -> None:
    """What a journal's file has besides entries."""
    db.execute(f"PRAGMA application_id={APPLICATION}")
    db.execute(f"PRAGMA user_version={FORMAT}")
    db.execute(
        "CREATE TABLE IF NOT EXISTS entries"
        " (number INTEGER PRIMARY KEY, kind INTEGER NOT NULL, data BLOB NOT NULL, crc INTEGER)"
    )
    if all(name != "crc" for _, name, *_ in db.execute("PRAGMA table_info(entries)")):
        db.execute("ALTER TABLE entries ADD COLUMN crc INTEGER")
    db.execute("CREATE TABLE IF NOT EXISTS state (n INTEGER, crc INTEGER, open INTEGER)")
    if db.execute("SELECT count(*) FROM state").fetchone() == (0,):
        db.execute("INSERT INTO state VALUES (0, 0, 0)")
    db.execute("CREATE TABLE IF NOT EXISTS starts (generation INTEGER PRIMARY KEY)")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _leave_log(path: Path) -> None:
    """Closing brought all of the log into the main file, which still says that one belongs to it:
    an empty one keeps it from being taken for damaged."""
    with contextlib.suppress(OSError):  # what is raised now, or logged, weighs more
        _beside(path, "-wal").touch(0o600)
        _sync(path.parent)


def _write_whole(path: Path, entries: Iterable[Entry], generation: int) -> int:
    """A file with these entries, on the disk when this returns. Returns their bytes.

    Raises OSError, sqlite3.Error; then the file is of no use.
    """
    for suffix in ("", "-journal"):
        _beside(path, suffix).unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    chain = Chain()
    rows = [(kind, data, chain.add(kind, data)) for kind, data in entries]
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=OFF")  # nothing of it is needed unless all is there
        db.execute("BEGIN IMMEDIATE")
        _lay_out(db)
        db.execute("INSERT INTO starts VALUES (?)", (generation,))
        db.executemany("INSERT INTO entries (kind, data, crc) VALUES (?, ?, ?)", rows)
        db.execute("UPDATE state SET n = ?, crc = ?, open = ?", (chain.n, chain.crc, COMES))
        db.execute("COMMIT")
    finally:
        db.close()
    _sync(path)
    return sum(len(data) for _, data, _ in rows)


def _finish_rotation(path: Path) -> None:
    """Put a complete new file in a journal's place, if there is one."""
    new = _beside(path, ".new")
    if not os.path.lexists(new):
        return
    try:
        is_next = not new.is_symlink() and new.is_file() and check(new) == COMES
    except (NotOurs, Damaged, sqlite3.Error):
        is_next = False
    if not is_next:
        raise ConfigError(
            f"{new} is in the way of the journal {path}, and no broker wrote it to take its place; "
            "nothing was changed. Move it away, and start again"
        )
    _keep_private(new)
    # Its log goes first: SQLite would take it for that of the new file. Until the new one stands
    # in its place a crash leads here again.
    for suffix in ("-wal", "-shm"):
        _beside(path, suffix).unlink(missing_ok=True)
    _sync(path.parent)
    new.replace(path)
    _sync(path.parent)


def _keep_private(path: Path) -> None:
    """A journal holds what workers will run: nobody else may have had a hand in it."""
    if not path.exists():
        return
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"the journal {path} belongs to another user, who may write there what workers would "
            "run; nothing was changed. Take a file of your own"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o002 and found.st_size:
        raise ConfigError(
            f"others may write to the journal {path}, and so to what workers run (mode {mode:o}); "
            f"nothing was changed. If it is as you left it: chmod 600 {path}"
        )
    if mode & 0o020 and found.st_size:
        # No reason to refuse: Kubernetes gives a volume's files to a group whenever it mounts it.
        log.warning("the group of the journal %s could write there; its mode is 600 again", path)
    if mode & 0o077:
        path.chmod(0o600)


def _sync(path: Path) -> None:
    """A file's bytes, or a directory's names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _looks_like_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def _why_unusable(path: Path, exc: sqlite3.Error) -> str:
    """What is wrong, and what to do. The file itself is blamed only where SQLite blames it."""
    name = getattr(exc, "sqlite_errorname", "")
    if name.startswith("SQLITE_BUSY") or "locked" in str(exc):
        return f"the journal {path} is in use by another broker"
    for start, advice in _ADVICE.items():
        if name.startswith(start):
            return f"the journal {path} cannot be written ({exc}); {advice}, and start again"
    return (
        f"the journal {path} is damaged ({exc}); nothing was changed. Put a copy of it and its "
        "-wal file in place, or begin with another file"
    )


_ADVICE = {
    "SQLITE_FULL": "what it holds is whole: make room on its disk",
    "SQLITE_IOERR": "what it holds may be whole: look at its disk and the room there",
    "SQLITE_READONLY": "what it holds is whole: make it and its directory writable",
    "SQLITE_CANTOPEN": "make it and its directory readable and writable",
    "SQLITE_NOMEM": "what it holds is whole: make room in memory",
    "SQLITE_PERM": "make it and its directory readable and writable",
}


class JournalKeeper:
    """Writes each turn of a broker's machine to its journal."""

    def __init__(self, journal: Journal, machine: BrokerMachine) -> None:
        self._journal = journal
        self._machine = machine
        self._write_at = 0.0

    def write(self, now: float) -> None:
        """This turn's entries to the disk, before anything that follows from them is sent.

        While that fails, nobody hears of what would have to be written, no more of it is taken
        in, and it is tried again now and then.
        """
        machine, journal = self._machine, self._journal
        assert machine.journal is not None
        entries = machine.journal.take()
        if not machine.journal.trouble:
            if not entries:
                return
            try:
                journal.commit(entries, machine.snapshot)
            except JournalFailed as exc:
                machine.cannot_write(str(exc))
                log.error("%s; no work is taken until it can", exc)
                self._write_at = now + RETRY_S
            return
        if now < self._write_at:
            return
        self._write_at = now + RETRY_S
        began = monotonic()
        try:
            journal.recover(machine.snapshot)
        except JournalFailed as exc:
            # A large snapshot takes a while, and nobody else is served meanwhile.
            self._write_at = now + max(RETRY_S, 10 * (monotonic() - began))
            machine.cannot_write(str(exc))
            return
        log.warning("the journal %s can be written again", journal.path)
        machine.can_write()
