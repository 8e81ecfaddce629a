"""Memory of values is used again as soon as, and not before, nobody else has it."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfabric.runtime.memory_door import seal
from zfabric.runtime.segments import KEEP_S, MOST_FILES, SMALLEST, Segments, is_settled, size_class
from zfabric.runtime.slot_values import InFile
from zfabric.runtime.store import Store

NBYTES = 2 * SMALLEST


@pytest.fixture
def segments() -> Iterator[Segments]:
    segments = Segments(8 * NBYTES)
    yield segments
    segments.close()


def taken(segments: Segments, nbytes: int = NBYTES) -> tuple[int, int]:
    """(inode, reader) of a fresh piece."""
    writer, reader = segments.take(nbytes)
    os.close(writer)
    return os.fstat(reader).st_ino, reader


def test_memory_that_nobody_has_is_used_again(segments: Segments) -> None:
    first, reader = taken(segments)
    os.close(reader)
    second, reader = taken(segments)
    other, another = taken(segments)
    os.close(reader)
    os.close(another)
    assert first == second != other
    assert segments.nbytes == 2 * size_class(NBYTES)


def test_a_copy_of_the_descriptor_keeps_it(segments: Segments) -> None:
    first, reader = taken(segments)
    copy = os.dup(reader)
    os.close(reader)
    second, reader = taken(segments)
    os.close(reader)
    os.close(copy)
    third, reader = taken(segments)
    os.close(reader)
    assert first != second
    assert third in (first, second)


def test_a_mapping_alone_keeps_it(segments: Segments) -> None:
    first, reader = taken(segments)
    area = mmap.mmap(reader, NBYTES, mmap.MAP_SHARED, mmap.PROT_READ)
    os.close(reader)
    second, reader = taken(segments)
    assert first != second
    area.close()
    third, another = taken(segments)
    assert third == first
    os.close(reader)
    os.close(another)


def test_it_is_kept_on_its_way_through_a_socket(segments: Segments) -> None:
    here, there = socket.socketpair()
    with here, there:
        first, reader = taken(segments)
        socket.send_fds(here, [b"x"], [reader])
        os.close(reader)
        second, reader = taken(segments)
        os.close(reader)
        assert first != second
        for fd in socket.recv_fds(there, 1, 1)[1]:
            os.close(fd)
        third, reader = taken(segments)
        assert third in (first, second)
        os.close(reader)


def test_another_process_keeps_it_until_it_is_killed(segments: Segments) -> None:
    first, reader = taken(segments)
    code = "import mmap, sys; fd = int(sys.argv[1]); m = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)"
    code += "; print(flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(reader)],
        pass_fds=[reader],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        os.close(reader)
        second, reader = taken(segments)
        os.close(reader)
        assert first != second
        child.send_signal(signal.SIGKILL)
        child.wait()
    found = {ino for ino, fd in (taken(segments), taken(segments)) if not os.close(fd)}
    assert found == {first, second}


def test_what_is_handed_out_can_be_read_only_and_not_be_cut(segments: Segments) -> None:
    writer, reader = segments.take(NBYTES)
    assert is_settled(reader) and not is_settled(writer)
    seal(reader)  # nothing is left to do
    with pytest.raises(OSError):
        os.pwrite(reader, b"x", 0)
    with pytest.raises((OSError, ValueError)):
        mmap.mmap(reader, NBYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    for fd in (reader, writer):
        with pytest.raises(OSError):
            os.ftruncate(fd, 1)
    os.close(reader)
    os.close(writer)


def test_no_more_is_kept_than_the_bound() -> None:
    segments = Segments(NBYTES)
    first, reader = taken(segments)
    second, another = taken(segments)
    os.close(reader)
    os.close(another)
    assert segments.nbytes == size_class(NBYTES)
    again, reader = taken(segments)
    assert again == second != first
    os.close(reader)
    segments.close()
    assert segments.nbytes == 0


def test_no_more_files_are_kept_than_the_bound() -> None:
    segments = Segments(1000 * NBYTES)
    taken_first, *rest = [taken(segments) for _ in range(MOST_FILES + 1)]
    for _, reader in (taken_first, *rest):
        os.close(reader)
    assert segments.nbytes == MOST_FILES * size_class(NBYTES)
    again = [taken(segments) for _ in rest]
    for _, reader in again:
        os.close(reader)
    assert {inode for inode, _ in again} == {inode for inode, _ in rest}
    segments.close()
    assert segments.nbytes == 0


def test_it_is_let_go_after_a_while(segments: Segments) -> None:
    assert segments.tick(monotonic()) is None
    _, reader = taken(segments)
    os.close(reader)
    left_s = segments.tick(monotonic())
    assert left_s is not None and 0 < left_s <= KEEP_S
    assert segments.tick(monotonic() + KEEP_S + 1) is None
    assert segments.nbytes == 0


@given(st.integers(1, 1 << 46))
def test_a_size_class_is_an_eighth_more_at_most(nbytes: int) -> None:
    size = size_class(nbytes)
    assert nbytes <= size <= max(nbytes * 9 / 8, nbytes + 4096)
    assert size_class(size) == size
    assert size % 4096 == 0


def test_a_large_result_lies_there_and_a_small_one_does_not(segments: Segments) -> None:
    for nbytes, kept in ((SMALLEST // 2, 0), (NBYTES, 1)):
        file = InFile([b"x" * nbytes], [nbytes], segments)
        assert os.pread(file.fd, nbytes + 1, 0).rstrip(b"\0") == b"x" * nbytes
        assert (fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY) is bool(kept)
        file.close()
    # A shorter value over a longer one: its own bytes, whatever lies behind them.
    file = InFile([b"a", b"y" * (NBYTES - 100)], [1, NBYTES - 100], segments)
    assert os.pread(file.fd, 66, 0) == b"a" + bytes(63) + b"yy"
    file.close()


def test_a_store_receives_into_what_its_values_left() -> None:
    store = Store()
    try:
        inodes = []
        for fill in (b"1", b"2"):
            value = store.allocate([NBYTES])
            value.destination[0:NBYTES] = fill * NBYTES
            store.put(7, value)
            inodes.append(os.fstat(value.fd).st_ino)
            part = store.chunk(7, NBYTES - 2, 10)
            assert part is not None and bytes(part) == fill * 2
            del part, value
            store.free([7])
        assert inodes[0] == inodes[1]
    finally:
        store.close()
