"""Dask graphs: of many small tasks, where the scheduler is the work, and of few large chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np

MB = 10**6


@dataclass(frozen=True, slots=True)
class Sizes:
    """small: chunks along each side of the small-task arrays.  total, chunk: bytes of the large."""

    small: int = 100
    total: int = 1000 * MB
    chunk: int = 16 * MB


QUICK = Sizes(small=20, total=40 * MB, chunk=2 * MB)


def small(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """Collections of many tasks, none of which takes long."""
    side = 100 * sizes.small

    def transpose_sum() -> Any:
        x = da.random.random((side, side), chunks=(100, 100))
        return (x + x.T).sum()

    def means() -> Any:
        x = da.ones((side, side), chunks=(100, 100))
        return (x - x.mean(axis=0)).std(axis=1).max()

    return {"(x + x.T).sum()": transpose_sum, "(x - x.mean()).std()": means}


def large(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """Collections of few tasks on chunks of some size; each gives a small value."""
    side = int((sizes.total / 8) ** 0.5)
    edge = int((sizes.chunk / 8) ** 0.5)
    n_rows = sizes.total // 32
    n_parts = max(2, sizes.total // sizes.chunk)

    def square() -> Any:
        return da.random.default_rng(0).random((side, side), chunks=(edge, edge))

    def elementwise() -> Any:
        x = square()
        return (da.sin(x) ** 2 + da.cos(x) ** 2).sum()

    def transpose_sum() -> Any:
        x = square()
        return (x + x.T).sum()

    def tensordot() -> Any:
        return da.tensordot(square(), square(), axes=((1,), (0,))).sum()

    def rechunk() -> Any:
        return square().rechunk((side, max(1, edge * edge // side))).max(axis=0).sum()

    def svd() -> Any:
        rows = sizes.chunk // 8 // 50
        tall = da.random.default_rng(0).random((sizes.total // 8 // 50, 50), chunks=(rows, 50))
        return da.linalg.svd(tall)[1]

    found = {
        "elementwise": elementwise,
        "transpose-sum": transpose_sum,
        "tensordot": tensordot,
        "rechunk": rechunk,
        "svd": svd,
    }
    return {**found, **_frames(n_rows, n_parts)}


def _frames(n_rows: int, n_parts: int) -> dict[str, Callable[[], Any]]:
    import dask.dataframe as dd
    import pandas as pd

    per_part = n_rows // n_parts

    def part(number: int) -> Any:
        rng = np.random.default_rng(number)
        return pd.DataFrame(
            {
                "k": rng.integers(0, 100, per_part),
                "id": rng.permutation(per_part) + number * per_part,
                "v": rng.random(per_part),
                "w": rng.random(per_part),
            }
        )

    def frame() -> Any:
        return dd.from_map(part, range(n_parts), meta=part(0).iloc[:0])

    def groupby() -> Any:
        return frame().groupby("k").v.mean()

    def shuffle() -> Any:
        return frame().shuffle("id").map_partitions(len, meta=("n", int)).sum()

    def merge() -> Any:
        df = frame()
        return df.merge(df[df.v < 0.5], on="id").w_x.sum()

    return {"groupby": groupby, "shuffle": shuffle, "merge": merge}
