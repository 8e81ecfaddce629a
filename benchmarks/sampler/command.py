"""`python -m benchmarks sampler`: options, the table of cells, what was to be reached."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.measure import Results, environment
from benchmarks.sampler.cells import LINKS, MODES, measure
from benchmarks.sampler.data import KINDS
from benchmarks.sampler.network import missing

NEAR = 1.10
"""How much longer than the better of always and never a choice may take."""


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    # Who ends us by SIGTERM finds no namespace and no process left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    links = [link for link in LINKS if not options.links or link.name in options.links.split(",")]
    if why := missing():
        print(why, file=sys.stderr)
        links = [link for link in links if not link.mbit]
    kinds = options.kinds.split(",") if options.kinds else list(KINDS)
    rounds = options.rounds or (1 if options.quick else 3)
    results = Results()
    seen = {}
    for link in links:
        scale = 0.25 if options.quick else 1.0
        try:
            seen[link.name] = measure(link, kinds, rounds, scale, results, report.note)
        except Exception as error:
            results.fail("zfabric", link.name, error)
    report.note("")
    machine = environment(("pyzmq", "blosc", "numpy"))
    print(report.header(machine))
    print(f"MB/s of the value, best of {rounds} rounds; auto / better = share of the better way\n")
    print(table(results))
    print("\n".join(["", *verdicts(results)]))
    for peer, workload, what in results.failures:
        print(f"FAILED {peer}, {workload}: {what}")
    if options.json:
        report.write_json(options.json, machine, results, links=seen, rounds=rounds)
    return 1 if results.failures else 0


def table(results: Results) -> str:
    """One row per cell."""
    lines = [f"{'link, data':<24}" + "".join(f"{m:>10}" for m in MODES) + f"{'auto/better':>13}"]
    for (cell, _), _series in results.rows().items():
        best = {m: speed(results, cell, m) for m in MODES}
        share = best["auto"] / max(best["off"], best["always"])
        mark = "" if share >= 1 / NEAR else "  <-- worse"
        lines.append(
            f"{cell:<24}"
            + "".join(f"{report.number(best[m]):>10}" for m in MODES)
            + f"{share:>13.2f}{mark}"
        )
    return "\n".join(lines)


def verdicts(results: Results) -> list[str]:
    """What was to be reached, as ratios of this run."""
    cells = [cell for cell, _ in results.rows()]
    share = [
        speed(results, c, "auto") / max(speed(results, c, "off"), speed(results, c, "always"))
        for c in cells
    ]
    near = sum(s >= 1 / NEAR for s in share)
    lines = [f"choice within 10 % of the better one: {near} of {len(cells)} cells"]
    loopback = [speed(results, c, "auto") / speed(results, c, "off") for c in cells if "loop" in c]
    if loopback:
        lines.append(f"loopback, auto / off, the worst kind: {min(loopback):.2f}   aim >= 0.98")
    for kind, aim in (("smooth", ">= 3"), ("random", ">= 0.97")):
        cell = f"1 Gbit, {kind}"
        if cell in cells:
            ratio = speed(results, cell, "auto") / speed(results, cell, "off")
            lines.append(f"{cell}, auto / off: {ratio:.2f}   aim {aim}")
    return lines


def speed(results: Results, cell: str, mode: str) -> float:
    """MB/s of the best round: what disturbs a round only ever makes it slower."""
    series = results.get(mode, cell, "MB/s")
    assert series is not None
    return max(series.values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sampler",
        description="Compression by the measured link, against always and never.",
    )
    parser.add_argument("--links", default="", help="comma-separated; default: all")
    parser.add_argument("--kinds", default="", help=f"comma-separated, of {', '.join(KINDS)}")
    parser.add_argument("--rounds", type=int, default=0, help="how often [3, quick: 1]")
    parser.add_argument("--quick", action="store_true", help="a quarter of the bytes, one round")
    parser.add_argument("--json", type=Path, help="write everything here as well")
    return parser
