"""What tasks write reaches their client, whole, in time, and under the right task."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zfabric import Client, KilledTask, LocalFabric
from zfabric.core.output import HEAD, TAIL

WaitUntil = Callable[..., object]


def speak(i: int) -> int:
    print("line", i)
    print("error", i, file=sys.stderr)
    return i


def write_below_python(i: int) -> int:
    os.write(1, b"raw %d\n" % i)
    return i


def start_process(i: int) -> None:
    subprocess.run(["echo", f"child {i}"], check=True)


def warn(i: int) -> None:
    logging.getLogger("mine").warning("careful %d", i)


def no_newline(text: str) -> None:
    print(text, end="")


def speak_and_die(text: str) -> None:
    print(text)
    os.write(2, b"last words\n")
    os.kill(os.getpid(), 9)


def flood(n_lines: int) -> None:
    for i in range(n_lines):
        print(i, "x" * 100)


def speak_and_wait(path: str) -> None:
    print("begun")
    while not os.path.exists(path):
        os.sched_yield()


def say_nothing(i: int) -> int:
    return i


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with LocalFabric(slots=2, echo=False) as fabric, Client(fabric) as client:
        yield client


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (speak, "line {0}\nerror {0}\n"),
        (write_below_python, "raw {0}\n"),
        (start_process, "child {0}\n"),
        (warn, "careful {0}\n"),
        (say_nothing, ""),
    ],
)
def test_each_task_has_its_own(client: Client, fn: Callable[[int], object], text: str) -> None:
    futures = client.map(fn, range(30))
    client.gather(futures)
    assert [future.logs() for future in futures] == [text.format(i) for i in range(30)]


def test_the_beginning_of_a_line_is_told_with_the_end_of_its_task(client: Client) -> None:
    futures = client.map(no_newline, ["one", "zwei", "три"])
    client.gather(futures)
    assert [future.logs() for future in futures] == ["one", "zwei", "три"]


def test_a_running_task_is_heard(client: Client, tmp_path: Path, wait_until: WaitUntil) -> None:
    gate = tmp_path / "gate"
    future = client.submit(speak_and_wait, str(gate))
    wait_until(future.logs, what="output of a running task")
    assert future.logs() == "begun\n" and not future.done()
    gate.touch()
    future.result(20)


def test_a_task_that_died_has_left_its_last_words(client: Client) -> None:
    future = client.submit(speak_and_die, "goodbye")
    with pytest.raises(KilledTask) as raised:
        future.result(30)
    assert len(raised.value.attempts) == 3
    for text in raised.value.attempts:
        assert text.endswith("; its last output:\n  goodbye\n  last words")
    one = "goodbye\nlast words\n"
    numbers = [line for line in future.logs().splitlines() if line.startswith("--- try")]
    assert len(numbers) == 2
    assert future.logs() == f"{one}{numbers[0]}\n{one}{numbers[1]}\n{one}"


def test_of_a_flood_the_beginning_and_the_end_are_kept(client: Client) -> None:
    n_lines = 40_000
    future = client.submit(flood, n_lines)
    beside = client.map(speak, range(5))
    future.result(60)
    client.gather(beside)
    text = future.logs()
    assert text.startswith("0 xxx") and text.endswith(f"\n{n_lines - 1} {'x' * 100}\n")
    assert "bytes left out" in text and len(text) < HEAD + TAIL + 100
    assert [f.logs() for f in beside] == [f"line {i}\nerror {i}\n" for i in range(5)]


def test_it_goes_with_the_future(client: Client, wait_until: WaitUntil) -> None:
    futures = client.map(speak, range(50))
    client.gather(futures)
    texts, ids = client._submitter.output.texts, {future.task_id for future in futures}
    assert ids <= texts.keys()
    del futures
    wait_until(lambda: ids.isdisjoint(texts), what="texts of released tasks gone")


def test_slots_that_are_threads_tell_what_goes_by_sys_and_logging() -> None:
    with LocalFabric(slots=2, kind="thread", echo=False) as fabric, Client(fabric) as client:
        for fn, text in (
            (speak, "line {0}\nerror {0}\n"),
            (warn, "careful {0}\n"),
        ):
            futures = client.map(fn, range(20))
            client.gather(futures)
            assert [future.logs() for future in futures] == [text.format(i) for i in range(20)]


PROGRAM = """
import sys
from zfabric import Client

def say(text):
    print(text)
    print(text.upper(), file=sys.stderr)

if __name__ == "__main__":
    with Client(slots=1, **{options}) as client:
        client.submit(say, "hello").result(30)
"""


@pytest.mark.parametrize(
    ("options", "out", "err"),
    [
        ({}, "hello\n", "HELLO\n"),
        ({"kind": "thread"}, "hello\n", "HELLO\n"),
        ({"show_logs": True}, "[say-0] hello\n[say-0] HELLO\n", ""),
    ],
)
def test_what_a_task_prints_appears_at_the_terminal(
    tmp_path: Path, options: dict[str, object], out: str, err: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(options=options))
    ran = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=True
    )
    assert (ran.stdout, ran.stderr) == (out, err)


def log_below_warning() -> None:
    logging.getLogger("mine").info("by the way")


def test_records_below_warning_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZFABRIC_LOG_LEVEL", "INFO")
    with LocalFabric(slots=1, echo=False) as fabric, Client(fabric) as client:
        future = client.submit(log_below_warning)
        future.result(30)
        assert future.logs().endswith(" INFO mine: by the way\n")
