"""What a supervisor knows of its slots' mappings."""

from __future__ import annotations

from zfabric.runtime.kept_mappings import MOST, KeptMappings


def test_the_least_recently_used_go_first() -> None:
    kept = KeptMappings()
    for id_ in (1, 2, 3):
        kept.add(id_, id_, 10)
    assert kept.has(1, 1) and kept.trim(30) == []
    assert kept.trim(15) == [2, 3] and kept.nbytes == 10
    assert not kept.has(2, 2) and kept.has(1, 1)
    assert kept.trim(0) == [1] and kept.nbytes == 0


def test_there_are_never_more_than_a_few() -> None:
    kept = KeptMappings()
    for id_ in range(MOST + 5):
        kept.add(id_, id_, 1)
    assert kept.trim(1 << 40) == list(range(5)) and kept.nbytes == MOST


def test_a_value_that_was_on_disk_is_in_other_memory() -> None:
    kept = KeptMappings()
    kept.add(1, 7, 10)
    assert not kept.has(1, 8)
    kept.add(1, 8, 10)
    assert kept.has(1, 8) and kept.nbytes == 10
    assert kept.discard([1, 2]) == [1] and kept.discard([1]) == [] and kept.nbytes == 0
