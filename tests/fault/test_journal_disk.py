"""A journal on a disk that tears, ends, and fills up: whole turns, or a clear refusal."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.journalled import Journalled
from zfabric import Client
from zfabric.errors import ConfigError
from zfabric.runtime.journal import Journal, JournalFailed

pytestmark = pytest.mark.fault

ROUNDS = 10 if "FAULT_SECONDS" in os.environ else 1

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
def test_row_12_a_start_on_a_full_disk_blames_the_disk(small_disk: Path) -> None:
    path = small_disk / "journal"
    with closing(Journal(path)) as book:
        book.commit([(1, bytes(1000))], list)
    before = path.read_bytes()
    with (small_disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(512)):
            pass
    with pytest.raises(ConfigError, match="make room|the room there"):
        Journal(path)
    assert path.read_bytes() == before
    (small_disk / "filler").unlink()
    with closing(Journal(path)) as book:
        assert list(book.entries()) == [(1, bytes(1000))]


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


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

/* Whether this call fails: the file EIO_GATE.call exists, and fd is a file named EIO_PATH... */
static int fails(int fd, const char *call) {
    char gate[4096], link[64], path[4096];
    snprintf(gate, sizeof gate, "%s.%s", getenv("EIO_GATE"), call);
    if (access(gate, F_OK)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    const char *prefix = getenv("EIO_PATH");
    if (n < 0 || strncmp(path, prefix, strlen(prefix))) return 0;
    errno = EIO;
    return 1;
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

int fsync(int fd) { REAL(fsync); return fails(fd, "sync") ? -1 : real(fd); }
int fdatasync(int fd) { REAL(fdatasync); return fails(fd, "sync") ? -1 : real(fd); }
ssize_t pwrite(int fd, const void *from, size_t n, off_t at) {
    REAL(pwrite); return fails(fd, "write") ? -1 : real(fd, from, n, at);
}
ssize_t pwrite64(int fd, const void *from, size_t n, off64_t at) {
    REAL(pwrite64); return fails(fd, "write") ? -1 : real(fd, from, n, at);
}
"""


def audited(path: str, name: str) -> str:
    with open(path, "a") as file:
        file.write(f"{name}\n")
    return name


@pytest.mark.skipif(shutil.which("gcc") is None, reason="a disk that fails needs a C compiler")
@pytest.mark.parametrize("call", ["sync", pytest.param("write", marks=pytest.mark.slow)])
def test_row_12_a_failing_disk_is_not_trusted(
    call: str, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    """fsync, or write, gives EIO for a while: nothing is acknowledged, the journal goes on in a
    new file, and all that it acknowledges afterwards survives kill -9."""
    source, shim, gate = tmp_path / "shim.c", tmp_path / "shim.so", tmp_path / f"gate.{call}"
    source.write_text(SHIM)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    journal, audit = tmp_path / "journal", tmp_path / "audit"
    environ = {"LD_PRELOAD": str(shim), "EIO_GATE": f"{tmp_path}/gate", "EIO_PATH": str(journal)}
    with closing(Journalled(tmp_path, **environ)) as fabric, Client(fabric.address) as client:
        first = client.map(audited, [str(audit)] * 10, [f"a{n}" for n in range(10)])
        assert client.gather(first) == [f"a{n}" for n in range(10)]
        before = journal.stat().st_ino
        gate.touch()
        waiting = client.map(audited, [str(audit)] * 10, [f"b{n}" for n in range(10)])
        wait_until(lambda: "cannot be written" in client.info()["journal"], 60.0)
        assert not any(future.done() for future in waiting)
        gate.unlink()
        assert client.gather(waiting) == [f"b{n}" for n in range(10)]
        assert journal.stat().st_ino != before
        assert not [*tmp_path.glob("journal.part"), *tmp_path.glob("journal.new")]
        fabric.kill_broker()
        fabric.broker = fabric.start_broker()
        assert client.submit("".join, first + waiting).result(60) == "".join(
            f"{letter}{n}" for letter in "ab" for n in range(10)
        )
    ran = audit.read_text().split()
    assert len(ran) == len(set(ran)) == 20


def test_row_10_a_live_brokers_log_is_torn_behind_what_it_acknowledged(tmp_path: Path) -> None:
    """kill -9, and of what was not synced any part is lost: what was told stays."""
    audit, log = tmp_path / "audit", tmp_path / "journal-wal"
    rng = random.Random(10)
    done: list[str] = []
    with closing(Journalled(tmp_path)) as fabric, Client(fabric.address) as client:
        for turn in range(ROUNDS):
            names = [f"{turn}.{n}" for n in range(10)]
            told = client.map(audited, [str(audit)] * 10, names)
            assert client.gather(told) == names
            synced = log.stat().st_size
            late = client.map(audited, [str(audit)] * 10, [f"late {name}" for name in names])
            fabric.kill_broker()
            size = log.stat().st_size
            os.truncate(log, rng.randint(min(synced, size), size))
            fabric.broker = fabric.start_broker()
            assert client.gather(late) == [f"late {name}" for name in names]
            assert client.submit("".join, told).result(60) == "".join(names)
            done += names
    ran = audit.read_text().splitlines()
    assert sorted(name for name in ran if "late" not in name) == sorted(done)
