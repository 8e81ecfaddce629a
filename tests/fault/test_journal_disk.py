"""A journal on a disk that tears, ends, and fills up: whole turns, or a clear refusal."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zfabric.errors import ConfigError
from zfabric.runtime.journal import Journal, JournalFailed

pytestmark = pytest.mark.fault

WRITER = """
import sys
from zfabric.runtime.journal import Journal

book = Journal(sys.argv[1])
n = len(list(book.entries())) // 2
while True:
    n += 1
    book.commit([(1, b"%d " % n * (n * 37 % 900)), (2, b"%d" % n)], list)
    print(n, flush=True)
"""


def turns(path: Path) -> int:
    """Turns that a journal holds; fails unless they are whole and in order."""
    book = Journal(path)
    try:
        entries = list(book.entries())
    finally:
        book.close()
    assert [kind for kind, _ in entries] == [1, 2] * (len(entries) // 2)
    assert [int(data) for _, data in entries[1::2]] == list(range(1, len(entries) // 2 + 1))
    return len(entries) // 2


def killed_after(path: Path, n: int) -> int:
    """Have another process write until it has acknowledged n turns; kill -9. The last turn it
    acknowledged."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    with writer:
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(n)]
        writer.kill()
        said += [int(line) for line in writer.stdout if line.endswith("\n")]
    return said[-1]


def test_row_10_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for n in (1, 7, 30):
        acknowledged = killed_after(path, n)
        # One more may have been written and not yet be acknowledged.
        assert turns(path) - acknowledged in (0, 1)


def test_row_10_a_log_cut_at_any_page_or_byte_leaves_whole_turns(tmp_path: Path) -> None:
    path, copy = tmp_path / "journal", tmp_path / "copy"
    killed_after(path, 8)
    log = (tmp_path / "journal-wal").read_bytes()
    head, frame = 32, 24 + int.from_bytes(log[8:12], "big")
    assert (len(log) - head) % frame == 0
    rng = random.Random(10)
    cuts = {head + n * frame + off for n in range((len(log) - head) // frame) for off in (0, 24)}
    cuts |= {rng.randrange(len(log)) for _ in range(20)}
    found = []
    for cut in sorted(cuts):
        shutil.copy(path, copy)
        (tmp_path / "copy-wal").write_bytes(log[:cut])
        found.append(turns(copy))
        (tmp_path / "copy-wal").unlink(missing_ok=True)
    assert found == sorted(found), "a shorter log holds more"


def test_row_11_a_log_with_flipped_bits_leaves_whole_turns(tmp_path: Path) -> None:
    path, copy = tmp_path / "journal", tmp_path / "copy"
    acknowledged = killed_after(path, 12)
    log = (tmp_path / "journal-wal").read_bytes()
    rng = random.Random(11)
    for _ in range(30):
        torn = bytearray(log)
        torn[rng.randrange(len(torn))] ^= 1 << rng.randrange(8)
        shutil.copy(path, copy)
        (tmp_path / "copy-wal").write_bytes(torn)
        try:
            assert turns(copy) <= acknowledged + 1
        except ConfigError as exc:
            assert "nothing was changed" in str(exc)
        (tmp_path / "copy-wal").unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield where
    subprocess.run(["umount", str(where)], check=True)


@pytest.mark.root
def test_row_12_a_full_disk_takes_whole_turns_or_none(small_disk: Path) -> None:
    book = Journal(small_disk / "journal")
    n = 0
    with pytest.raises(JournalFailed, match="cannot be written"):
        while True:
            book.commit([(1, b"x" * 20_000), (2, b"%d" % (n + 1))], list)
            n += 1
    assert n > 5
    assert len(list(book.entries())) == 2 * n
    book.close()
    shutil.copytree(small_disk, small_disk.parent / "room")
    assert turns(small_disk.parent / "room" / "journal") == n
    book = Journal(small_disk.parent / "room" / "journal")
    book.commit([(1, b""), (2, b"%d" % (n + 1))], list)
    book.close()
    assert turns(small_disk.parent / "room" / "journal") == n + 1
