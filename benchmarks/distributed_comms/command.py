"""`python -m benchmarks distributed-comms`: options, rounds, the printed result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.distributed_comms import workloads
from benchmarks.measure import Results, deadline, environment

PACKAGES = ("pyzmq", "dask", "distributed", "numpy", "pandas")
PEERS = ("zmq", "zmq-chunks", "tcp")
"""zmq-chunks: as between hosts, all by ZeroMQ and nothing from a neighbour's memory."""


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    try:
        import dask

        from benchmarks.distributed_comms import messages
    except ImportError as error:
        print(f"needs `pip install zfabric[distributed] pandas`: {error}", file=sys.stderr)
        return 2
    # Children get the backend by this where zfabric lies on the path without being installed.
    preload = ["zfabric.distributed"]
    dask.config.set({"distributed.nanny.preload": preload, "distributed.worker.preload": preload})
    sizes = workloads.QUICK if options.quick else workloads.Sizes()
    rounds = options.rounds or (2 if options.quick else 5)
    machine = environment(PACKAGES)
    results = Results()
    try:
        with deadline(600):
            messages.run(PEERS, results, sizes.trips)
    except Exception as error:
        results.fail("all", "messages", error)
    with ExitStack() as stack:
        clients = {peer: stack.enter_context(_client(peer)) for peer in PEERS}
        for peer in PEERS:
            with _memory(peer):
                workloads.warm_up(clients[peer])
        for number in range(rounds):
            for workload in workloads.ALL:
                # One after the other, so that all have the same minute of the machine.
                for peer in PEERS if number % 2 == 0 else PEERS[::-1]:
                    try:
                        with deadline(300), _memory(peer):
                            workload(peer, clients[peer], results, sizes)
                    except Exception as error:
                        results.fail(peer, workload.__name__, error)
    print(report.header(machine))
    print(
        f"messages: two processes, {sizes.trips} round trips, fewer of the largest;\n"
        f"the rest: clusters of 2 workers (processes) of 2 threads, {rounds} rounds.\n"
        "Peers in turn within one run: median, and lowest..highest\n"
    )
    print(report.table(results, PEERS))
    print("\nas good as tcp, times: above 1 is better, in the medians of this run")
    print(f"  {'':<34}" + "".join(f"{peer:>12}" for peer in PEERS[:2]))
    for (workload, metric), found in results.rows().items():
        medians = {series.peer: series.median for series in found}
        if len(medians) == len(PEERS):
            power = 1 if found[0].higher_is_better else -1
            ratios = [(medians[peer] / medians["tcp"]) ** power for peer in PEERS[:2]]
            cells = "".join(f"{ratio:>12.2f}" for ratio in ratios)
            print(f"  {workload + ', ' + metric:<34}{cells}")
    if options.markdown:
        print("\n" + report.markdown(results, PEERS))
    if options.json:
        report.write_json(
            options.json, machine, results, slots=4, rounds=rounds, quick=options.quick
        )
    return 1 if results.failures else 0


def _memory(peer: str) -> Any:
    """What the comms made meanwhile in this process do; workers have it from their birth."""
    import dask

    return dask.config.set({"distributed.comm.zmq.memory": peer == "zmq"})


@contextmanager
def _client(peer: str) -> Iterator[Any]:
    """A client with a cluster of its own."""
    import distributed

    with ExitStack() as stack:
        with _memory(peer):
            cluster = stack.enter_context(
                distributed.LocalCluster(
                    n_workers=2,
                    threads_per_worker=2,
                    protocol="tcp://" if peer == "tcp" else "zmq://",
                    dashboard_address=":0",
                    silence_logs=50,
                )
            )
            client = stack.enter_context(distributed.Client(cluster, set_as_default=False))
        yield client


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks distributed-comms",
        description="zmq:// against tcp:// inside the same dask.distributed.",
    )
    parser.add_argument("--rounds", type=int, default=0, help="how often [5, quick: 2]")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="write everything here as well")
    parser.add_argument("--markdown", action="store_true", help="print a table for a page as well")
    return parser
