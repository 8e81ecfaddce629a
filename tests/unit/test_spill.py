"""Values that go to disk when memory is short, and come back."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.supervisor_bench import Bench
from zfabric.config import Settings
from zfabric.core.supervisor import Supervisor
from zfabric.core.supervisor_effects import TakeBack
from zfabric.errors import CodecError
from zfabric.messages import Done
from zfabric.runtime import spill, worker
from zfabric.runtime.host_memory import available_share
from zfabric.runtime.slot_values import InFile
from zfabric.runtime.spill import SpillFiles
from zfabric.runtime.store import Store
from zfabric.runtime.value import Value

NBYTES = 100_000


def value(number: int, nbytes: int = NBYTES) -> Value:
    file = InFile([bytes([number]) * nbytes], [nbytes])
    return Value.from_file(file.sizes, os.dup(file.fd))


def n_unnamed() -> int:
    """Files without a name that this process has open."""
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(fd))
        except FileNotFoundError:
            continue
    return sum("(deleted)" in link and "memfd:" not in link for link in links)


def test_the_least_recently_used_go_first_and_come_back(
    tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    changes: list[bool] = []
    store = Store(10 * NBYTES, SpillFiles(str(tmp_path)), lambda: changes.append(store.is_full))
    before = n_unnamed()
    for number in range(50):
        assert store.make_room(NBYTES)
        store.put(number, value(number))
        assert store.nbytes <= 10 * NBYTES
        assert store.get(0) is not None
    wait_until(lambda: store.nbytes <= 6 * NBYTES)
    assert store.nbytes + store.spilled_nbytes == 50 * NBYTES and not store.is_full
    assert store.shared_nbytes == store.nbytes
    assert list(tmp_path.iterdir()) == [], "the files have no names"
    for number in (0, 1, 25, 49, 1):
        part = store.chunk(number, 10, 5)
        assert part is not None and bytes(part) == bytes([number]) * 5
    store.free(range(1, 50))
    wait_until(lambda: store.nbytes + store.spilled_nbytes == NBYTES)
    store.close()
    assert (store.nbytes, store.spilled_nbytes, n_unnamed()) == (0, 0, before)


def test_whoever_waits_for_memory_hears_of_it_whichever_thread_made_it(tmp_path: Path) -> None:
    """A put that fills the store while the spiller, which had found it not full, is writing."""
    writing, go_on = threading.Event(), threading.Event()

    class Slow(SpillFiles):
        def write(self, area: Any) -> Any:
            writing.set()
            assert go_on.wait(10)
            return super().write(area)

    changes: list[bool] = []
    store = Store(10 * NBYTES, Slow(str(tmp_path)), lambda: changes.append(store.is_full))
    for number in range(7):
        store.put(number, value(number))
    assert writing.wait(10)
    store.put(7, value(7))
    store.put(8, value(8))
    assert changes == [True]
    go_on.set()
    store.close()
    assert changes == [True, False]


def test_slots_hear_of_values_that_went_to_disk(tmp_path: Path) -> None:
    told = threading.Event()
    store = Store(2 * NBYTES, SpillFiles(str(tmp_path)), told.set)
    shown = value(1)
    store.put(1, shown)
    serial, shown.is_shown = shown.serial, True
    assert store.make_room(2 * NBYTES)
    assert told.is_set() and store.left() == [1] and store.left() == []
    assert store.get(1) is shown and shown.serial != serial, "it is in other memory now"
    store.close()


def test_many_threads_may_use_it(tmp_path: Path) -> None:
    store = Store(5 * NBYTES, SpillFiles(str(tmp_path)))
    wrong: list[int] = []

    def use(first: int) -> None:
        for number in range(first, first + 40):
            store.put(number, value(number % 256))
            for again in range(first, number + 1, 7):
                with store.holding(again) as found:
                    if found is None or found.area[7] != again % 256:
                        wrong.append(again)
        store.free(range(first, first + 40))

    threads = [threading.Thread(target=use, args=(n * 1000,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    store.close()
    assert not wrong and (store.nbytes, store.spilled_nbytes) == (0, 0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_nothing_keeps_values_in_memory(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Any]
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    store, before = Store(3 * NBYTES, SpillFiles(str(tmp_path))), n_unnamed()
    with monkeypatch.context() as patch:
        patch.setattr(spill.os, "pwrite", fail)
        for number in range(5):
            store.put(number, value(number))
        wait_until(lambda: store.trouble)
        assert not store.make_room(NBYTES) and not store.is_full
        assert store.nbytes == 5 * NBYTES and n_unnamed() == before
        assert all(store.get(number) is not None for number in range(5))
    store.close()


def test_a_disk_that_has_room_again_is_no_trouble_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Any]
) -> None:
    """Though no value has to go there meanwhile."""
    monkeypatch.setattr("zfabric.runtime.store.RETRY_S", 0.01)
    missing = tmp_path / "missing"
    store = Store(NBYTES, SpillFiles(str(missing)), lambda: None)
    store.put(1, value(1))
    store.put(2, value(2))
    wait_until(lambda: "missing" in store.trouble)
    store.free([1, 2])
    missing.mkdir()
    wait_until(lambda: not store.trouble)
    assert not store.spilled_nbytes
    store.close()


def test_a_disk_that_takes_nothing_pauses_work_when_memory_is_scarce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Any]
) -> None:
    share = 0.05
    told: list[bool] = []
    monkeypatch.setattr("zfabric.runtime.store.available_share", lambda: share)
    monkeypatch.setattr("zfabric.runtime.store.RETRY_S", 0.01)
    missing = tmp_path / "missing"
    store = Store(NBYTES, SpillFiles(str(missing)), lambda: told.append(store.is_full))
    store.put(1, value(1))
    store.put(2, value(2))
    wait_until(lambda: store.is_full and "missing" in store.trouble)
    share = 0.5  # others have given memory back
    wait_until(lambda: not store.is_full)
    missing.mkdir()  # and the disk is back, with nobody putting anything
    wait_until(lambda: store.spilled_nbytes)
    assert not store.trouble and told[:2] == [True, False]
    store.close()


def test_a_directory_that_others_may_write_to_gets_no_values(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match=f"chmod go-w {tmp_path}"):
        SpillFiles(str(tmp_path)).write(memoryview(b"abc"))
    assert worker.serve("tcp://127.0.0.1:1", settings=Settings(spill_directory=str(tmp_path))) == 2
    tmp_path.chmod(0o1777)  # as /tmp is: nobody moves the files of others there
    files = SpillFiles(str(tmp_path))
    files.free(files.write(memoryview(b"abc")))


def test_what_is_free_leaves_out_caches_of_files(tmp_path: Path) -> None:
    assert 0 < available_share(tmp_path) <= 1  # no container: the host's
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("990000\n")
    (tmp_path / "memory.stat").write_text("shmem 7\nactive_file 1000\ninactive_file 29000\n")
    assert available_share(tmp_path) == pytest.approx(0.04)
    (tmp_path / "memory.max").write_text("max\n")
    assert available_share(tmp_path) > 0.04


def test_bytes_that_have_changed_on_disk_are_a_lost_value(
    tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    store = Store(NBYTES, SpillFiles(str(tmp_path)))
    store.put(1, value(1))
    wait_until(lambda: store.spilled_nbytes == NBYTES)
    part = store._values[1].spilled
    assert part is not None
    os.pwrite(part.file.fd, b"x", part.offset + 500)
    assert store.get(1) is None and store.lost() == [1] and store.lost() == []
    assert (store.nbytes, store.spilled_nbytes, 1 in store) == (0, 0, False)
    store.close()


def test_files_without_a_name_where_the_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill.os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)
    files = SpillFiles(str(tmp_path))
    part = files.write(memoryview(b"abc"))
    others = SpillFiles(str(tmp_path))
    other = others.write(memoryview(b"abc"))
    assert part.checksum != other.checksum
    others.free(other)
    assert list(tmp_path.iterdir()) == []
    to = bytearray(3)
    files.read(part, memoryview(to))
    assert to == b"abc"
    with pytest.raises(CodecError):
        files.read(part._replace(checksum=1), memoryview(to))
    files.free(part)


def test_full_is_what_was_told_last() -> None:
    """Between a step of another thread and its word on it, nobody may see the step alone: a worker
    that did was full, or not full, for good."""
    told = []
    store = Store(10 * NBYTES, on_change=lambda: told.append(store.is_full))
    for number in range(9):
        store.put(number, value(number))
    assert told == [True]
    store.nbytes = 0  # as amid a step
    assert store.is_full
    store.free((0,))
    assert told == [True, False] and not store.is_full


def test_a_full_worker_takes_no_more_rows_until_there_is_room() -> None:
    machine = Supervisor(2, now=0.0)
    assert machine.credit(0.0) > 0
    for full in (True, False):
        machine.set_full(full)
        (told,) = machine.messages(1.0)
        assert isinstance(told, Done) and (told.credit == 0) is full
        machine.set_full(full)
        assert machine.messages(1.0) == []


def test_what_a_full_worker_has_handed_out_ahead_waits_for_room() -> None:
    bench = Bench(2)
    bench.short_rows()
    bench.run(*range(1, 11))
    assert bench.sent() == {1: [1, 2, 3, 4, 5], 2: [6, 7, 8, 9, 10]}
    bench.machine.set_full(True)
    assert bench.effects() == [TakeBack(1, 4), TakeBack(2, 4)]
    bench.machine.taken_back(1, 4)
    bench.machine.taken_back(2, 3)
    for slot in (1, 2):
        bench.machine.slot_reset(slot)
    bench.done(1, b"x")
    bench.done(2, b"x", b"x")
    bench.run(11)
    assert bench.sent() == {}, "a result might need memory"
    bench.machine.set_full(False)
    assert sum(bench.sent().values(), []) == [8, 9, 10, 2, 3, 4, 5, 11]


def test_a_row_that_was_asked_for_when_the_worker_got_full_is_not_the_last() -> None:
    bench = Bench(1)
    bench.short_rows()
    bench.run(*range(1, 11))
    bench.sent()
    bench.machine.recall([10])
    assert bench.effects() == [TakeBack(1, 1)]
    bench.machine.set_full(True)
    assert bench.effects() == []
    bench.machine.taken_back(1, 1)
    assert bench.effects() == [TakeBack(1, 8)]
    bench.machine.taken_back(1, 5)
    assert bench.effects() == [], "it has begun the rest"


def test_a_full_worker_runs_what_its_blocked_rows_wait_for() -> None:
    bench = Bench(1)
    bench.short_rows()
    bench.run(1)
    assert bench.sent() == {1: [1]}
    bench.machine.set_full(True)
    bench.machine.slot_blocked(1)
    (start,) = bench.effects()
    bench.machine.slot_started(start.slot, bench.now)
    bench.run(2, 3)
    assert bench.sent() == {start.slot: [2]}, "one at a time"
    bench.done(start.slot, b"x")
    assert bench.sent() == {start.slot: [3]}


@pytest.mark.parametrize("short", [errno.EMFILE, errno.ENOMEM])
def test_want_of_descriptors_or_memory_loses_no_value(
    short: int, tmp_path: Path, wait_until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(10 * NBYTES, SpillFiles(str(tmp_path)))
    for number in range(20):
        store.put(number, value(number))
    wait_until(lambda: store.peek(0).spilled is not None)

    def refuse(sizes: Any) -> Value:
        raise OSError(short, os.strerror(short))

    with monkeypatch.context() as patch:
        patch.setattr(store, "allocate", refuse)
        with pytest.raises(OSError, match=os.strerror(short)):
            store.get(0)
        assert store.copy(0) == ((NBYTES,), bytes(NBYTES))
    assert store.lost() == []
    found = store.get(0)
    assert found is not None and bytes(found.area) == bytes(NBYTES)
    assert store.copy(0) == ((NBYTES,), bytes(NBYTES)) and store.copy(99) is None
    store.close()


def n_memfds() -> int:
    """Values and packs that this process has open."""
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found += "memfd:zfabric" in os.readlink(fd)
        except FileNotFoundError:
            continue
    return found


def test_many_small_values_take_few_descriptors(
    tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    gc.collect()  # what other tests left in cycles shall not vanish meanwhile
    before = n_memfds()
    store = Store(most_descriptors=20)
    for number in range(500):
        store.put(number, value(number % 251))
        assert n_memfds() - before <= 2 * 20 + 3
    assert store.nbytes == 500 * NBYTES and store.spilled_nbytes == 0
    wait_until(lambda: n_memfds() - before <= 20 + 3)
    for number in (0, 499, 3, 0):
        part = store.chunk(number, 10, 5)
        assert part is not None and bytes(part) == bytes([number % 251]) * 5
    kept = store.get(7)
    assert kept is not None and kept.nbytes == NBYTES
    store.free(range(400))
    wait_until(lambda: store.nbytes == 100 * NBYTES)
    store.close()
    del kept, part
    assert (store.nbytes, n_memfds()) == (0, before)


def test_packed_values_go_to_disk_when_memory_is_short(tmp_path: Path) -> None:
    store = Store(30 * NBYTES, SpillFiles(str(tmp_path)), most_descriptors=5)
    for number in range(100):
        assert store.make_room(NBYTES)
        store.put(number, value(number))
        assert store.nbytes <= 30 * NBYTES
    assert store.nbytes + store.spilled_nbytes == 100 * NBYTES
    for number in range(100):
        part = store.chunk(number, 10, 5)
        assert part is not None and bytes(part) == bytes([number]) * 5
    store.close()
    assert (store.nbytes, store.spilled_nbytes, store.n_values) == (0, 0, 0)


def test_the_pages_of_a_packed_value_go_with_it() -> None:
    packs = SpillFiles(in_memory=True)
    parts = [packs.write(memoryview(bytes([n]) * NBYTES)) for n in range(10)]
    fd = parts[0].file.fd
    full = os.fstat(fd).st_blocks
    for part in parts[:9]:
        packs.free(part)
    assert os.fstat(fd).st_blocks <= full // 9
    kept = memoryview(bytearray(NBYTES))
    packs.read(parts[9], kept)
    assert bytes(kept) == bytes([9]) * NBYTES
    packs.free(parts[9])


def test_disk_space_comes_back_value_by_value(tmp_path: Path) -> None:
    """Though all lie in one file, and one of them stays."""
    files = SpillFiles(str(tmp_path))
    data = memoryview(os.urandom(4 * 2**20))
    parts = [files.write(data) for _ in range(8)]
    fd = parts[0].file.fd
    os.fsync(fd)
    full = os.fstat(fd).st_blocks * 512
    for part in (*parts[:3], *parts[4:]):
        files.free(part)
    assert os.fstat(fd).st_blocks * 512 <= full // 4
    back = bytearray(data.nbytes)
    files.read(parts[3], memoryview(back))
    assert back == data
    files.free(parts[3])
