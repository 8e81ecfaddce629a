"""What is to be reached, as ratios between figures of one run, and whether it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.measure import Results
from benchmarks.report import number

Ratio = Callable[[Results], float | None]


@dataclass(frozen=True, slots=True)
class Target:
    text: str
    ratio: Ratio
    must: float
    aim: float
    at_least: bool
    """True: the ratio must not be below `must`; False: not above."""


def _median(results: Results, peer: str, workload: str, metric: str) -> float | None:
    series = results.get(peer, workload, metric)
    return series.median if series is not None else None


def _over(workload: str, metric: str, peer: str, ours: str = "zfabric") -> Ratio:
    """Our figure divided by a peer's."""

    def ratio(results: Results) -> float | None:
        a = _median(results, ours, workload, metric)
        b = _median(results, peer, workload, metric)
        return a / b if a is not None and b else None

    return ratio


def _own(workload: str, metric: str, scale: float = 1.0) -> Ratio:
    def value(results: Results) -> float | None:
        a = _median(results, "zfabric", workload, metric)
        return a * scale if a is not None else None

    return value


def _link_over_latency(results: Results) -> float | None:
    link = _median(results, "zfabric", "chain", "per link")
    latency = _median(results, "zfabric", "submit→result", "p50")
    return link / latency if link is not None and latency else None


TARGETS = (
    Target("no-op map, × pool", _over("no-op map", "rate", "pool"), 8, 12, True),
    Target("no-op map, × distributed", _over("no-op map", "rate", "distributed"), 100, 200, True),
    Target("no-op map, tasks/s", _own("no-op map", "rate"), 0, 100_000, True),
    Target("submit→result p50, × pool", _over("submit→result", "p50", "pool"), 2.5, 1.6, False),
    Target("chain, link ÷ own submit→result", _link_over_latency, 0.4, 0.4, False),
    Target("chain, µs per link", _own("chain", "per link"), float("inf"), 60, False),
    Target("tree, × distributed", _over("tree", "per task", "distributed"), 1 / 50, 1 / 50, False),
    Target("tree, µs per task", _own("tree", "per task"), float("inf"), 15, False),
    Target("broker, B per held task", _own("broker memory", "per held task"), 1000, 600, False),
    Target("start-up to first result, s", _own("start-up", "first result"), 1.0, 0.5, False),
    Target("import zfabric, s", _own("start-up", "import"), 0.15, 0.15, False),
)


def verdicts(results: Results) -> list[str]:
    """One line per target that this run has the figures for."""
    lines = []
    for target in TARGETS:
        ratio = target.ratio(results)
        if ratio is None:
            continue
        sign = "≥" if target.at_least else "≤"
        must = "" if target.must in (0, float("inf")) else f"must {sign} {number(target.must)}"
        lines.append(
            f"  {target.text:<34}{number(ratio):>10}   {_reached(target, ratio):<8}"
            f"{must:<16}aim {sign} {number(target.aim)}"
        )
    return lines


def _reached(target: Target, ratio: float) -> str:
    def holds(bound: float) -> bool:
        return ratio >= bound if target.at_least else ratio <= bound

    return "aim" if holds(target.aim) else "must" if holds(target.must) else "MISSED"
