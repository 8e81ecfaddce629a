"""What tasks print at the worker's terminal: whole lines, in order, and nothing is kept waiting."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from time import monotonic

import pytest

from zfabric.runtime import echo as e
from zfabric.runtime.echo import Echo

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def read(fd: int, n: int) -> bytes:
    data = b""
    while len(data) < n:
        assert select.select([fd], [], [], 10.0)[0], data
        data += os.read(fd, 1 << 16)
    return data


def test_lines_of_two_slots_are_not_mixed(pipe: Pipe) -> None:
    echo = Echo()
    echo.write(pipe[1], b"whole\nbegin", 1)
    echo.write(pipe[1], b"another\n", 2)
    echo.write(pipe[1], b"ning\n", 1)
    assert read(pipe[0], 24) == b"whole\nanother\nbeginning\n"
    echo.close()


def test_what_is_no_line_is_written_soon(pipe: Pipe) -> None:
    echo = Echo()
    began = monotonic()
    for _ in range(4):
        echo.write(pipe[1], b".", 1)
    assert read(pipe[0], 4) == b"...."
    assert monotonic() - began >= e.LINE_S
    echo.write(pipe[1], b"1 %\r", 1)
    assert read(pipe[0], 4) == b"1 %\r"
    echo.write(pipe[1], b"x" * (e.PIPE_BUF + 1), 1)
    assert len(read(pipe[0], e.PIPE_BUF + 1)) == e.PIPE_BUF + 1
    echo.close()


def test_the_two_streams_of_a_slot_keep_their_order(pipe: Pipe) -> None:
    echo = Echo()
    other = os.dup(pipe[1])
    echo.write(pipe[1], b"asked: ", 1)
    echo.write(other, b"answered\n", 1)
    assert read(pipe[0], 16) == b"asked: answered\n"
    echo.close()
    os.close(other)


def test_close_writes_the_beginning_of_a_line(pipe: Pipe) -> None:
    echo = Echo()
    echo.write(pipe[1], b"no end", 1)
    echo.close(10.0)
    assert read(pipe[0], 6) == b"no end"


def test_long_pieces_are_cut_between_lines() -> None:
    lines = b"".join(b"%d\n" % n for n in range(5000))
    parts = list(e._parts(lines))
    assert b"".join(parts) == lines
    assert all(part.endswith(b"\n") and len(part) <= e.PIPE_BUF for part in parts)
    assert [len(part) for part in e._parts(bytes(10_000))] == [4096, 4096, 1808]
