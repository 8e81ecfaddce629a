"""`python -m benchmarks distributed-comms`: options, rounds, the printed result."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

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
        import distributed

        import zfabric.distributed  # noqa: F401
    except ImportError as error:
        print(f"needs `pip install zfabric[distributed] pandas`: {error}", file=sys.stderr)
        return 2
    # Children get the backend by this where zfabric lies on the path without being installed.
    preload = ["zfabric.distributed"]
    dask.config.set({"distributed.nanny.preload": preload, "distributed.worker.preload": preload})
    sizes = workloads.QUICK if options.quick else workloads.Sizes()
    rounds = options.rounds or (1 if options.quick else 3)
    machine = environment(PACKAGES)
    results = Results()
    for number in range(rounds):
        # The order changes, for a machine that warms up or slows down.
        for peer in PEERS if number % 2 == 0 else PEERS[::-1]:
            try:
                with deadline(600):
                    _one_round(distributed, peer, results, sizes)
            except Exception as error:
                results.fail(peer, "round", error)
    print(report.header(machine))
    print(f"2 workers (processes) of 2 threads, {rounds} rounds: median, and lowest..highest\n")
    print(report.table(results, PEERS))
    print("\nzmq ÷ tcp and zmq-chunks ÷ tcp, above 1 is better, in the medians of this run")
    for (workload, metric), found in results.rows().items():
        medians = {series.peer: series.median for series in found}
        if len(medians) == len(PEERS):
            power = 1 if found[0].higher_is_better else -1
            ratios = [(medians[peer] / medians["tcp"]) ** power for peer in PEERS[:2]]
            print(f"  {workload + ', ' + metric:<32} {ratios[0]:.2f}  {ratios[1]:.2f}")
    if options.markdown:
        print("\n" + report.markdown(results, PEERS))
    if options.json:
        report.write_json(
            options.json, machine, results, slots=4, rounds=rounds, quick=options.quick
        )
    return 1 if results.failures else 0


def _one_round(distributed: object, peer: str, results: Results, sizes: workloads.Sizes) -> None:
    import dask

    with (
        dask.config.set({"distributed.comm.zmq.memory": peer == "zmq"}),
        distributed.LocalCluster(  # type: ignore[attr-defined]
            n_workers=2,
            threads_per_worker=2,
            protocol="tcp://" if peer == "tcp" else "zmq://",
            dashboard_address=None,
            silence_logs=50,
        ) as cluster,
        distributed.Client(cluster) as client,  # type: ignore[attr-defined]
    ):
        workloads.run(peer, client, results, sizes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks distributed-comms",
        description="zmq:// against tcp:// inside the same dask.distributed.",
    )
    parser.add_argument("--rounds", type=int, default=0, help="how often [3, quick: 1]")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="write everything here as well")
    parser.add_argument("--markdown", action="store_true", help="print a table for a page as well")
    return parser
