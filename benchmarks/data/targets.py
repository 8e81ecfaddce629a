"""What large values are to reach, as ratios of figures that were taken in one run."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.data.workloads import READERS
from benchmarks.measure import Results

Figure = tuple[str, str, str]
"""(peer, workload, metric), as in Results."""


class Target(NamedTuple):
    """A ratio of two medians, or with `of` None one that is a ratio.  at_least: or at most."""

    text: str
    figure: Figure
    of: Figure | None
    bound: float
    at_least: bool = True


TCP, SHARED, PEER = "zfabric-tcp", "zfabric", "distributed"
SHUFFLE = "shuffle 64 x 64"
BROADCAST = f"broadcast to {READERS} workers"
PLAIN = ("socket", "gather", "rate")

TARGETS = (
    Target("gather by tcp / plain socket", (TCP, "gather", "rate"), PLAIN, 0.85),
    Target("scatter by tcp / plain socket", (TCP, "scatter", "rate"), PLAIN, 0.85),
    Target("gather by tcp / distributed", (TCP, "gather", "rate"), (PEER, "gather", "rate"), 2),
    Target("scatter by tcp / distributed", (TCP, "scatter", "rate"), (PEER, "scatter", "rate"), 2),
    Target(
        "scatter + use, distributed / memory",
        (PEER, "scatter + use on two", "time"),
        (SHARED, "scatter + use on two", "time"),
        3,
    ),
    Target(
        "second use, 256 MB / 64 KiB",
        (SHARED, "use again", "time"),
        (SHARED, "use 64 KiB again", "time"),
        2,
        at_least=False,
    ),
    Target("shuffle / distributed", (SHARED, SHUFFLE, "rate"), (PEER, SHUFFLE, "rate"), 3),
    Target(
        "broadcast, sent by its source / size",
        (TCP, BROADCAST, "sent by one worker at most / size"),
        None,
        3,
        at_least=False,
    ),
    Target(
        "broadcast, distributed / by tcp", (PEER, BROADCAST, "time"), (TCP, BROADCAST, "time"), 1
    ),
    Target("shuffle by tcp / distributed", (TCP, SHUFFLE, "rate"), (PEER, SHUFFLE, "rate"), 3),
    *(
        Target(
            f"call p99, moving / idle, {name}",
            (name, "call, while values move", "p99"),
            (name, "call, idle", "p99"),
            3,
            at_least=False,
        )
        for name in (SHARED, TCP)
    ),
)


def ratio(results: Results, target: Target) -> float | None:
    """Of the medians; None when one of them was not measured, or is 0."""
    one = results.get(*target.figure)
    if target.of is None:
        return None if one is None else one.median
    other = results.get(*target.of)
    if one is None or other is None or not other.median:
        return None
    return one.median / other.median


def table(results: Results) -> str:
    """One line per target that this run can tell of; "" when there is none."""
    lines = []
    for target in TARGETS:
        value = ratio(results, target)
        if value is None:
            continue
        reached = value >= target.bound if target.at_least else value <= target.bound
        sign = ">=" if target.at_least else "<="
        word = "" if reached else "   short of it"
        lines.append(f"{target.text:<38}{value:>8.2f}   wanted {sign} {target.bound:g}{word}")
    return "\n".join(lines)
