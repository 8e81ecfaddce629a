"""`python -m benchmarks faults`: options, the order of the faults, the printed tables."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.faults import cell, page
from benchmarks.faults.cases import CASES, DOWN_S, LIMIT_S
from benchmarks.faults.work import QUICK, Sizes
from benchmarks.measure import environment

PACKAGES = ("pyzmq", "distributed", "parsl")


def main(argv: list[str]) -> int:
    """Returns 1 when zfabric lost, hung or got wrong anything, or a system did not start."""
    options = _parser().parse_args(argv)
    systems, missing = _chosen(options.peers)
    cases = [name for name in options.faults.split(",") if name] or list(CASES)
    missing += [f"no fault {name!r}; there are: {', '.join(CASES)}" for name in cases
                if name not in CASES]  # fmt: skip
    for line in missing:
        print(line, file=sys.stderr)
    if missing:
        return 2
    sizes = QUICK if options.quick else Sizes()
    machine = environment(PACKAGES)
    rounds: page.Rounds = {}
    failures: list[str] = []
    n_rounds = options.rounds or (1 if options.quick else 3)
    try:
        for number in range(1, n_rounds + 1):
            failures += _one_round(rounds, cases, systems, options.quick, f"{number}/{n_rounds}")
            if options.json:  # a round takes a quarter of an hour, and may be the last one
                _write(options.json, machine, rounds, sizes, failures)
    except KeyboardInterrupt:
        print("interrupted; what was measured so far:", file=sys.stderr)
    report.note("")
    print(report.header(machine))
    print(
        f"{n_rounds} rounds, {sizes.n} tasks of {sizes.task_s} s on 2 workers of 2 processes;"
        f" hung: no answer for {sizes.hung_s:.0f} s\n"
    )
    print(page.table(rounds, systems))
    print("\nsettings that are not defaults, or matter")
    for system in systems:
        print(f"  {system}: " + "; ".join(cell.SYSTEMS[system].settings))
    if options.errors:
        print(_errors(rounds))
    print("".join(f"\n{failure}" for failure in failures))
    if options.markdown:
        print(page.account(rounds, "zfabric"))
        print()
        print(page.markdown(rounds, systems))
    return 1 if failures or not _is_well(rounds) else 0


def _one_round(
    rounds: page.Rounds, cases: list[str], systems: list[str], quick: bool, number: str
) -> list[str]:
    """Each fault on every system in turn, so a machine that slows down slows all of them. Adds the
    accounts to `rounds`, and returns what did not even start."""
    failures = []
    for case in cases:
        for system in systems:
            report.note(f"round {number}: {case}, {system}")
            try:
                account = cell.run(system, case, quick)
            except Exception as error:
                failures.append(f"FAILED {error}")
            else:
                rounds.setdefault((case, system), []).append(account)
    return failures


def _errors(rounds: page.Rounds) -> str:
    """The first five of each fault and system."""
    lines = []
    for (case, system), found in rounds.items():
        errors = [error for account in found for error in account["errors"]]
        lines += [f"  {case}, {system}: {error}" for error in errors[:5]]
    return "\n".join(lines)


def _is_well(rounds: page.Rounds) -> bool:
    """Whether zfabric kept what it promises."""
    ours = [account for (_, system), found in rounds.items() if system == "zfabric"
            for account in found]  # fmt: skip
    return all(
        not (account["lost"] or account["wrong"] or account["hung"]) and account["goes_on"]
        for account in ours
    )


def _write(
    path: Path,
    machine: dict[str, object],
    rounds: page.Rounds,
    sizes: Sizes,
    failures: list[str],
) -> None:
    content = {
        "environment": machine,
        "tasks": sizes.n,
        "task_s": sizes.task_s,
        "hung_after_s": sizes.hung_s,
        "time_limit_s": LIMIT_S,
        "broker_away_s": DOWN_S,
        "settings": {name: system.settings for name, system in cell.SYSTEMS.items()},
        "results": [
            {"fault": case, "system": system, "rounds": found}
            for (case, system), found in rounds.items()
        ],
        "failures": failures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _chosen(names: str) -> tuple[list[str], list[str]]:
    """zfabric and the peers asked for, and a line about each that cannot run."""
    systems, missing = [], []
    for name in dict.fromkeys(["zfabric", *filter(None, names.split(","))]):
        if name not in cell.SYSTEMS:
            missing.append(f"no peer {name!r}; known: {', '.join(cell.SYSTEMS)}")
        elif line := cell.SYSTEMS[name].missing():
            missing.append(f"{name} is not installed: {line}")
        else:
            systems.append(name)
    return systems, missing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks faults", description="The same faults on zfabric and its peers."
    )
    parser.add_argument("--peers", default="", help="comma-separated, of distributed, parsl")
    parser.add_argument("--faults", default="", help=f"only these, of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=0, help="how often [3, quick: 1]")
    parser.add_argument("--quick", action="store_true", help="fewer, shorter tasks, once")
    parser.add_argument("--errors", action="store_true", help="print the first errors of each")
    parser.add_argument("--json", type=Path, help="write everything here as well")
    parser.add_argument("--markdown", action="store_true", help="print tables for a page as well")
    return parser
