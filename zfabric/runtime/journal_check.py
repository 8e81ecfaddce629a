"""Whether a journal's file is whole, found out without changing a byte of it.

SQLite goes on quietly where a part is missing: of a write-ahead log it takes what is valid up to
the first damaged frame, without one it takes the main file for all there is, and bytes within a row
it does not look at. So three things are looked at here:

  - Each entry has a checksum of it and all before it, and the last one stands apart with the number
    of entries (`Chain`).
  - In the log, frames of this generation of it that lie behind a damaged one say that more had been
    written. Only the last transaction may be torn: it was cut off, and never acknowledged.
  - While a broker writes, the main file says so; a log has to be there then.

The log's format: https://www.sqlite.org/fileformat2.html#walformat
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterable
from pathlib import Path
from zlib import crc32

APPLICATION = 0x7AFB
"""In the file's head: it is a journal of ours."""

FORMAT = 3
"""Raised with each change that an older broker would misread. 2: locks, and attempts that gave no
value. 3: checksums. What an older one wrote is read as it is; from then on the file has the newer
format."""

_HEAD = struct.Struct(">8I")
_FRAME = struct.Struct(">6I")
_MAGIC = 0x377F0682
"""The last bit says in which byte order words are added up."""

MASK = 0xFFFFFFFF

CHECKED = 3
"""The first format with checksums."""


CLOSED, OPEN, COMES = range(3)
"""Nobody writes to it; a broker does, or did until it died; it is to take the journal's place."""


class Damaged(Exception):
    """A part of the file is wrong or missing; the text says which."""


class NotOurs(Exception):
    """The file is whole, and not for this version to write to; the text says why."""


class Chain:
    """The checksum of all entries so far.  n: how many.  state: of the file that they were in."""

    __slots__ = ("crc", "n", "state")

    def __init__(self, n: int = 0, crc: int = 0) -> None:
        self.n = n
        self.crc = crc
        self.state = CLOSED

    def add(self, kind: int, data: bytes) -> int:
        """The checksum with one entry more."""
        self.n += 1
        self.crc = crc32(data, crc32(b"%d %d " % (kind, len(data)), self.crc))
        return self.crc


def check(path: Path) -> int:
    """Look at a journal that nobody writes to. Returns its state: CLOSED, OPEN or COMES.
    Raises Damaged, NotOurs, sqlite3.Error, OSError."""
    log = path.with_name(path.name + "-wal")
    had_log = log.exists()
    if had_log:
        _check_log(log)
    index = path.with_name(path.name + "-shm")
    had_index = index.exists()
    # Read-only: closing the last other connection would move the log into the main file.
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=0.0)
    try:
        _check_kind(db)
        for (text,) in db.execute("PRAGMA quick_check(1)"):
            if text != "ok":
                raise Damaged(str(text))
        return check_entries(db, had_log).state
    except (ValueError, TypeError) as exc:  # names, texts and types that are none
        raise Damaged(str(exc)) from exc
    finally:
        db.close()
        if not had_index:
            index.unlink(missing_ok=True)
        if not had_log:
            log.unlink(missing_ok=True)


def _check_kind(db: sqlite3.Connection) -> None:
    """Before anything is opened for writing: closing that would change the file, by its log."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (format_,) = db.execute("PRAGMA user_version").fetchone()
    (n_tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if n_tables and application != APPLICATION:
        raise NotOurs("is another program's database")
    if format_ > FORMAT:
        raise NotOurs(
            f"has format {format_}, and this zfabric knows {FORMAT}: "
            "start the version that wrote it, or a newer one"
        )


def check_entries(db: sqlite3.Connection, has_log: bool) -> Chain:
    """The chain of a journal's entries, each compared. A journal of an older format has none, and
    may end in entries that have."""
    names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    (format_,) = db.execute("PRAGMA user_version").fetchone()
    if not names:
        return Chain()  # new
    db.execute("PRAGMA table_info(entries)").fetchall()  # its column types are texts as well
    if not names >= {"entries", "starts"} or (format_ >= CHECKED and "state" not in names):
        raise Damaged("a table of it is missing")
    if "state" not in names:
        return chain_of(db.execute("SELECT kind, data, NULL FROM entries ORDER BY number"))
    chain = chain_of(db.execute("SELECT kind, data, crc FROM entries ORDER BY number"))
    state = db.execute("SELECT n, crc, open FROM state").fetchone()
    if state is None:
        raise Damaged("how many entries were written is not there")
    n, crc, chain.state = state
    if (chain.n, chain.crc) != (n, crc):
        raise Damaged(f"{n} entries were written, and {chain.n} are there")
    if chain.state == OPEN and not has_log:
        raise Damaged("its -wal file, where the latest entries are, is missing")
    return chain


def chain_of(rows: Iterable[tuple[int, bytes, int | None]]) -> Chain:
    """Of (kind, data, checksum) in order. Raises Damaged at the first that does not agree."""
    chain = Chain()
    for kind, data, crc in rows:
        if type(kind) is not int or type(data) is not bytes:
            raise Damaged(f"entry {chain.n + 1} is not what was written")
        if chain.add(kind, data) != crc and crc is not None:
            raise Damaged(f"entry {chain.n} is not what was written")
    return chain


def _check_log(path: Path) -> None:
    """A write-ahead log is whole but for its last transaction, which may be torn."""
    content = memoryview(path.read_bytes())
    if len(content) <= _HEAD.size:
        return  # nothing was written since it was last emptied
    magic, _, page, _, salt1, salt2, sum1, sum2 = _HEAD.unpack_from(content)
    if magic & ~1 != _MAGIC or not 512 <= page <= 65536:
        raise Damaged("the head of its -wal file is not what was written")
    order = "<>"[magic & 1]
    sums = _add(content[:24], order, 0, 0)
    if sums != (sum1, sum2):
        raise Damaged("the head of its -wal file is not what was written")
    whole, behind = True, 0
    size = _FRAME.size + page
    for at in range(_HEAD.size, len(content) - size + 1, size):
        _, commits, s1, s2, sum1, sum2 = _FRAME.unpack_from(content, at)
        if whole:
            if (s1, s2) == (salt1, salt2):
                sums = _add(content[at : at + 8], order, *sums)
                sums = _add(content[at + _FRAME.size : at + size], order, *sums)
                whole = sums == (sum1, sum2)
            else:
                whole = False
        if not whole and (s1, s2) == (salt1, salt2) and commits:
            behind += 1
    if behind > 1:  # the end of the torn one may have come to the disk before its middle
        raise Damaged(f"its -wal file has {behind} transactions behind a damaged part")


def _add(part: memoryview, order: str, s0: int, s1: int) -> tuple[int, int]:
    words = iter(struct.unpack(f"{order}{len(part) // 4}I", part))
    for first, second in zip(words, words, strict=True):
        s0 = (s0 + first + s1) & MASK
        s1 = (s1 + second + s0) & MASK
    return s0, s1
