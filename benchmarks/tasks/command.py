"""`python -m benchmarks tasks`: options, the order of measurements, the printed result."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.measure import Results, deadline, environment
from benchmarks.tasks import memory, startup, targets, workloads, zero_worker
from benchmarks.tasks.peers import PEERS, Peer

PACKAGES = ("pyzmq", "msgpack", "cloudpickle", "loky", "distributed", "ray", "parsl")


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    peers, missing = _chosen(options.peers, not options.without_zfabric)
    for line in missing:
        print(line, file=sys.stderr)
    if not peers:
        return 2
    sizes = workloads.QUICK if options.quick else workloads.Sizes()
    if options.budget:
        sizes = workloads.Sizes(
            sizes.map, sizes.calls, sizes.links, sizes.leaves, sizes.small, options.budget
        )
    rounds = options.rounds or (1 if options.quick else 3)
    machine = environment(PACKAGES)
    results = Results()
    try:
        # A round visits every peer, so that a machine that slows down slows all of them.
        for number in range(1, rounds + 1):
            for peer in peers:
                report.note(f"round {number}/{rounds}: {peer.name}")
                _one_round(peer, results, sizes, options.slots)
    except KeyboardInterrupt:
        print("interrupted; what was measured so far:", file=sys.stderr)
    report.note("")
    print(report.header(machine))
    print(f"{options.slots} slots, {rounds} rounds: median, and lowest..highest\n")
    print(report.table(results, [peer.name for peer in peers]))
    lines = targets.verdicts(results)
    if lines:
        print("\ntargets (as ratios of this run)")
        print("\n".join(lines))
    if options.markdown:
        print("\n" + report.markdown(results, [peer.name for peer in peers]))
    if options.json:
        report.write_json(
            options.json, machine, results, slots=options.slots, rounds=rounds, quick=options.quick
        )
    return 1 if results.failures else 0


def _one_round(peer: Peer, results: Results, sizes: workloads.Sizes, slots: int) -> None:
    startup.run(peer, results, slots)
    try:
        with deadline(120):
            peer.start(slots)
    except Exception as error:
        results.fail(peer.name, "start", error)
        return
    try:
        workloads.run(peer, results, sizes)
    except Exception as error:
        results.fail(peer.name, "warm-up", error)
    finally:
        try:
            with deadline(60):
                peer.stop()
        except Exception as error:
            results.fail(peer.name, "stop", error)
    if peer.name == "zfabric":
        with deadline(300):
            memory.run(results, sizes.small, slots)
            zero_worker.run(results, sizes.map)


def _chosen(names: str, ours: bool) -> tuple[list[Peer], list[str]]:
    """zfabric and the peers asked for, and a line about each that cannot run."""
    peers, missing = [], []
    for name in dict.fromkeys([*(["zfabric"] if ours else []), *filter(None, names.split(","))]):
        if name not in PEERS:
            missing.append(f"no peer {name!r}; known: {', '.join(PEERS)}")
        elif line := PEERS[name]().missing():
            missing.append(f"{name} is not installed: {line}")
        else:
            peers.append(PEERS[name]())
    return peers, missing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tasks", description="What a task costs."
    )
    parser.add_argument(
        "--peers",
        default="pool",
        help=f"comma-separated, of {', '.join(PEERS)} [%(default)s]",
    )
    parser.add_argument("--without-zfabric", action="store_true", help="measure the peers only")
    parser.add_argument("--slots", type=int, default=2, help="processes that run tasks [2]")
    parser.add_argument("--rounds", type=int, default=0, help="how often [3, quick: 1]")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument(
        "--budget", type=float, default=0.0, help="seconds per workload for slow peers [20]"
    )
    parser.add_argument("--json", type=Path, help="write everything here as well")
    parser.add_argument("--markdown", action="store_true", help="print a table for a page as well")
    return parser
