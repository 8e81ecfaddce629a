"""`python -m zfabric.testing.fuzz -n 1000000 --seed 0`: exit status 0 when nothing went wrong."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from zfabric.testing.fuzz.live import LiveFuzz
from zfabric.testing.fuzz.machine import MachineFuzz

MiB = 1 << 20

GROWTH = 24 * MiB
"""Resident bytes that a process may gain after its first tenth: allocators breathe."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m zfabric.testing.fuzz", description=__doc__)
    parser.add_argument("-n", type=int, default=20_000, help="inputs in all [20000]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    n_live = max(100, options.n // 5)
    n_streams = max(20, options.n // 1000)
    n_machine = max(100, options.n - n_live - n_streams)
    grown = [
        in_process(n_machine, options.seed),
        at_socket(n_live, n_streams, options.seed),
    ]
    if max(grown) > GROWTH:
        print(f"FAILED: memory grew by {max(grown) / MiB:.0f} MiB", file=sys.stderr)
        return 1
    return 0


def in_process(n: int, seed: int) -> int:
    """n inputs at the parser and the machine; the bytes that memory grew by."""
    start, before = time.monotonic(), 0
    fuzz = MachineFuzz(seed)
    for number in range(n):
        if number == n // 10:
            before = _rss()
        try:
            fuzz.step()
        except BaseException:
            print(f"FAILED at input {number} of seed {seed}", file=sys.stderr)
            raise
    fuzz.task()
    grown = _rss() - before
    counts = ", ".join(f"{name} {count:,}" for name, count in sorted(fuzz.counts.items()))
    print(
        f"in process: {n:,} inputs in {time.monotonic() - start:.0f} s, none escaped;"
        f" memory {grown / MiB:+.1f} MiB\n  {counts}"
    )
    return grown


def at_socket(n_messages: int, n_streams: int, seed: int) -> int:
    """The same at a live broker; the bytes that its memory grew by."""
    start = time.monotonic()
    with LiveFuzz(seed) as fuzz:
        fuzz.send_messages(n_messages // 10)
        fuzz.send_streams(n_streams // 10)
        before = fuzz.rss()
        fuzz.send_messages(n_messages - n_messages // 10)
        fuzz.send_streams(n_streams - n_streams // 10)
        grown = fuzz.rss() - before
    print(
        f"at a socket: {fuzz.counts['messages']:,} messages and {fuzz.counts['streams']:,} streams"
        f" in {time.monotonic() - start:.0f} s, {fuzz.counts['tasks']:,} tasks ran meanwhile and"
        f" after; the broker's memory {grown / MiB:+.1f} MiB"
    )
    return grown


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
