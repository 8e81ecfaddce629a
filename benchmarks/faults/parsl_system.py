"""Parsl's HighThroughputExecutor: an interchange, and a manager with worker processes per block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil

from benchmarks.faults.systems import NoSuchVerb, System, family, free_port


class Parsl(System):
    name = package = "parsl"
    settings = (
        "HighThroughputExecutor(heartbeat_threshold=the dead time, heartbeat_period=1);"
        " its defaults are 120 and 30 s",
        "Config(retries=3), as it repeats nothing otherwise, with a retry_handler that repeats no"
        " AppTimeout; 2 blocks of LocalProvider",
        "python_app(walltime=...) for time limits",
    )

    def start(self) -> None:
        import parsl
        from parsl.config import Config
        from parsl.executors import HighThroughputExecutor
        from parsl.executors.high_throughput.executor import DEFAULT_LAUNCH_CMD
        from parsl.providers import LocalProvider

        if self.shape.proxied == "client":
            raise NoSuchVerb("its client starts the interchange beside itself")
        self.port = free_port()
        to = self._through_proxy("workers").rpartition(":")[2]
        n = self.shape.n_workers
        self._executor = HighThroughputExecutor(
            label="htex",
            address="127.0.0.1",
            worker_port=self.port,
            launch_cmd=DEFAULT_LAUNCH_CMD.replace("{worker_port}", to),
            max_workers_per_node=self.shape.slots,
            # Workers that share these cores, as those of the other systems do.
            cores_per_worker=0.01,
            heartbeat_threshold=int(self.shape.dead_s),
            heartbeat_period=1,
            provider=LocalProvider(init_blocks=n, min_blocks=n, max_blocks=n),
        )
        parsl.load(
            Config(
                executors=[self._executor],
                retries=3,
                retry_handler=_cost_of_retry,
                usage_tracking=0,
                run_dir=str(self.directory / "runinfo"),
            )
        )
        self._parsl = parsl
        self._apps: dict[Callable[..., Any], Any] = {}

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self._app(fn)(*args)

    def submit_limited(self, limit_s: float, fn: Callable[..., Any], *args: Any) -> Any:
        return self._app(fn)(*args, walltime=limit_s)

    def submit_kept(self, fn: Callable[..., Any], *args: Any) -> Any:
        raise NoSuchVerb("each value goes back to the client, none stays at a worker")

    def is_done(self, future: Any) -> bool:
        return bool(future.done())

    def take(self, future: Any, timeout_s: float) -> Any:
        return future.result(timeout_s)

    def _app(self, fn: Callable[..., Any]) -> Any:
        app = self._apps.get(fn)
        if app is None:
            app = self._apps[fn] = self._parsl.python_app(fn)
        return app

    def workers(self) -> list[list[int]]:
        heads = [
            process.pid
            for process in psutil.Process().children(recursive=True)
            if _is_manager(process)
        ]
        return [pids for pid in heads if (pids := family(pid))]

    def kill_broker(self) -> None:
        interchange = self._executor.interchange_proc
        interchange.kill()
        interchange.wait()

    def restart_broker(self) -> None:
        """The client started it, and has no way to start another."""


def _cost_of_retry(error: Exception, task: object) -> float:
    """How much of its retries an error takes: a task that was too slow is not run again."""
    from parsl.app.errors import AppTimeout

    return 100.0 if isinstance(error, AppTimeout) else 1.0


def _is_manager(process: psutil.Process) -> bool:
    """The Python program itself; neither the shell that started it nor one that it forked."""
    try:
        if not _runs_pool(process):
            return False
        parent = process.parent()
        return parent is None or not _runs_pool(parent)
    except psutil.Error:
        return False


def _runs_pool(process: psutil.Process) -> bool:
    command = process.cmdline()
    return "python" in command[0] and any("process_worker_pool" in word for word in command[1:2])
