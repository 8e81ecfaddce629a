"""dask.distributed: a scheduler and workers under nannies, as its command line starts them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any

from benchmarks.faults.systems import System, family


class Distributed(System):
    name = package = "distributed"
    settings = (
        "a nanny per worker process and 1 thread in each (dask worker --nworkers 2 --nthreads 1):"
        " one process per running task, restarted when it dies",
        "distributed.scheduler.worker-ttl: the dead time; its default is 5 minutes",
        "distributed.scheduler.allowed-failures: 3 (its default)",
        "distributed.comm.retry.count: 3; its default is 0",
        "workers that end, killed ones too, are started again, as by an init system",
    )

    def start(self) -> None:
        os.environ |= {
            "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": f"{self.shape.dead_s}s",
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "3",
            "DASK_DISTRIBUTED__COMM__RETRY__COUNT": "3",
        }
        # The import reads the settings, so it comes after them.
        import distributed

        self._scheduler = self._start_scheduler()
        self._workers = [self._start_worker(n) for n in range(self.shape.n_workers)]
        self._client = distributed.Client(self._through_proxy("client"), timeout=30)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self._client.submit(fn, *args, pure=False)

    def cancel(self, future: Any) -> None:
        future.cancel()

    def is_done(self, future: Any) -> bool:
        return bool(future.done())

    def take(self, future: Any, timeout_s: float) -> Any:
        return future.result(timeout=timeout_s)

    def workers(self) -> list[list[int]]:
        return [pids for worker in self._workers if (pids := family(worker.pid))]

    def kill_broker(self) -> None:
        self._scheduler.kill()
        self._scheduler.wait()

    def restart_broker(self) -> None:
        self._scheduler = self._start_scheduler()

    def keep_workers(self) -> None:
        for n, worker in enumerate(self._workers):
            if worker.poll() is not None:
                self._workers[n] = self._start_worker(n)

    def _start_scheduler(self) -> subprocess.Popen[bytes]:
        scheduler = self._run(
            "scheduler", "distributed.cli.dask_scheduler",
            "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard",
        )  # fmt: skip
        self._wait_for_port()
        return scheduler

    def _start_worker(self, n: int) -> subprocess.Popen[bytes]:
        return self._run(
            f"worker-{n}", "distributed.cli.dask_worker", self._through_proxy("workers"),
            "--nworkers", str(self.shape.slots), "--nthreads", "1", "--memory-limit", "0",
            "--no-dashboard", "--local-directory", str(self.directory / f"worker-{n}"),
        )  # fmt: skip
