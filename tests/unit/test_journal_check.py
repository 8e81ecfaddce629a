"""Damage to a journal's files: it is refused and nothing is changed, or nothing is missing."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from zfabric.core.journal import Entry
from zfabric.errors import ConfigError
from zfabric.runtime.journal import FORMAT, Journal

TURNS: list[list[Entry]] = [[(n, bytes([n]) * 700), (n, b"last")] for n in range(1, 9)]
ALL = sum(TURNS, [])
BUT_LAST = sum(TURNS[:-1], [])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """The main file and the log of a broker that was killed."""
    with closing(Journal(tmp_path / "j")) as book:
        for turn in TURNS:
            book.commit(turn, list)
        return {suffix: (tmp_path / f"j{suffix}").read_bytes() for suffix in ("", "-wal")}


@pytest.fixture
def closed(tmp_path: Path) -> bytes:
    """The file of one that ended well: it has no log."""
    with closing(Journal(tmp_path / "c")) as book:
        for turn in TURNS:
            book.commit(turn, list)
    assert not (tmp_path / "c-wal").exists()
    return (tmp_path / "c").read_bytes()


def found(directory: Path, files: dict[str, bytes]) -> list[Entry] | None:
    """What a broker would begin with; None: it refuses, and has changed nothing."""
    for suffix, content in files.items():
        (directory / f"copy{suffix}").write_bytes(content)
    try:
        with closing(Journal(directory / "copy")) as book:
            return list(book.entries())
    except ConfigError as exc:
        assert "nothing was changed" in str(exc)
        left = {path.name: path.read_bytes() for path in directory.glob("copy*")}
        assert left == {f"copy{suffix}": content for suffix, content in files.items()}
        return None
    finally:
        for path in directory.glob("copy*"):
            path.unlink()


def flipped(content: bytes, at: int, bit: int = 4) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def test_undamaged_files_are_taken(tmp_path: Path, files: dict[str, bytes], closed: bytes) -> None:
    assert found(tmp_path, files) == ALL
    assert found(tmp_path, {"": closed}) == ALL


def test_a_flipped_bit_in_the_log_is_refused_but_in_its_last_turn(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    log = files["-wal"]
    outcomes = set()
    for at in [*range(0, 60, 3), *range(61, len(log), 211)]:
        entries = found(tmp_path, {**files, "-wal": flipped(log, at)})
        if entries is None:
            outcomes.add("refused")
        elif entries != ALL:
            assert entries == BUT_LAST and at > len(log) * 0.8, at
            outcomes.add("as if the last turn had not been written")
    assert len(outcomes) == 2


def test_a_flipped_bit_in_the_main_file_is_refused(tmp_path: Path, closed: bytes) -> None:
    rng = Random(7)
    used = [at for at, byte in enumerate(closed) if byte]
    heads = [at for at in used if at % 4096 < 200 or at % 4096 > 4000]
    refused = 0
    for at in rng.sample(used, 60) + rng.sample(heads, 60):
        for bit in rng.sample(range(8), 2):
            entries = found(tmp_path, {"": flipped(closed, at, bit)})
            refused += entries is None
            assert entries in (None, ALL), (at, bit)  # some bytes mean nothing
    assert refused


def test_a_stop_while_nothing_can_be_written_leaves_a_whole_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    program = f"""
import resource, signal
from zfabric.runtime.journal import Journal, JournalFailed
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
book = Journal({str(path)!r})
for n in range(20):
    book.commit([(1, bytes(300))], list)
size = {str(path)!r} + "-wal"
import os
limit = os.stat(size).st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    book.commit([(1, bytes(300_000))], list)
except JournalFailed:
    print("failed")
book.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "failed\n", done.stderr
    with closing(Journal(path)) as book:
        assert len(list(book.entries())) == 20


def test_a_log_that_is_missing_is_missed(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert found(tmp_path, {"": files[""]}) is None


def test_entries_that_are_missing_are_missed(tmp_path: Path, closed: bytes) -> None:
    path = tmp_path / "copy"
    for number in (1, len(ALL) // 2, len(ALL)):
        path.write_bytes(closed)
        with closing(sqlite3.connect(path)) as db:
            db.execute("DELETE FROM entries WHERE number = ?", (number,))
            db.commit()
        with pytest.raises(ConfigError, match="damaged"):
            Journal(path)


def test_a_journal_without_checksums_gets_them(tmp_path: Path, closed: bytes) -> None:
    path = tmp_path / "old"
    path.write_bytes(closed)
    with closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE entries DROP COLUMN crc")
        db.execute("DROP TABLE state")
        db.execute("PRAGMA user_version=2")
        db.commit()
    with closing(Journal(path)) as book:
        assert list(book.entries()) == ALL
        book.commit([(9, b"new")], list)
    with closing(Journal(path)) as book:
        assert list(book.entries()) == [*ALL, (9, b"new")]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (FORMAT,)


def test_a_start_that_fails_at_its_last_step_leaves_a_whole_journal(
    tmp_path: Path, closed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j"
    path.write_bytes(closed)

    def fails(path: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("zfabric.runtime.journal._sync", fails)
        with pytest.raises(ConfigError, match="cannot be written"):
            Journal(path)
    with closing(Journal(path)) as book:
        assert list(book.entries()) == ALL


@pytest.mark.parametrize("content", [b"", b"hello", b"SQLite format 3\0" + b"x" * 600])
def test_a_strange_file_where_a_new_journal_would_lie_is_no_new_journal(
    tmp_path: Path, files: dict[str, bytes], content: bytes
) -> None:
    assert found(tmp_path, {**files, ".new": content}) is None


def test_a_copy_of_the_journal_does_not_take_its_place(
    tmp_path: Path, files: dict[str, bytes], closed: bytes
) -> None:
    assert found(tmp_path, {**files, ".new": files[""]}) is None
    assert found(tmp_path, {**files, ".new": closed}) is None
    (tmp_path / "elsewhere").write_bytes(closed)
    (tmp_path / "j2.new").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="in the way"):
        Journal(tmp_path / "j2")


def test_a_log_without_its_journal_is_not_thrown_away(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    assert found(tmp_path, {**files, "": b""}) is None
    assert found(tmp_path, {"-wal": files["-wal"]}) is None
    assert found(tmp_path, {"": b"", "-wal": b""}) == []


def test_a_journal_that_all_may_write_to_is_refused(
    tmp_path: Path, closed: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "shared"
    path.write_bytes(closed)
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="chmod 600"):
        Journal(path)
    path.chmod(0o660)
    with closing(Journal(path)) as book:
        assert list(book.entries()) == ALL
        log = path.with_name("shared-wal")
        assert path.stat().st_mode & 0o777 == log.stat().st_mode & 0o777 == 0o600
    assert "mode is 600 again" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user: needs root")
def test_a_journal_of_another_user_is_refused(tmp_path: Path, closed: bytes) -> None:
    path = tmp_path / "theirs"
    path.write_bytes(closed)
    os.chown(path, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        Journal(path)
