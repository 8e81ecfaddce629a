"""`python -m benchmarks SUBJECT ...`: one subject per folder."""

from __future__ import annotations

import importlib
import sys

SUBJECTS = {
    "dask": "Dask graphs of many small tasks, and of large chunks",
    "distributed-comms": "zmq:// against tcp:// inside the same dask.distributed",
    "data": "large values: scatter, gather, broadcast, shuffle, and calls beside them",
    "faults": "the same faults on zfabric and its peers: lost, wrong, ran twice, hung, recovery",
    "journal": "what a broker's journal costs: no-op throughput with and without",
    "sampler": "does compression by the measured link choose right? throttled links, real data",
    "security": "what keys cost: transfers over one and two connections, lone calls",
    "tasks": "what a task costs: throughput, latency, chains, trees, start-up, broker memory",
    "transports": "bytes between two processes, by each way that Python offers",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("python -m benchmarks SUBJECT [--help]\n")
        for name, text in SUBJECTS.items():
            print(f"  {name:<18} {text}")
        return 0
    subject, *rest = argv
    if subject not in SUBJECTS:
        print(f"no subject {subject!r}; there are: {', '.join(SUBJECTS)}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"benchmarks.{subject.replace('-', '_')}.command")
    return int(command.main(rest) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
