"""Output of tasks: whose it is, how much of it is kept, and when it is told."""

from __future__ import annotations

import logging
import os
import sys
import threading
from types import SimpleNamespace

import pytest

from zfabric.client.showing import LogPrinter
from zfabric.config import Settings
from zfabric.core import output as o
from zfabric.core.output import OutputBook, OutputShelf, TaskText
from zfabric.runtime import slot_context
from zfabric.runtime.slot_output import READ_NBYTES, SlotOutput
from zfabric.runtime.slot_streams import MARK, WRITER
from zfabric.runtime.task_output import TaskOutput

SECRET = b"\0\1\2\3\4\5\6\7"
Rows = list[tuple[int, int, int, bytes]]


def taken(book: OutputBook, now: float) -> Rows:
    message = book.take(now)
    return [] if message is None else list(zip(*message, strict=True))


def test_whole_lines_are_told_at_once_and_the_rest_soon() -> None:
    book = OutputBook()
    book.write(1, 7, 1, b"one\ntw", 0.0)
    assert taken(book, 0.0) == [(7, 1, 0, b"one\n")]
    assert book.wake_at(0.0) == pytest.approx(o.LINE_S)
    assert taken(book, 0.1) == []
    assert taken(book, 0.25) == [(7, 1, 4, b"tw")]
    assert not book.waits


def test_a_task_that_writes_line_by_line_costs_few_messages() -> None:
    book = OutputBook()
    told = []
    for i in range(1000):  # a line per millisecond
        now = i / 1000
        book.write(1, 7, 1, b"%03d\n" % i, now)
        told += taken(book, now)
        if book.waits:
            assert now < book.wake_at(now) <= now + o.PAUSE_S
    assert len(told) <= 1 + 1 / o.PAUSE_S
    assert taken(book, 0.999) == [] and book.wake_at(0.999) <= 0.999 + o.PAUSE_S
    told += taken(book, book.wake_at(0.999))
    assert b"".join(row[3] for row in told) == b"".join(b"%03d\n" % i for i in range(1000))
    assert not book.waits


def test_much_at_once_is_told_at_once() -> None:
    book = OutputBook()
    book.write(1, 7, 1, b"first\n", 0.0)
    book.take(0.0)
    book.write(1, 7, 1, b"x" * o.ENOUGH + b"\n", 0.001)
    assert taken(book, 0.001)[0][2] == 6


def test_the_next_task_of_a_slot_ends_the_one_before() -> None:
    book = OutputBook()
    book.write(1, 7, 1, b"a", 0.0)
    book.write(1, 8, 1, b"b", 0.0)
    book.write(2, 9, 3, b"c", 0.0)
    assert taken(book, 0.0) == [(7, 1, 0, b"a")]
    book.end(1)
    book.end(2)
    assert taken(book, 0.0) == [(8, 1, 0, b"b"), (9, 3, 0, b"c")]


def test_a_flood_is_told_by_its_budget_and_its_end_in_any_case() -> None:
    book = OutputBook()
    block = b"x" * 1023 + b"\n"
    told = 0
    for i in range(1024):  # a megabyte in a second
        book.write(1, 7, 1, block, i / 1024)
        told += sum(len(row[3]) for row in taken(book, i / 1024))
    assert o.BURST <= told <= o.BURST + o.RATE
    book.write(1, 7, 1, b"the end", 1.0)
    book.end(1)
    [(_, _, start, text)] = taken(book, 1.0)
    assert text.endswith(b"the end") and len(text) >= o.END
    assert told < start and start + len(text) == 1024 * 1024 + len(b"the end")
    assert not book.waits


def test_what_waits_for_a_broker_is_bounded() -> None:
    book = OutputBook()
    for id_ in range(1000):
        book.write(1, id_, 1, b"y" * 10_000, 0.0)
    n_messages = nbytes = 0
    while rows := taken(book, 0.0):
        n_messages += 1
        nbytes += sum(len(row[3]) for row in rows)
        if n_messages > 1 and not book.waits:
            break
        book.end(1)
    assert nbytes <= o.QUEUED + o.PENDING


def test_the_last_words_are_those_of_the_task_that_died() -> None:
    book = OutputBook()
    book.write(1, 7, 1, b"".join(b"line %d\n" % i for i in range(100)), 0.0)
    book.take(0.0)
    assert book.died(1, 7).splitlines() == [f"line {i}" for i in range(80, 100)]
    book.write(2, 7, 1, b"somebody else", 0.0)
    assert book.died(2, 8) == ""
    assert book.died(3, 8) == ""


def test_a_client_keeps_head_and_tail() -> None:
    text = TaskText()
    for i in range(20_000):
        text.add(1, 6 * i, b"%5d\n" % i)
    shown = str(text)
    assert shown.startswith("    0\n    1\n") and shown.endswith("19998\n19999\n")
    assert f"[... {120_000 - o.HEAD - o.TAIL} bytes left out ...]" in shown


def test_a_gap_that_the_worker_left_stands_in_its_place() -> None:
    text = TaskText()
    text.add(1, 0, b"begin\n")
    text.add(1, 56, b"end\n")
    assert str(text) == "begin\n\n[... 50 bytes left out ...]\nend\n"


