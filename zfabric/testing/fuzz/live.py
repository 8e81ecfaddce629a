"""Wrong bytes at a live broker's socket, while a client of its own has tasks run by a worker.

Broker, worker and client are processes, started by their command lines. Wrong messages come by the
transport, as from a peer that speaks ZeroMQ; wrong streams by plain sockets.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from zfabric.messages import Hello
from zfabric.testing.fuzz.inputs import LIES, STRANGERS, Inputs
from zfabric.transport import Channel, Poller, connect
from zfabric.wire import encode
from zfabric.wire.header import decode_header

START_S = 30.0

CLIENT = """
import sys, threading, zfabric
end = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), end.set()), daemon=True).start()
n = 0
with zfabric.Client(sys.argv[1]) as client:
    client.wait_for_workers(1, timeout=30)
    print("ready", flush=True)
    while not end.is_set() or n < 3:
        assert client.submit(pow, n, 2).result(60) == n * n
        n += 1
print(n)
"""


class LiveFuzz:
    """The processes. counts: "messages", "streams" and, once closed, "tasks"."""

    def __init__(self, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._inputs = Inputs(seed)
        self._random = random.Random(f"{seed}/live")
        self._directory = tempfile.TemporaryDirectory(prefix="zfabric-fuzz-")
        self._processes: list[subprocess.Popen[str]] = []
        try:
            self._begin()
        except BaseException:
            self._end()
            raise

    def _begin(self) -> None:
        folder = Path(self._directory.name)
        told, self._log = folder / "broker.json", folder / "log"
        zfabric = [sys.executable, "-m", "zfabric"]
        listen = ["--listen", "tcp://127.0.0.1:0", "--connection-file", str(told)]
        self._broker = self._start([*zfabric, "broker", *listen])
        deadline = time.monotonic() + START_S
        while not told.exists():
            if time.monotonic() > deadline or self._broker.poll() is not None:
                raise AssertionError(f"the broker did not start: {self._log.read_text()}")
            time.sleep(0.01)
        self.address: str = json.loads(told.read_text())["address"]
        self._start([*zfabric, "worker", self.address, "-n", "1"])
        self._client = self._start([sys.executable, "-c", CLIENT, self.address])
        assert self._client.stdout is not None
        if self._client.stdout.readline() != "ready\n":
            raise AssertionError(f"the client did not start: {self._log.read_text()}")

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        with self._log.open("a") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self._processes.append(process)
        return process

    def rss(self) -> int:
        """Resident bytes of the broker."""
        pages = int(Path(f"/proc/{self._broker.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    def send_messages(self, n: int) -> None:
        """n wrong messages, over connections that are given up after some hundreds each."""
        left = n
        while left:
            channel = connect(self.address, seal=True)
            poller = Poller()
            poller.add(channel)
            try:
                for _ in range(min(left, self._random.randrange(100, 500))):
                    frames = self._inputs.message() or [b"x"]
                    deadline = time.monotonic() + START_S
                    while not channel.send(frames):
                        poller.wait(0.1)
                        channel.recv()
                        assert time.monotonic() < deadline, "the broker takes nothing any more"
                    left -= 1
                    self.counts["messages"] += 1
                self._wait_for_answer(channel, poller)
            finally:
                channel.close(linger_s=1.0)
            self.check()

    def _wait_for_answer(self, channel: Channel, poller: Poller) -> None:
        """Until all that was sent has been read: what it answers to a Hello comes after."""
        hello = Hello("client", "fuzz", "0", "0", "host", 1)
        deadline = time.monotonic() + START_S
        token = self._random.getrandbits(62)
        channel.send(encode(hello, token, 0))
        while True:
            assert time.monotonic() < deadline, "the broker answers no more"
            frames = channel.recv()
            if frames is None:
                poller.wait(0.1)
            elif not frames:
                return  # thrown out
            elif len(frames) > 1 and decode_header(frames[0]).token == token:
                return

    def send_streams(self, n: int) -> None:
        """n connections with bytes that are no ZeroMQ, or begin as if they were."""
        host, _, port = self.address.removeprefix("tcp://").rpartition(":")
        for _ in range(n):
            pieces = [self._random.choice(STRANGERS) for _ in range(self._random.randrange(1, 4))]
            pieces += [self._random.choice(LIES), self._random.randbytes(200)]
            self._random.shuffle(pieces)
            try:
                stranger = socket.create_connection((host, int(port)), timeout=START_S)
            except OSError:
                with suppress(subprocess.TimeoutExpired):
                    self._broker.wait(5)
                self.check()
                raise
            with stranger, suppress(OSError):  # thrown out before the end, as it should be
                for piece in pieces:
                    stranger.sendall(piece)
            self.counts["streams"] += 1
        self.check()

    def check(self) -> None:
        """Raises AssertionError when one of the processes has ended."""
        for process in self._processes:
            if process.poll() is not None:
                raise AssertionError(f"{process.args} ended: {self._log.read_text()[-2000:]}")

    def close(self) -> None:
        """Have the client finish, and end all. Raises AssertionError when something went wrong."""
        try:
            self.check()
            out, _ = self._client.communicate("", timeout=120)
            text = self._log.read_text()
            if self._client.returncode or not out.strip():
                raise AssertionError(f"the client failed: {text[-2000:]}")
            self.counts["tasks"] = int(out.split()[-1])
            if "Traceback" in text:
                raise AssertionError(f"something escaped: {text[-4000:]}")
        finally:
            self._end()

    def _end(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            with suppress(ValueError):
                process.communicate(timeout=20)
        self._directory.cleanup()

    def __enter__(self) -> LiveFuzz:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._end()
