"""Results as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Results, Series

LABEL = 34
"""Characters of a row's name."""


def table(results: Results, peers: Sequence[str]) -> str:
    """One row per figure, one column per peer: the median, and below it the lowest and highest."""
    width = max([15, *(len(peer) + 2 for peer in peers)])
    lines = [f"{'':<{LABEL}}" + "".join(f"{peer:>{width}}" for peer in peers)]
    for (workload, metric), found in results.rows().items():
        by_peer = {series.peer: series for series in found}
        unit = found[0].unit
        cells = [number(by_peer[p].median) if p in by_peer else "-" for p in peers]
        lines.append(
            f"{_cut(f'{workload}, {metric} ({unit})', LABEL):<{LABEL}}"
            + "".join(f"{cell:>{width}}" for cell in cells)
        )
        spreads = [_spread(by_peer.get(p)) for p in peers]
        if any(spreads):
            lines.append(f"{'':<{LABEL}}" + "".join(f"{cell:>{width}}" for cell in spreads))
    lines += [
        f"FAILED {peer}, {workload}: {_cut(what, 200)}" for peer, workload, what in results.failures
    ]
    return "\n".join(lines)


def markdown(results: Results, peers: Sequence[str]) -> str:
    """The medians as a table for a page."""
    lines = ["| | " + " | ".join(peers) + " |", "|---|" + "---:|" * len(peers)]
    for (workload, metric), found in results.rows().items():
        by_peer = {series.peer: series for series in found}
        cells = [number(by_peer[p].median) if p in by_peer else "" for p in peers]
        lines.append(f"| {workload}, {metric}, {found[0].unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def header(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
    return (
        f"{environment['cores']} cores, {environment['cpu']}, {environment['system']}, "
        f"Python {environment['python']}, load {environment['load_1min']}\n{versions}"
    )


def number(value: float) -> str:
    """Three figures or more: 0.0123, 1.23, 12.3, 123, 12,345."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def write_json(path: Path, environment: dict[str, Any], results: Results, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": environment,
        **more,
        "results": [series.as_json() for series in results],
        "failures": [
            {"peer": peer, "workload": workload, "error": error}
            for peer, workload, error in results.failures
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _spread(series: Series | None) -> str:
    if series is None or len(series.values) < 2:
        return ""
    return f"{number(min(series.values))}..{number(max(series.values))}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def note(text: str) -> None:
    """What is being done, on one line of the terminal; "" clears it."""
    if sys.stderr.isatty():
        sys.stderr.write("\r" + text.ljust(60) + ("" if text else "\r"))
        sys.stderr.flush()
