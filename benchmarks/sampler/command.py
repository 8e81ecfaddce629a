"""`python -m benchmarks sampler`: options, the table of cells, what was to be reached."""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.measure import Results, environment
from benchmarks.sampler.cells import FULL, LINKS, MODES, QUICK, measure
from benchmarks.sampler.data import KINDS
from benchmarks.sampler.network import missing

NEAR = 1 / 1.10
"""Of the better way's speed: what a choice has to reach everywhere."""

OF_OFF = {"loopback": 0.98, "shared memory": 0.98, "1 Gbit, random": 0.97, "1 Gbit, quarter": 3.0}
"""Of the speed without compression: what these links and cells have to reach as well."""

QUARTER = "quarter"
"""The kind that only the aim at 1 Gbit is about."""


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    # Who ends us by SIGTERM finds no namespace and no process left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    links = [link for link in LINKS if not options.links or link.name in options.links.split(",")]
    if why := missing():
        print(why, file=sys.stderr)
        links = [link for link in links if not link.mbit]
    effort = QUICK if options.quick else FULL
    if options.rounds:
        effort = effort._replace(rounds=options.rounds, cell_s=0.0, again=0)
    results = Results()
    seen = {}
    for link in links:
        kinds = options.kinds.split(",") if options.kinds else list(KINDS)
        if link.name != "1 Gbit" and QUARTER in kinds:
            kinds.remove(QUARTER)
        try:
            seen[link.name] = measure(
                link, kinds, effort, results, lambda cell: not misses(results, cell), report.note
            )
        except Exception as error:
            results.fail("zfabric", link.name, error)
    report.note("")
    machine = environment(("pyzmq", "blosc", "numpy"))
    print(report.header(machine))
    print("MB/s of the value, medians; the shares are medians of the rounds' own ratios\n")
    print(table(results))
    print("\n".join(["", *verdicts(results)]))
    for peer, workload, what in results.failures:
        print(f"FAILED {peer}, {workload}: {what}")
    if options.json:
        report.write_json(options.json, machine, results, links=seen, effort=effort._asdict())
    return 1 if results.failures else 0


def table(results: Results) -> str:
    """One row per cell."""
    lines = [
        f"{'link, data':<24}"
        + "".join(f"{m:>10}" for m in MODES)
        + f"{'auto/better':>13}{'auto/off':>10}{'rounds':>8}"
    ]
    for cell in cells(results):
        lines.append(
            f"{cell:<24}"
            + "".join(f"{report.number(speed(results, cell, m)):>10}" for m in MODES)
            + f"{share(results, cell, better(results, cell)):>13.2f}"
            + f"{share(results, cell, 'off'):>10.2f}"
            + f"{len(rounds(results, cell, 'auto')):>8}"
            + (f"  MISS {'; '.join(found)}" if (found := misses(results, cell)) else "  ok")
        )
    return "\n".join(lines)


def verdicts(results: Results) -> list[str]:
    """What was to be reached, in a line each."""
    all_cells = cells(results)
    near = sum(share(results, c, better(results, c)) >= NEAR for c in all_cells)
    lines = [f"choice within 10 % of the better one: {near} of {len(all_cells)} cells"]
    for aimed, aim in OF_OFF.items():
        shares = [share(results, c, "off") for c in all_cells if c.startswith(aimed)]
        if shares:
            lines.append(f"{aimed}, auto / off, lowest: {min(shares):.2f}   aim >= {aim:g}")
    return lines


def misses(results: Results, cell: str) -> list[str]:
    """What a cell should have reached and has not, a few words each."""
    found = []
    if share(results, cell, better(results, cell)) < NEAR:
        found.append("not near the better one")
    for aimed, aim in OF_OFF.items():
        if cell.startswith(aimed) and share(results, cell, "off") < aim:
            found.append(f"less than {aim:g} of off")
    return found


def cells(results: Results) -> list[str]:
    """Names of the cells, as measured."""
    return [cell for cell, _ in results.rows()]


def rounds(results: Results, cell: str, mode: str) -> list[float]:
    """MB/s of each round."""
    series = results.get(mode, cell, "MB/s")
    assert series is not None
    return series.values


def speed(results: Results, cell: str, mode: str) -> float:
    """MB/s, the median of the rounds."""
    return statistics.median(rounds(results, cell, mode))


def better(results: Results, cell: str) -> str:
    """Which of never and always was faster."""
    return max(("off", "always"), key=lambda mode: speed(results, cell, mode))


def share(results: Results, cell: str, mode: str) -> float:
    """Speed of the choice / speed of that mode: the median of the rounds' own ratios, since what
    makes one round slower makes all of it slower."""
    ours, theirs = rounds(results, cell, "auto"), rounds(results, cell, mode)
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sampler",
        description="Compression by the measured link, against always and never.",
    )
    parser.add_argument("--links", default="", help="comma-separated; default: all")
    parser.add_argument("--kinds", default="", help=f"comma-separated, of {', '.join(KINDS)}")
    parser.add_argument(
        "--rounds", type=int, default=0, help="just so many [as many as fit into some seconds]"
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the bytes, few rounds")
    parser.add_argument("--json", type=Path, help="write everything here as well")
    return parser
