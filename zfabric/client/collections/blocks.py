"""Many tiny tasks to few rows: which tasks of an ordered graph travel and run together.

A row costs some tens of microseconds on its way, and a value between two rows more; a task of a
Dask graph is often shorter. So the order (Dask's: depth first, values used soon after they are
made) is cut into segments of `size` tasks. A segment as a whole could not run: its first task may
have all it needs while its last one waits for another segment, and segments would run one after
the other. So each task has a level,

    level = max over its inputs of (input's level, + 1 if the input is of another segment)

and the tasks of one segment with one level are a block. An edge between two blocks always leads
to a higher level, so blocks make no cycle; and blocks of level 0 wait for nothing.

A block's values that others need travel as one bundle. Where most of those who take the bundle
need little of it (a shuffle), it is not made: the block's tasks go alone.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

MOST_TASKS = 64
"""In a block. Of 23,000 tasks of 100 us each, that leaves 6 ms of work per row."""

BLOCKS_PER_SLOT = 32
"""At least, before tasks are put together: so much is left to balance between slots."""

MOST_WASTE = 4
"""Values that are handed over for each one that is needed."""

Key: TypeAlias = Hashable


class Block:
    """Tasks that run as one row.

    keys: in the order in which to run.  outputs: those that others, or the client, need.
    inputs: what it needs of others, in order of first use.
    """

    __slots__ = ("inputs", "keys", "mark", "outputs")

    def __init__(self, mark: Hashable) -> None:
        self.keys: list[Key] = []
        self.inputs: dict[Key, None] = {}
        self.outputs: list[Key] = []
        self.mark = mark


def block_size(n_tasks: int, n_slots: int) -> int:
    """Tasks per segment, 1 for a graph that is small for so many slots."""
    return max(1, min(MOST_TASKS, n_tasks // (max(n_slots, 1) * BLOCKS_PER_SLOT)))


def cut(
    order: Sequence[Key],
    inputs: Mapping[Key, Collection[Key]],
    wanted: Collection[Key],
    alone: Collection[Key],
    marks: Mapping[Key, Hashable],
    size: int,
) -> tuple[list[Block], dict[Key, Block]]:
    """(blocks, block of each key). Each block comes behind all those that it needs.

    order: all keys, each behind its inputs.  inputs: by key; those not in `order` are known.
    wanted: keys that the client takes.  alone: those of them whose value is to be a row's own.
    marks: only tasks with equal marks share a block; a key without has the mark None.
    size: tasks per segment.
    """
    place: dict[Key, tuple[int, int, Any]] = {}
    made: dict[tuple[int, int, Any], Block] = {}
    for index, key in enumerate(order):
        segment = index // size
        mark = marks.get(key)
        tag: Any = (index,) if key in alone else mark
        level = 0
        for need in inputs[key]:
            there = place.get(need)
            if there is not None:
                above = there[1] + (there[0] != segment or there[2] != tag)
                if above > level:
                    level = above
        place[key] = where = (segment, level, tag)
        block = made.get(where)
        if block is None:
            made[where] = block = Block(mark)
        block.keys.append(key)
    blocks = [made[where] for where in sorted(made, key=_by_segment_and_level)]
    owner = {key: block for block in blocks for key in block.keys}
    _link(blocks, owner, inputs, wanted)
    if size > 1:
        wasteful = _wasteful(blocks)
        if wasteful:
            blocks = [part for block in blocks for part in _parts(block, block in wasteful)]
            owner = {key: block for block in blocks for key in block.keys}
            _link(blocks, owner, inputs, wanted)
    return blocks, owner


def _by_segment_and_level(where: tuple[int, int, Any]) -> tuple[int, int]:
    return where[:2]


def _link(
    blocks: list[Block],
    owner: Mapping[Key, Block],
    inputs: Mapping[Key, Collection[Key]],
    wanted: Collection[Key],
) -> None:
    """Fill in what crosses from block to block."""
    crossing = set(wanted)
    for block in blocks:
        block.inputs = {
            need: None for key in block.keys for need in inputs[key] if owner.get(need) is not block
        }
        crossing.update(block.inputs)
    for block in blocks:
        block.outputs = [key for key in block.keys if key in crossing]


def _wasteful(blocks: list[Block]) -> set[Block]:
    """Blocks whose takers would be handed far more than they need."""
    takers: dict[Key, int] = {}
    for block in blocks:
        for key in block.inputs:
            takers[key] = takers.get(key, 0) + 1
    needs_of: dict[Block, set[Block]] = {}
    owner = {key: block for block in blocks if len(block.outputs) > 1 for key in block.outputs}
    for block in blocks:
        for key in block.inputs:
            source = owner.get(key)
            if source is not None:
                needs_of.setdefault(source, set()).add(block)
    found = set()
    for source, who in needs_of.items():
        needed = sum(takers.get(key, 0) for key in source.outputs)
        if len(who) * len(source.outputs) > MOST_WASTE * needed:
            found.add(source)
    return found


def _parts(block: Block, split: bool) -> list[Block]:
    if not split:
        return [block]
    parts = []
    for key in block.keys:
        part = Block(block.mark)
        part.keys.append(key)
        parts.append(part)
    return parts
