"""Round trips of single messages between two processes, one comm of each sort side by side.

`python -m benchmarks.distributed_comms.messages` is the process at the other end.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import dask
import numpy
from distributed.comm import CommClosedError, connect, listen
from distributed.protocol import to_serialize

import zfabric.distributed  # noqa: F401
from benchmarks.measure import Results

SIZES = (0, 10_000, 100_000, 300_000, 700_000, 1_000_000, 4_000_000, 32_000_000)
"""Bytes of the array in a message."""

AT_MOST_BYTES = 400_000_000
"""That go through one comm for one size, so that large ones take no longer than small ones."""


def run(peers: Sequence[str], results: Results, trips: int) -> None:
    """Arrays of each size to the other process, and fetched from it, by each peer in turn.

    trips: round trips of each size, fewer of the largest.
    """
    command = [sys.executable, "-m", "benchmarks.distributed_comms.messages"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        try:
            addresses = dict(zip(("tcp", "zmq"), other.stdout.readline().decode().split()))
            asyncio.run(_talk(peers, addresses, results, trips))
        finally:
            other.stdin.close()  # by which it ends


async def _talk(
    peers: Sequence[str], addresses: dict[str, str], results: Results, trips: int
) -> None:
    comms: dict[str, Any] = {}
    for peer in peers:
        with dask.config.set({"distributed.comm.zmq.memory": peer == "zmq"}):
            comms[peer] = await connect(addresses["tcp" if peer == "tcp" else "zmq"])
        await _trip(comms[peer], {"want": 0})
    for nbytes in SIZES:
        array = _array(nbytes)
        count = max(3, min(trips, AT_MOST_BYTES // max(nbytes, 1)))
        for number in range(count):
            for peer in peers if number % 2 == 0 else peers[::-1]:
                there = await _trip(comms[peer], {"have": to_serialize(array)})
                back = await _trip(comms[peer], {"want": nbytes})
                name = f"{nbytes / 1e6:g} MB"
                results.add(peer, f"message there, {name}", "time", there * 1e3, "ms", count)
                results.add(peer, f"message back, {name}", "time", back * 1e3, "ms", count)
    for comm in comms.values():
        await comm.close()


async def _trip(comm: Any, question: dict[str, Any]) -> float:
    begun = time.perf_counter()
    await comm.write(question)
    await comm.read()
    return time.perf_counter() - begun


def _array(nbytes: int) -> Any:
    return numpy.random.default_rng(0).integers(0, 256, nbytes, numpy.uint8)


async def _serve() -> None:
    arrays = {nbytes: _array(nbytes) for nbytes in SIZES}

    async def answer(comm: Any) -> None:
        try:
            while True:
                question = await comm.read()
                if "want" in question:
                    await comm.write({"have": to_serialize(arrays[question["want"]])})
                else:
                    await comm.write("ok")
        except CommClosedError:
            pass

    listeners = [await listen(f"{scheme}://127.0.0.1", answer) for scheme in ("tcp", "zmq")]
    print(*(listener.contact_address for listener in listeners), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for listener in listeners:
        listener.stop()


if __name__ == "__main__":
    asyncio.run(_serve())