def test_what_is_told_again_after_a_broken_session_is_kept_once() -> None:
    text = TaskText()
    assert text.add(1, 0, b"one\n") == (0, b"one\n")
    assert text.add(1, 0, b"one\n") == (0, b"")
    assert text.add(2, 0, b"again\n") == (0, b"again\n")
    assert text.add(1, 0, b"one\ntwo\n") == (0, b"two\n")
    assert text.add(2, 8, b"late\n") == (2, b"late\n")
    assert str(text).count("one") == 1 and "two" in str(text)


def test_a_thread_that_writes_on_after_its_task_is_told_where_it_left_off() -> None:
    book = OutputBook()
    book.write(1, 7, 1, b"one\n", 0.0)
    book.end(1)
    book.write(1, 7, 1, b"two\n", 0.0)
    assert taken(book, 0.0) == [(7, 1, 0, b"one\n"), (7, 1, 4, b"two\n")]


def test_tries_are_told_apart() -> None:
    text = TaskText()
    text.add(1, 0, b"a\n")
    text.add(3, 0, b"b\n")
    assert str(text) == "a\n--- try 3 ---\nb\n"


def test_a_shelf_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(o, "STORED", 1000)
    shelf = OutputShelf()
    for id_ in range(20):
        shelf.add(id_, 1, 0, b"z" * 100)
    assert list(shelf.texts) == list(range(10, 20))
    shelf.drop(10)
    shelf.drop(10)
    shelf.add(30, 1, 0, b"z" * 100)
    assert list(shelf.texts) == [*range(11, 20), 30]


# --- the pipe ---------------------------------------------------------------------------------


def mark(stream: int, id_: int, attempt: int = 1) -> bytes:
    return MARK + SECRET + WRITER.pack(stream, id_, attempt)


STREAM = b"".join(
    [
        mark(1, 7), b"printed by 7", mark(2, 7), b"its error", mark(0, 7),
        b"below python", mark(0, 8), mark(0, 9), mark(1, 10), b"\0zf\1 is no mark", mark(0, 10),
        b"unclaimed",
    ]
)  # fmt: skip
WANT = {
    (1, (7, 1)): b"printed by 7",
    (2, (7, 1)): b"its error",
    (0, (8, 1)): b"below python",
    (1, (10, 1)): b"\0zf\1 is no mark",
    (0, None): b"unclaimed",
}


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 16, 29, 1000])
def test_marks_are_found_however_they_are_cut(cut: int) -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    output = SlotOutput(read, SECRET)
    got: dict[object, bytes] = {}
    ends = []
    for at in range(0, len(STREAM), cut):
        os.write(write, STREAM[at : at + cut])
        for piece in output.read(0.0):
            if piece.data:
                key = (piece.stream, piece.row)
                got[key] = got.get(key, b"") + piece.data
            else:
                ends.append(piece.row and piece.row[0])
    assert output.holds and not output.closed
    [piece] = output.let_go()
    got[(piece.stream, piece.row)] = piece.data
    assert got == WANT
    assert ends == [7, 8, 9, 10]
    os.close(write)
    assert output.read(0.0) == [] and output.closed
    output.close()


def test_who_writes_too_much_is_left_alone_for_a_while() -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    output = SlotOutput(read, SECRET)
    for _ in range(100):
        os.write(write, mark(1, 7) + b"x" * (READ_NBYTES - 100))
        output.read(1.0)
    assert 0.3 < output.pause_s < 1.0
    output.read(2.0)
    assert output.pause_s == 0.0
    os.close(write)
    output.close()


def test_what_is_printed_later_has_the_name_that_it_had_when_it_came(
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {1: "say-0"}
    printer = LogPrinter(lambda id_: known.get(id_, "task-0"))
    printer._thread = threading.Thread(target=printer._run)
    printer([(1, 0, b"hello\n")])
    known.clear()  # its future went with its result
    printer._thread.start()
    printer.close()
    assert capsys.readouterr().out == "[say-0] hello\n"


def test_what_a_slot_that_is_a_thread_wrote_is_told_ahead_of_its_report() -> None:
    output = TaskOutput(None, None, Settings(echo="off"))  # type: ignore[arg-type]
    later: list[object] = []
    output.capture_threads(lambda *call: later.append(call), lambda: 1.0)
    streams = sys.stdout, sys.stderr
    try:
        context = slot_context.SlotContext(3, lambda blocked: None)
        context.task_id, context.attempt = 7, 1
        slot_context.enter(context, whole_process=False)
        for text in ("one\n", "two\n"):
            print(text, end="")
            print(text.upper(), end="", file=sys.stderr)
            output.ended(3)  # before the calls that were asked for
            told = output.message(SimpleNamespace(nbytes=0), 1.0)
            assert told is not None
            assert b"".join(told.texts).decode() == text + text.upper()
        assert later
    finally:
        slot_context.enter(None, whole_process=False)
        sys.stdout, sys.stderr = streams
        logging.getLogger().removeHandler(output._handler)
