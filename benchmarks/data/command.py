"""`python -m benchmarks data`: options, the order of measurements, the printed result."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.data import targets, workloads
from benchmarks.data.peers import PEERS
from benchmarks.measure import Results, deadline, environment

PACKAGES = ("pyzmq", "numpy", "distributed", "ray")


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    sizes = workloads.QUICK if options.quick else workloads.Sizes()
    rounds = options.rounds or (1 if options.quick else 3)
    names = ["zfabric", "zfabric-tcp", *filter(None, options.peers.split(","))]
    peers = []
    for name in dict.fromkeys(names):
        if name not in PEERS:
            print(f"no peer {name!r}; known: {', '.join(PEERS)}", file=sys.stderr)
            return 2
        if line := PEERS[name]().missing():
            print(f"{name} is not installed: {line}", file=sys.stderr)
        else:
            peers.append(PEERS[name])
    machine, results = environment(PACKAGES), Results()
    for _ in range(rounds):
        for kind in peers:
            peer = kind()
            try:
                with deadline(options.limit):
                    peer.start()
                    try:
                        workloads.run(peer, results, sizes)
                    finally:
                        peer.stop()
                    peer.n_workers = workloads.READERS + 1
                    peer.start()
                    try:
                        workloads.broadcast(peer, results, sizes)
                    finally:
                        peer.stop()
            except Exception as error:
                results.fail(peer.name, "data", error)
    shown = ["socket", *(kind.name for kind in peers)]
    print(report.header(machine))
    many = workloads.READERS + 1
    print(
        f"2 workers of 1 slot ({many} for the broadcast), {rounds} rounds: median, and"
        " lowest..highest\n"
    )
    print(report.table(results, shown))
    print("\n" + targets.table(results))
    if options.json:
        report.write_json(options.json, machine, results, rounds=rounds, quick=options.quick)
    return 1 if results.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks data", description="What it costs to move values."
    )
    parser.add_argument("--peers", default="pool", help=f"of {', '.join(PEERS)} [%(default)s]")
    parser.add_argument("--rounds", type=int, default=0, help="how often [3, quick: 1]")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds per peer and round")
    parser.add_argument("--json", type=Path, help="write everything here as well")
    return parser
