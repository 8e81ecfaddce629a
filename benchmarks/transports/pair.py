"""One pair of processes over one way: `python -m benchmarks.transports.pair WAY PLAN` prints the
samples as JSON. With a third argument, an address, it is the other end: it does what it is told.

Every way runs in two fresh processes, so that neither memory nor threads of one are in the figures
of another.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from benchmarks.measure import quantile
from benchmarks.transports.ways import WAYS, Way

ORDER = struct.Struct("<4sQQQ")
REPORT = struct.Struct("<dQ")
HUGE = 64 * 2**20


class Plan(NamedTuple):
    """What to measure: sizes in bytes, seconds per figure, and whether both ends are busy."""

    sizes: Sequence[int]
    seconds: float
    busy: bool
    fills: Sequence[str] = ("zeros", "random")


def payload(size: int, fill: str) -> bytes:
    """Bytes to send; random ones repeat after 16 MiB, which no transport notices."""
    if fill == "zeros":
        return bytes(size)
    block = os.urandom(min(size, 16 * 2**20))
    return (block * (size // len(block) + 1))[:size]


@contextmanager
def busy(plan: Plan) -> Iterator[None]:
    """Work beside the measuring, where the plan wants it. Not beside what comes before: imports
    that have to wait for the GIL take ten times as long."""
    stop = threading.Event()
    if plan.busy:
        threading.Thread(target=hold_the_gil, args=(stop,), daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def hold_the_gil(stop: threading.Event) -> None:
    """Some 15 ms at a time, as a call into C does that does not give it up."""
    while not stop.is_set():
        sum(range(1_000_000))


class Memory:
    """Peak resident memory since `begin`, in bytes."""

    def begin(self) -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self.before = self._status("VmRSS")

    def more(self) -> int:
        return max(0, self._status("VmHWM") - self.before)

    @staticmethod
    def _status(name: str) -> int:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(name):
                    return int(line.split()[1]) * 1024
        return 0


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def serve(way: Way) -> None:
    """The other end: echo, stream, report, until told to stop."""
    memory, fill, data = Memory(), "", b""
    began = 0.0
    while True:
        op, size, count, which = ORDER.unpack(bytes(await way.recv()))
        if op == b"prep":
            fill = ("zeros", "random")[which]
            data = payload(size, fill)
            await way.send(ORDER.pack(b"ok  ", 0, 0, 0))
        elif op == b"echo":
            for _ in range(count):
                await way.send(bytes(await way.recv()) if size < 65536 else await way.recv())
        elif op == b"flow":
            memory.begin()
            began = cpu_s()
            for _ in range(count):
                await way.send(data)
        elif op == b"told":
            await way.send(REPORT.pack(cpu_s() - began, memory.more()))
        else:
            return


async def drive(way: Way, plan: Plan) -> list[dict[str, Any]]:
    """Measure everything in the plan."""
    found = []
    for size in plan.sizes:
        for which, fill in enumerate(plan.fills if size >= 2**20 else plan.fills[-1:]):
            await way.send(ORDER.pack(b"prep", size, 0, which))
            await way.recv()
            entry: dict[str, Any] = {"size": size, "fill": fill, "busy": plan.busy}
            if size < HUGE:
                entry |= await latency(way, payload(size, fill), plan.seconds)
            entry |= await flow(way, size, plan.seconds)
            found.append(entry)
    await way.send(ORDER.pack(b"stop", 0, 0, 0))
    return found


async def latency(way: Way, data: bytes, seconds: float) -> dict[str, Any]:
    """Round trips of one message, one at a time: seconds, median and p99."""
    samples: list[float] = []
    count, began = 3, time.perf_counter()
    while True:
        await way.send(ORDER.pack(b"echo", len(data), count, 0))
        for _ in range(count):
            before = time.perf_counter()
            await way.send(data)
            await way.recv()
            samples.append(time.perf_counter() - before)
        spent = time.perf_counter() - began
        if spent >= seconds:
            break
        count = max(1, min(20_000, int((seconds - spent) / sorted(samples)[len(samples) // 2]) + 1))
    samples = sorted(samples[3:] or samples)
    return {
        "p50_s": quantile(samples, 0.5),
        "p99_s": quantile(samples, 0.99),
        "n_round_trips": len(samples),
    }


async def flow(way: Way, size: int, seconds: float) -> dict[str, Any]:
    """Messages one way, as fast as they come: rate, CPU and memory of both ends."""
    memory, count = Memory(), 1 if size >= HUGE else 4
    while True:
        memory.begin()
        cpu_before, began = cpu_s(), time.perf_counter()
        await way.send(ORDER.pack(b"flow", size, count, 0))
        for _ in range(count):
            data = await way.recv()
        spent = time.perf_counter() - began
        ours, extra = cpu_s() - cpu_before, memory.more()
        assert len(data) == size
        del data
        await way.send(ORDER.pack(b"told", 0, 0, 0))
        theirs, theirs_extra = REPORT.unpack(bytes(await way.recv()))
        if spent >= seconds / 2 or size >= HUGE:
            break
        count = min(200_000, max(count + 1, int(count * seconds / max(spent, 1e-6))))
    entry = {
        "messages_per_s": count / spent,
        "gb_per_s": count * size / spent / 1e9,
        "n_messages": count,
        "cpu_s_per_gb": (ours + theirs) / (count * size / 1e9),
    }
    if count == 1:  # of many, the peak depends on what the system had put aside
        entry["copies_receiver"] = extra / size
        entry["copies_sender"] = theirs_extra / size
    return entry


def main(argv: list[str]) -> int:
    name, plan = argv[0], Plan(**json.loads(argv[1]))
    if len(argv) > 2:
        other_end(name, plan, argv[2])
    else:
        driver(name, plan, argv)
    return 0


def other_end(name: str, plan: Plan, address: str) -> None:
    way = WAYS[name]()
    way.run(way.connect(address))
    with busy(plan):
        way.run(serve(way))
    way.run(way.close())


def driver(name: str, plan: Plan, argv: list[str]) -> None:
    way = WAYS[name]()
    if name == "mpi" and way.world.rank == 1:  # type: ignore[attr-defined]
        with busy(plan):
            way.run(serve(way))
        return
    address = way.run(way.listen())
    child: Any = None
    if way.in_threads:
        child = threading.Thread(target=other_end, args=(name, plan, address))
        child.start()
    elif name != "mpi":
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transports.pair", *argv, address]
        )
    way.run(way.accept())
    with busy(plan):
        found = way.run(drive(way, plan))
    print(json.dumps(found), flush=True)
    if isinstance(child, threading.Thread):
        child.join(30)
    elif child is not None:
        child.wait(30)
    way.run(way.close())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
