"""`python -m benchmarks dask`: options, the order of measurements, the printed result."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.dask import workloads
from benchmarks.dask.peers import NAMES, peer
from benchmarks.measure import Results, deadline, environment

PACKAGES = ("pyzmq", "dask", "distributed", "numpy", "pandas")
PATIENCE_S = 600


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    others = [name for name in options.peers.split(",") if name]
    unknown = [name for name in others if name not in NAMES]
    if unknown:
        print(f"no peer {', '.join(unknown)}; there are: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    sizes = workloads.QUICK if options.quick else workloads.Sizes()
    makers = {**workloads.small(sizes), **workloads.large(sizes)}
    if options.only:
        makers = {name: make for name, make in makers.items() if options.only in name}
    names = ["zfabric", *others]
    rounds = options.rounds or (1 if options.quick else 3)
    machine = environment(PACKAGES)
    results = Results()
    expected: dict[str, Any] = {}
    # A round visits every peer, so that a machine that slows down slows all of them.
    for number in range(1, rounds + 1):
        for name in names:
            print(f"round {number}/{rounds}: {name}", file=sys.stderr)
            _one_round(name, makers, options.slots, results, expected)
    print(report.header(machine))
    print(f"{options.slots} slots, {rounds} rounds: median, and lowest..highest\n")
    print(report.table(results, names))
    for other in others:
        print(f"\n{other} / zfabric")
        for workload in makers:
            ours, theirs = (results.get(who, workload, "time") for who in ("zfabric", other))
            if ours and theirs:
                print(f"  {workload:<24} {theirs.median / ours.median:.2f}")
    if options.markdown:
        print("\n" + report.markdown(results, names))
    if options.json:
        report.write_json(
            options.json, machine, results, slots=options.slots, rounds=rounds, quick=options.quick
        )
    return 1 if results.failures else 0


def _one_round(
    name: str, makers: dict[str, Any], slots: int, results: Results, expected: dict[str, Any]
) -> None:
    who = peer(name)
    with deadline(120):
        who.start(slots)
    try:
        import dask.array as da

        who.compute(da.ones(100, chunks=10).sum())  # everybody has imported what it needs
        for workload, make in makers.items():
            collection = make()
            n_tasks = len(collection.__dask_graph__())
            began = perf_counter()
            try:
                with deadline(PATIENCE_S):
                    value = who.compute(collection)
            except Exception as error:
                results.fail(name, workload, error)
                continue
            results.add(name, workload, "time", perf_counter() - began, "s", n_tasks)
            if "x.T" not in workload:  # random, and each time anew
                _check(name, workload, value, results, expected)
    finally:
        with deadline(60):
            who.stop()


def _check(
    name: str, workload: str, value: Any, results: Results, expected: dict[str, Any]
) -> None:
    found = np.sort(np.ravel(value))
    if not np.allclose(expected.setdefault(workload, found), found):
        results.fail(name, workload, ValueError(f"{found} is not {expected[workload]}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks dask", description=__doc__)
    parser.add_argument("--peers", default="distributed,threads,sync", help="beside zfabric")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--only", default="", help="workloads whose name has this text")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser
