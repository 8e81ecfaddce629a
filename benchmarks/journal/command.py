"""`python -m benchmarks journal`: both brokers side by side, measured in turns, and the ratio; and
how long it takes until all go on after a broker was killed."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.journal import recovery
from zfabric import Client

TARGET = 0.5
"""Of the rate without a journal."""


def nop(number: int) -> int:
    """A task of a microsecond."""
    return number


class Side:
    """A broker, one worker and one client."""

    def __init__(self, directory: Path, journal: bool, slots: int) -> None:
        self.address = f"ipc://{directory}/broker"
        arguments = ["--journal", f"{directory}/journal"] if journal else []
        self._children = [self._start("broker", "--listen", self.address, *arguments)]
        self._children.append(self._start("worker", self.address, "--slots", str(slots)))
        self.client = Client(self.address)
        self.rate(1000)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "zfabric", *arguments]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def rate(self, n: int) -> float:
        """Tasks per second, submitted by one map and gathered."""
        begun = time.perf_counter()
        self.client.gather(self.client.map(nop, range(n)))
        return n / (time.perf_counter() - begun)

    def close(self) -> None:
        self.client.close()
        for child in self._children:
            child.terminate()
            child.wait()


def main(argv: list[str]) -> int:
    """Returns 1 when the journal costs more than it may, or a restart takes too long."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks journal", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--slots", type=int, default=2, help="processes that run tasks [2]")
    options = parser.parse_args(argv)
    n, rounds = (2_000, 2) if options.quick else (100_000, 5)
    with tempfile.TemporaryDirectory() as name:
        sides = []
        for journal in (False, True):
            directory = Path(name) / ("with" if journal else "without")
            directory.mkdir()
            sides.append(Side(directory, journal, options.slots))
        rates = [[side.rate(n) for side in sides] for _ in range(rounds)]
        for side in sides:
            side.close()
    without, with_ = (statistics.median(column) for column in zip(*rates, strict=True))
    ratio = statistics.median(row[1] / row[0] for row in rates)
    print(f"without a journal {without:10,.0f} tasks/s")
    print(f"with a journal    {with_:10,.0f} tasks/s")
    print(f"ratio             {ratio:10.2f}   (target: at least {TARGET})")
    with tempfile.TemporaryDirectory() as name:
        is_fast = recovery.measure(Path(name), 1 if options.quick else 5)
    return 0 if options.quick or (ratio >= TARGET and is_fast) else 1
