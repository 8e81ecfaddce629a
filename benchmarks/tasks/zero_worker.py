"""A worker that acknowledges each row at once with None and runs nothing.

What remains is the cost of client, broker and wire: the ceiling that faster slots could reach.

As a program: `python -m benchmarks.tasks.zero_worker ADDRESS SLOTS` serves until SIGTERM, or until
its parent is gone.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
from time import monotonic, perf_counter

from benchmarks.measure import Results
from benchmarks.tasks import functions

NAME = "zero-worker"


def run(results: Results, n: int, slots: int = 2) -> None:
    """One round: a no-op map of n tasks on a broker whose only worker is of this kind."""
    import subprocess

    from zfabric.client import Client
    from zfabric.launch.local import LocalFabric

    try:
        with LocalFabric(n_workers=0) as fabric, Client(fabric.address) as client:
            worker = subprocess.Popen(
                [sys.executable, "-m", __name__, fabric.address, str(slots)],
                stdin=subprocess.DEVNULL,
            )
            try:
                client.wait_for_workers(1, timeout=20)
                client.gather(client.map(functions.nop, range(1000)))
                began = perf_counter()
                client.gather(client.map(functions.nop, range(n)))
                seconds = perf_counter() - began
            finally:
                worker.terminate()
                worker.wait(10)
    except Exception as error:
        results.fail("zfabric", "zero-worker", error)
        return
    results.add("zfabric", "zero-worker", "rate", n / seconds, "tasks/s", n, higher_is_better=True)


def serve(address: str, slots: int) -> None:
    """Says Hello, then answers each Run with a Done, until told to stop."""
    from zfabric import __version__, ids, wire
    from zfabric.core.session import Session
    from zfabric.messages import VALUE, WORKER, Bye, Done, Hello, Refuse, Run, Welcome
    from zfabric.transport import contract, registry

    parent = os.getppid()
    channel = registry.connect(address)
    poller = contract.Poller()
    poller.add(channel)
    session = Session(ids.new_token(), now=monotonic())
    hello = Hello(
        role=WORKER,
        name=f"zero-{os.getpid()}",
        zfabric=__version__,
        python=sys.version.split()[0],
        host=socket.gethostname(),
        pid=os.getpid(),
        slots=slots,
    )
    session.post(hello)
    nothing = pickle.dumps(None, 5)
    welcomed = False
    hello_at = monotonic() + 0.5
    while os.getppid() == parent:
        while (frames := session.next_frames()) is not None and channel.send(frames):
            session.sent()
        poller.wait(0.1)
        while (received := channel.recv()) is not None:
            if not received:
                session.reconnected()
                continue
            header, message = wire.decode(received)
            if not session.receive(header, message, monotonic()):
                continue
            if isinstance(message, Run):
                n = len(message.ids)
                statuses = bytes([VALUE]) * n
                session.post(Done(message.ids, message.attempts, statuses, [nothing] * n, 4096))
            elif isinstance(message, Welcome):
                session.epoch = header.epoch
                welcomed = True
            elif isinstance(message, (Refuse, Bye)):
                return
        now = monotonic()
        session.tick(now)
        if not welcomed and now > hello_at:
            hello_at = now + 0.5
            session.post(hello)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    serve(sys.argv[1], int(sys.argv[2]))
