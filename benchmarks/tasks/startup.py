"""How long a fresh process takes until its first result, and what `import` costs.

As a program: `python -m benchmarks.tasks.startup PEER SLOTS` starts the peer, prints the seconds
from before its import to the first result, and stops it.
"""

from __future__ import annotations

import subprocess
import sys
from time import perf_counter

from benchmarks.measure import Results
from benchmarks.tasks.peers import PEERS, Peer

TIMEOUT_S = 120


def run(peer: Peer, results: Results, slots: int) -> None:
    """One round: a fresh interpreter for the import, one for the first result."""
    try:
        seconds = float(_output("-m", __name__, peer.name, str(slots)))
        results.add(peer.name, "start-up", "first result", seconds, "s", 1)
        seconds = float(_output("-c", _IMPORT.format(module=peer.module)))
        results.add(peer.name, "start-up", "import", seconds, "s", 1)
    except (subprocess.SubprocessError, ValueError) as error:
        results.fail(peer.name, "start-up", error)


_IMPORT = """
from time import perf_counter
began = perf_counter()
import {module}
print(perf_counter() - began)
"""


def _output(*arguments: str) -> str:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise subprocess.SubprocessError(said[-1] if said else f"status {done.returncode}")
    return done.stdout.strip().splitlines()[-1]


def main(name: str, slots: int) -> None:
    began = perf_counter()
    peer = PEERS[name]()
    peer.start(slots)
    value = peer.call(pow_two, 10)
    seconds = perf_counter() - began
    peer.stop()
    if value != 1024:
        raise AssertionError(value)
    print(seconds)


def pow_two(x: int) -> int:
    return 1 << x


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
