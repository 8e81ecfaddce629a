"""What runs on each rank: the contract, then messages between ranks. Started by test_mpi.py."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import pytest

from zfabric.testing.contract import TransportContract, TransportMaker
from zfabric.transport import Poller, connect, listen, mpi

numbers = itertools.count()


class TestMpi(TransportContract):
    @pytest.fixture
    def maker(self) -> TransportMaker:
        return TransportMaker(
            address=lambda: f"mpi://*/contract.{next(numbers)}", crosses_processes=False
        )


def until(poller: Poller, condition: Callable[[], bool], serve: Callable[[], None]) -> None:
    deadline = mpi.now_s() + 60
    while not condition():
        assert mpi.now_s() < deadline
        poller.wait(0.05)
        serve()


def echo() -> None:
    """Rank 0 gives back what all others send, until each of them has closed."""
    listener = listen("mpi://0/echo")
    poller = Poller()
    poller.add(listener)
    gone: list[bytes] = []
    waiting: list[tuple[bytes, list[bytes]]] = []

    def serve() -> None:
        while (item := listener.recv()) is not None:
            (waiting.append(item) if item[1] else gone.append(item[0]))
        while waiting and listener.send(*waiting[0]):
            waiting.pop(0)

    until(poller, lambda: len(gone) == mpi.hub().size - 1, serve)
    listener.close()


def call() -> None:
    """Many sizes to rank 0 and back, more than fit into the credit."""
    channel = connect("mpi://0/echo")
    poller = Poller()
    poller.add(channel)
    sent = [[b"%d" % n, bytes([n % 251]) * (n * 7919 % 300_000)] for n in range(600)]
    got: list[list[bytes]] = []
    place = 0

    def serve() -> None:
        nonlocal place
        while place < len(sent) and channel.send(sent[place]):
            place += 1
        while (frames := channel.recv()) is not None:
            got.append([bytes(frame) for frame in frames])

    until(poller, lambda: len(got) == len(sent), serve)
    assert got == sent
    channel.close()
    until(poller, lambda: mpi.hub().is_idle, mpi.hub().progress)


def main() -> int:
    here = mpi.hub()
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    code = int(pytest.main([__file__, *options, *sys.argv[1:]]))
    (call if here.rank else echo)()
    print(f"rank {here.rank} of {here.size}: {code}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
