"""Many values in one piece of shared memory: what a slot writes, and what holding them costs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfabric.errors import CodecError
from zfabric.runtime.slabs import LARGEST, SLAB_NBYTES, SlabBook, Slabs, whole_pages
from zfabric.runtime.slot_values import outlay, write_all
from zfabric.runtime.store import Store
from zfabric.runtime.value import Value

NBYTES = 100_000
PER_SLAB = SLAB_NBYTES // whole_pages(NBYTES)


class Reader:
    """What the other side has of a slot's slabs."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.slabs = Slabs(lambda fd: self.fds.append(os.dup(fd)))

    def write(self, byte: bytes, nbytes: int = NBYTES, is_whole: bool = False) -> Value:
        number, offset = self.slabs.write([byte * nbytes], nbytes, write_all)
        return Value.from_slab([nbytes], os.dup(self.fds[number - 1]), offset, is_whole)

    def close(self) -> None:
        self.slabs.close()
        self.let_go()

    def let_go(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.close()


def test_values_lie_one_behind_the_other_and_each_is_read_alone(reader: Reader) -> None:
    values = [reader.write(bytes([n]), NBYTES + n) for n in range(2 * PER_SLAB)]
    assert len(reader.fds) == 2 or len(reader.fds) == 3
    for n, value in enumerate(values):
        assert value.area == bytes([n]) * (NBYTES + n)
        assert value.chunk(5, 10) == bytes([n]) * 10
    mine = values[1].unshared()
    mine.area[0:1] = b"x"  # type: ignore[index]
    assert bytes(mine.area[:2]) == b"x\1"
    with pytest.raises(TypeError):
        values[0].area[0:1] = b"x"  # type: ignore[index]


def test_a_slab_is_written_again_when_nobody_has_any_of_it(reader: Reader) -> None:
    value = reader.write(b"a")
    inode = os.fstat(value.fd).st_ino
    area = value.area
    value.close()
    reader.let_go()
    fresh = [reader.slabs.write([b"b" * LARGEST], LARGEST, write_all) for _ in range(40)]
    assert {slab for slab, _ in fresh} == {1, 2, 3}
    assert inode not in {os.fstat(fd).st_ino for fd in reader.fds}
    assert area == b"a" * NBYTES, "a mapping keeps it as it is"
    reader.let_go()
    del area, value
    gc.collect()
    seen = set()
    for _ in range(3 * SLAB_NBYTES // LARGEST):
        reader.slabs.write([b"c" * LARGEST], LARGEST, write_all)
        seen |= {os.fstat(fd).st_ino for fd in reader.fds}
        reader.let_go()
    assert len(seen) <= 2, "the two that are kept, in turn"


def test_a_place_outside_of_a_slab_is_refused(reader: Reader) -> None:
    value = reader.write(b"a")
    for offset in (1, -4096, SLAB_NBYTES, SLAB_NBYTES - 4096):
        copy = os.dup(value.fd)
        with pytest.raises(CodecError):
            Value.from_slab([NBYTES], copy, offset)
        with pytest.raises(OSError):
            os.fstat(copy)


def test_a_descriptor_that_a_task_has_taken_is_not_written_to(
    reader: Reader, tmp_path: Any
) -> None:
    reader.write(b"a").close()
    writer = reader.slabs._writer
    with open(tmp_path / "mine", "w+b") as mine:
        os.dup2(mine.fileno(), writer)
        frames = [memoryview(b"x" * NBYTES)]
        _, blob = outlay(frames, 4096, reader.slabs)
        blob.close()
        assert os.fstat(mine.fileno()).st_size == 0
        os.close(writer)
    assert reader.write(b"b").area == b"b" * NBYTES


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 3))))
def test_the_book_knows_what_is_lost(steps: list[tuple[bool, int, int]]) -> None:
    book, held = SlabBook(), dict[int, tuple[int, int]]()
    for enters, id_, slab in steps:
        if enters and id_ not in held:
            held[id_] = slab, id_
            book.enter(slab, 2**20, id_, 4096 * id_ + 1)
        elif not enters:
            book.leave(held.pop(id_, (slab, 0))[0], id_)
        slabs = {slab for slab, _ in held.values()}
        assert book.slack == 2**20 * len(slabs) - sum(4096 * (n + 1) for _, n in held.values())
        sparse = book.sparse()
        assert bool(sparse) is (len(slabs) > 1)
        assert len({held[each][0] for each in sparse}) <= 1


def test_the_rest_of_a_slab_is_moved_when_too_much_is_lost(
    reader: Reader, wait_until: Callable[..., Any]
) -> None:
    store = Store(limit=16 * 3 * SLAB_NBYTES)
    try:
        for n in range(8 * PER_SLAB):
            store.put(n, reader.write(bytes([n % 251])))
        kept = range(0, 8 * PER_SLAB, PER_SLAB // 2)
        store.free(n for n in range(8 * PER_SLAB) if n not in kept)
        wait_until(lambda: store.slabs.slack <= store.mapping_limit)
        for n in kept:
            value = store.get(n)
            assert value is not None and value.area == bytes([n % 251]) * NBYTES
        assert store.nbytes == len(kept) * NBYTES
        store.clear()
        assert store.slabs.slack == 0
    finally:
        store.close()
