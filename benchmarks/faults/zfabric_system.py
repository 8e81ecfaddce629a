"""A broker with a journal and workers, as a user starts them in three terminals."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any

from benchmarks.faults.systems import System, family


class ZFabric(System):
    name = package = "zfabric"
    settings = (
        "zfabric broker --journal FILE",
        "ZFABRIC_DEAD_S and ZFABRIC_SUSPECT_S: the dead time of all systems, and half of it",
        "max_deaths 3 (its default)",
    )

    def start(self) -> None:
        import zfabric

        os.environ |= {
            "ZFABRIC_DEAD_S": str(self.shape.dead_s),
            "ZFABRIC_SUSPECT_S": str(self.shape.dead_s / 2),
            "ZFABRIC_ECHO": "off",
        }
        self._broker = self._start_broker()
        address = self._through_proxy("workers")
        self._workers = [
            self._run(f"worker-{n}", "zfabric", "worker", address, "--slots", str(self.shape.slots))
            for n in range(self.shape.n_workers)
        ]
        self._client = zfabric.Client(self._through_proxy("client"))

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self._client.submit(fn, *args)

    def submit_limited(self, limit_s: float, fn: Callable[..., Any], *args: Any) -> Any:
        return self._client.submit(fn, *args, timeout=limit_s)

    def cancel(self, future: Any) -> None:
        future.cancel()

    def is_done(self, future: Any) -> bool:
        return bool(future.done())

    def take(self, future: Any, timeout_s: float) -> Any:
        return future.result(timeout_s)

    def workers(self) -> list[list[int]]:
        return [pids for worker in self._workers if (pids := family(worker.pid))]

    def kill_broker(self) -> None:
        self._broker.kill()
        self._broker.wait()

    def restart_broker(self) -> None:
        self._broker = self._start_broker()

    def _start_broker(self) -> subprocess.Popen[bytes]:
        address = f"tcp://127.0.0.1:{self.port}"
        journal = str(self.directory / "journal")
        arguments = ("broker", "--listen", address, "--strict", "--journal", journal)
        broker = self._run("broker", "zfabric", *arguments)
        self._wait_for_port()
        return broker
