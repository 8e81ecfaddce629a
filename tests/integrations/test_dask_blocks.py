"""Cutting a graph into blocks: every task once, no cycle, each block behind its inputs."""

from __future__ import annotations

from random import Random

import pytest

from zfabric.client.collections.blocks import Block, block_size, cut


def random_graph(rng: Random, n_tasks: int) -> dict[int, set[int]]:
    return {
        key: {rng.randrange(max(0, key - 40), key) for _ in range(rng.randrange(3))}
        if key
        else set()
        for key in range(n_tasks)
    }


def check(blocks: list[Block], inputs: dict[int, set[int]], wanted: set[int]) -> None:
    ran: set[int] = set()
    out: set[int] = set()
    for block in blocks:
        assert set(block.inputs) <= out, "an input that no block before it gives"
        known = set(block.inputs)
        for key in block.keys:
            assert inputs[key] <= known
            assert key not in ran
            ran.add(key)
            known.add(key)
        out.update(block.outputs)
    assert ran == set(inputs)
    assert wanted <= out


@pytest.mark.parametrize("seed", range(30))
def test_any_graph(seed: int) -> None:
    rng = Random(seed)
    inputs = random_graph(rng, 400)
    wanted = set(rng.sample(range(400), 30))
    alone = set(list(wanted)[:10])
    marks = {key: rng.choice("ab") for key in rng.sample(range(400), 50)}
    blocks, owner = cut(list(inputs), inputs, wanted, alone, marks, rng.choice([1, 2, 7, 64]))
    check(blocks, inputs, wanted)
    for block in blocks:
        assert len({marks.get(key) for key in block.keys} - {None}) <= 1
        if alone & set(block.keys):
            assert len(block.keys) == 1
        assert all(owner[key] is block for key in block.keys)


def test_chains_run_side_by_side() -> None:
    """Sixteen chains, depth first: no block waits for another."""
    inputs = {(c, n): {(c, n - 1)} if n else set() for c in range(16) for n in range(64)}
    blocks, _ = cut(list(inputs), inputs, [], [], {}, 64)
    assert len(blocks) == 16
    assert not any(block.inputs for block in blocks)


def test_no_bundles_for_a_shuffle() -> None:
    """Whoever takes one piece of each block is not handed all of it."""
    inputs: dict[object, set[object]] = {
        ("split", s, d): set() for s in range(16) for d in range(16)
    }
    inputs |= {("join", d): {("split", s, d) for s in range(16)} for d in range(16)}
    joins = [("join", d) for d in range(16)]
    blocks, _ = cut(list(inputs), inputs, joins, joins, {}, 8)
    assert all(len(b.outputs) == 1 for b in blocks if b.keys[0][0] == "split")  # type: ignore[index]


def test_small_graphs_are_not_put_together() -> None:
    assert block_size(100, 4) == 1
    assert block_size(640, 2) == 10
    assert block_size(10**6, 2) == 64
    assert block_size(10, 0) == 1
