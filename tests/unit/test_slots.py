"""Real slots: rows through a socketpair, and every way in which a task can misbehave."""

from __future__ import annotations

import marshal
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from tests.unit.crew import Crew
from tests.unit.slot_tasks import (
    Unreadable,
    add,
    fail,
    hold_gil,
    interrupted,
    kill_self,
    later,
    mapped_at,
    n_mappings,
    segfault,
    spoil,
    start_child_and_die,
    total,
    wait_blocked,
    write,
)
from zfabric.codec import layout
from zfabric.codec.exceptions import load_exception
from zfabric.codec.references import Reference
from zfabric.codec.serialise import loads, loads_inline
from zfabric.errors import CodecError
from zfabric.messages import DIED, ERROR, INLINE, LOCAL, STORED, VALUE
from zfabric.runtime import slot_protocol as p
from zfabric.runtime.slot_link import SlotLink

KINDS = ["process", "thread"]


@pytest.fixture
def crew() -> Iterator[Callable[..., Crew]]:
    """Makes crews, and ends them."""
    made: list[Crew] = []

    def make(*args: Any, **kwargs: Any) -> Crew:
        made.append(Crew(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Future(Reference):
    """A future as arguments have it."""

    __slots__ = ("task_id",)

    def __init__(self, task_id: int) -> None:
        self.task_id = task_id


def text_of(outcome: tuple[int, bytes]) -> str:
    assert outcome[0] == DIED
    (text,) = msgpack.unpackb(outcome[1])
    return str(text)


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_come_back_right(crew: Callable[..., Crew], kind: str) -> None:
    c = crew(2, kind)
    ids = c.map(add, [(i, 1) for i in range(5000)])
    c.wait(*ids)
    assert [c.value(i) for i in ids] == list(range(1, 5001))
    assert c.machine.is_idle()


@pytest.mark.parametrize("kind", KINDS)
def test_chains_run_in_their_slot(crew: Callable[..., Crew], kind: str) -> None:
    c = crew(2, kind)
    c.wait(*c.map(add, [(i, 1) for i in range(500)]))
    last = c.submit(add, 0, 1)
    for _ in range(300):
        last = c.submit(add, Future(last), 1, deps=[(last, LOCAL, 0)])
    c.wait(last)
    assert c.value(last) == 301


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_every_size_come_back_and_go_in(crew: Callable[..., Crew], kind: str) -> None:
    c = crew(1, kind)
    for size in (10, 4000, 5000, 60_000, 70_000, 3_000_000):
        made = c.submit(np.arange, size // 8)
        total = c.submit(np.sum, Future(made), deps=[(made, LOCAL, 0)])
        c.wait(made, total)
        assert c.value(total) == sum(range(size // 8))
        status, payload = c.outcomes[made]
        if status == STORED:
            value = c.store.get(made)
            assert value is not None and int.from_bytes(payload, "little") == value.nbytes
            assert (value.fd >= 0) == (value.nbytes > 65536)
            array = loads(layout.split(value.area, value.sizes))
        else:
            array = loads_inline(payload)
        assert (array == np.arange(size // 8)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_results_of_middle_size_share_slabs(crew: Callable[..., Crew], kind: str) -> None:
    c = crew(1, kind)
    made = c.map(np.full, [(12_500, n) for n in range(100)])  # 10 MB in slabs of 4 MiB
    totals = [c.submit(np.sum, Future(id_), deps=[(id_, LOCAL, 0)]) for id_ in made[::20]]
    c.wait(*made, *totals)
    slabs = set()
    for n, id_ in enumerate(made):
        value = c.store.get(id_)
        assert value is not None and value.slab is not None
        slabs.add(value.slab[0])
        assert (loads(layout.split(value.area, value.sizes)) == n).all()
    assert len(slabs) <= 4
    assert [c.value(id_) for id_ in totals] == [12_500 * n for n in range(0, 100, 20)]


def test_a_result_in_a_slab_does_not_wait_for_a_long_row(crew: Callable[..., Crew]) -> None:
    c = crew(1)
    c.wait(*c.map(add, [(i, 1) for i in range(300)]))
    made = c.map(np.full, [(12_500, n) for n in range(10)])
    c.submit(time.sleep, 3600)
    c.wait(*made)


def test_stored_values_are_shared_and_stay_as_they_are(crew: Callable[..., Crew]) -> None:
    c = crew(1)
    made = c.submit(np.zeros, 100_000)
    spoiled = c.submit(spoil, Future(made), deps=[(made, LOCAL, 0)])
    c.wait(spoiled)
    status, blob = c.outcomes[spoiled]
    assert status == ERROR and "read-only" in str(load_exception(blob))
    value = c.store.get(made)
    assert value is not None and not loads(layout.split(value.area, value.sizes)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_stays_mapped_until_it_is_freed(crew: Callable[..., Crew], kind: str) -> None:
    c = crew(1, kind)
    made = c.submit(np.zeros, 100_000)

    def read() -> tuple[int, int]:
        reader = c.submit(mapped_at, Future(made), deps=[(made, LOCAL, 0)])
        c.wait(reader)
        place: tuple[int, int] = c.value(reader)
        return place

    place, n_mapped = read()
    assert read() == (place, n_mapped) and n_mapped
    (link,) = c.slots.links.values()
    value = c.store.get(made)
    assert value is not None and link.mappings.nbytes == value.nbytes and value.is_shown
    link.unmap([made, 12345])
    assert link.mappings.nbytes == 0
    seen = c.submit(n_mappings)
    c.wait(seen)
    assert c.value(seen) == n_mapped - 1
    assert read()[1] == n_mapped
    # Beyond its limit a slot keeps nothing.
    c.store.mapping_limit = 1000
    read()
    seen = c.submit(n_mappings)
    c.wait(seen)
    assert c.value(seen) == n_mapped - 1 and link.mappings.nbytes == 0


def test_large_calls_and_many_descriptors_get_through(crew: Callable[..., Crew]) -> None:
    c = crew(1)
    big = c.submit(len, b"x" * 3_000_000)
    c.wait(big)
    assert c.value(big) == 3_000_000
    parts = c.map(np.full, [(10_000, i) for i in range(150)])
    c.wait(*parts)

    deps = [(i, LOCAL, 0) for i in parts]
    summed = c.submit(total, *[Future(i) for i in parts], deps=deps)
    c.wait(summed)
    assert c.value(summed) == sum(range(150))


def test_a_call_may_be_a_value_of_its_own(crew: Callable[..., Crew]) -> None:
    from zfabric.codec.arguments import dump_call
    from zfabric.codec.functions import dump_function
    from zfabric.codec.serialise import pack
    from zfabric.messages import Run

    c = crew(1)
    first = c.submit(add, 1, 2)
    frames, deps = dump_call((Future(first), np.arange(10)), {})
    assert list(deps) == [first]
    dumped = dump_function(np.add)
    row = [(0, [(first, LOCAL, 0), (999, INLINE, pack(frames))])]
    c.machine.run(Run([tuple(dumped)], [50], [1], [dumped.id], [b""], row))
    c.wait(50)
    assert c.value(50).tolist() == list(range(3, 13))


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_task_raises_is_its_error(crew: Callable[..., Crew], kind: str) -> None:
    c = crew(1, kind)
    rows = {
        c.submit(fail): LookupError,
        c.submit(sys.exit, 3): SystemExit,
        c.submit(interrupted): KeyboardInterrupt,
        c.submit(Unreadable): TypeError,
        c.submit(iter, "generator"): None,
    }
    fine = c.submit(add, 1, 2)
    c.wait(*rows, fine)
    for id_, error in rows.items():
        if error is not None:
            status, payload = c.outcomes[id_]
            assert status == ERROR
            assert isinstance(load_exception(payload), error)
    assert c.value(fine) == 3 and not c.deaths


def test_an_unpicklable_result_names_the_path(crew: Callable[..., Crew]) -> None:
    c = crew(1)
    id_ = c.submit(Unreadable)
    c.wait(id_)
    assert "result.lock" in str(load_exception(c.outcomes[id_][1]))


def test_coroutine_functions_run(crew: Callable[..., Crew]) -> None:
    c = crew(1)
    id_ = c.submit(later, 1)
    c.wait(id_)
    assert c.value(id_) == 2


def test_a_module_that_is_missing_is_named(crew: Callable[..., Crew], tmp_path: Path) -> None:
    (tmp_path / "only_here_4711.py").write_text("def f():\n    return 1\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import only_here_4711  # type: ignore[import-not-found]

        c = crew(1)
        id_ = c.submit(only_here_4711.f)
        c.wait(id_)
        assert "only_here_4711" in str(load_exception(c.outcomes[id_][1]))
    finally:
        sys.path.remove(str(tmp_path))


# --- deaths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "args", "how"),
    [
        (segfault, (), "SIGSEGV"),
        (kill_self, (signal.SIGKILL,), "SIGKILL"),
        (os.abort, (), "SIGABRT"),
        (os._exit, (3,), "exit code 3"),
    ],
)
def test_a_death_is_blamed_on_the_row_that_ran(
    crew: Callable[..., Crew], fn: Any, args: Any, how: str
) -> None:
    c = crew(1)
    c.wait(*c.map(add, [(i, 1) for i in range(500)]))
    before = c.map(add, [(i, 1) for i in range(20)])
    guilty = c.submit(fn, *args)
    after = c.map(add, [(i, 1) for i in range(20)])
    c.wait(*before, guilty, *after)
    assert all(c.outcomes[i][0] == VALUE for i in before + after)
    text = text_of(c.outcomes[guilty])
    assert how in text and "pid" in text and "MiB" in text and "had run for" in text
    assert len(c.deaths) == 1


def test_a_task_that_closes_all_descriptors_harms_no_other(crew: Callable[..., Crew]) -> None:
    c = crew(1)
    ids = [c.submit(os.closerange, 3, 100), c.submit(add, 1, 2)]
    c.wait(*ids)
    # Its slot is gone either way; the row may have ended before that was seen.
    assert c.outcomes[ids[0]][0] in (VALUE, DIED)
    assert c.value(ids[1]) == 3 and len(c.deaths) == 1


def test_a_slot_that_dies_idle_is_replaced(crew: Callable[..., Crew]) -> None:
    c = crew(1)
    c.wait(c.submit(add, 1, 1))
    os.kill(c.slots.pid(1), signal.SIGKILL)
    c.until(lambda: c.deaths)
    id_ = c.submit(add, 2, 2)
    c.wait(id_)
    assert c.value(id_) == 4 and "had run for" not in c.deaths[0]


def test_children_of_tasks_die_with_their_slot(crew: Callable[..., Crew]) -> None:
    path = f"/tmp/zfabric-test-{os.getpid()}"
    c = crew(1)
    c.wait(c.submit(start_child_and_die, path))
    pid = int(Path(path).read_text())
    Path(path).unlink()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if b") Z" in Path(f"/proc/{pid}/stat").read_bytes():
                break
        except FileNotFoundError:
            break
    else:
        pytest.fail("the child is still there")


# --- rows ahead -------------------------------------------------------------------------------


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    """A pipe by name: whoever opens one end waits for the other."""
    os.mkfifo(tmp_path / "fifo")
    return str(tmp_path / "fifo")


def test_rows_are_taken_back_from_a_slot_that_holds_the_gil(
    crew: Callable[..., Crew], fifo: str
) -> None:
    c = crew(1)
    c.wait(*c.map(add, [(i, 1) for i in range(500)]))
    hog = c.submit(hold_gil, fifo)
    rest = c.map(add, [(i, 1) for i in range(100)])
    c.until(lambda: c.slots.links[1].is_running())
    c.machine.recall(rest[50:])
    c.until(lambda: len(c.returned) == 50)
    assert hog not in c.outcomes and c.returned == rest[50:]
    write(fifo)
    c.wait(hog, *rest[:50])
    assert c.value(hog) == "released" and not c.deaths


def test_a_result_before_a_long_row_is_not_held_up(crew: Callable[..., Crew], fifo: str) -> None:
    c = crew(1)
    c.wait(*c.map(add, [(i, 1) for i in range(500)]))
    short = c.map(add, [(1, 1), (2, 2)])
    long = c.submit(hold_gil, fifo)
    c.wait(*short)
    assert long not in c.outcomes
    write(fifo)
    c.wait(long)


def test_an_idle_slot_runs_what_waits_behind_a_long_row(
    crew: Callable[..., Crew], fifo: str
) -> None:
    c = crew(2)
    c.wait(*c.map(add, [(i, 1) for i in range(5000)]))
    long = c.submit(hold_gil, fifo)
    rest = c.map(add, [(i, 1) for i in range(100)])
    c.wait(*rest)
    assert long not in c.outcomes
    write(fifo)
    c.wait(long)


# --- blocked ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_blocked_row_lets_others_run(crew: Callable[..., Crew], fifo: str, kind: str) -> None:
    c = crew(1, kind)
    waiting = c.submit(wait_blocked, fifo)
    child = c.submit(write, fifo)
    c.wait(waiting, child)
    assert c.value(waiting) == f"crew {waiting}"
    fine = c.map(add, [(i, 1) for i in range(100)])
    c.wait(*fine)


def test_there_is_no_context_outside_of_tasks() -> None:
    from zfabric.runtime.slot_context import current

    assert current() is None


def test_records_fit_marshal() -> None:
    """Rows are packed by marshal, whose second version writes no references: the fastest."""
    row = (1, 1, 5, b"args")
    assert marshal.loads(marshal.dumps([row, [1, [b"", 2, (3,)], True]], 2))[0] == row


def test_a_slot_process_imports_little() -> None:
    import subprocess

    code = (
        "import sys, zfabric.runtime.slot\n"
        "print([m for m in ('zmq', 'numpy', 'msgpack', 'asyncio', 'click', 'cloudpickle', 'blosc',"
        " 'subprocess') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_record_that_names_a_slab_which_never_came_is_an_error_of_that_slot() -> None:
    ours, theirs = socket.socketpair()
    link = SlotLink(1, ours, os.eventfd(0), mmap.mmap(-1, p.PAGE_NBYTES))
    payload = marshal.dumps(([100], (1, 0)), 2)
    body = p.HEAD.pack(0, 0) + p.RECORD.pack(STORED, len(payload), 5) + payload
    theirs.send(p.FRAME.pack(len(body), p.RESULTS) + body)
    with theirs:
        with pytest.raises(CodecError, match="slab 1"):
            link.read()
        link.close()


@pytest.mark.parametrize("lost", ["truncated", "missing"])
def test_a_file_without_its_descriptor_is_an_error_of_that_slot(lost: str) -> None:
    ours, theirs = socket.socketpair()
    tokens = os.eventfd(0, os.EFD_NONBLOCK)
    link = SlotLink(1, ours, tokens, mmap.mmap(-1, p.PAGE_NBYTES))
    body = p.HEAD.pack(0, 0)
    frame = p.FRAME.pack(len(body), p.FILE) + body
    if lost == "truncated":
        copies = [os.dup(tokens) for _ in range(100)]  # more than the link has room for
        socket.send_fds(theirs, [frame], copies)
        for fd in copies:
            os.close(fd)
    else:
        theirs.send(frame)
    try:
        with pytest.raises(CodecError):
            link.read()
    finally:
        link.close()
        theirs.close()
