"""The fabric and its peers behind one small interface, each used through its own API.

A peer whose API has dependencies between tasks (zfabric, distributed, ray, parsl) builds chains
and trees from them. The others have only futures, so their chain waits for each link, and their
tree for each level: that is what a user of theirs has to write.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata
from typing import Any

from benchmarks.tasks import functions


class Peer(ABC):
    """One way to run tasks. `start` before anything else, `stop` at the end."""

    name: str
    package: str = ""
    """The distribution to install; "" for the standard library."""
    module: str = ""
    """What its users import."""

    def missing(self) -> str:
        """The line that installs it, or "" when it is here."""
        try:
            found = importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            found = False
        return "" if found else f"pip install {self.package}"

    def version(self) -> str:
        return metadata.version(self.package) if self.package else "standard library"

    @abstractmethod
    def start(self, slots: int) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def call(self, fn: Callable[..., Any], x: Any) -> Any:
        """Submits one call and waits for its result."""

    @abstractmethod
    def map(self, fn: Callable[..., Any], n: int) -> list[Any]:
        """fn(0) .. fn(n - 1), a task each, and all results here."""

    def chain(self, links: int) -> int:
        """increment applied `links` times to 0, a task each."""
        x = 0
        for _ in range(links):
            x = self.call(functions.increment, x)
        return x

    @abstractmethod
    def tree(self, leaves: int) -> int:
        """The sum of `leaves` increments by pairwise `add`; 2 * leaves - 1 tasks in all.
        leaves is a power of two."""


class ExecutorPeer(Peer):
    """Anything with the interface of concurrent.futures."""

    _executor: Any

    def stop(self) -> None:
        self._executor.shutdown()

    def call(self, fn: Callable[..., Any], x: Any) -> Any:
        return self._executor.submit(fn, x).result()

    def map(self, fn: Callable[..., Any], n: int) -> list[Any]:
        return list(self._executor.map(fn, range(n)))

    def tree(self, leaves: int) -> int:
        level = list(self._executor.map(functions.increment, range(leaves)))
        while len(level) > 1:
            level = list(self._executor.map(functions.add, level[::2], level[1::2]))
        return int(level[0])


class Pool(ExecutorPeer):
    name = "pool"
    module = "concurrent.futures"

    def start(self, slots: int) -> None:
        from concurrent.futures import ProcessPoolExecutor

        self._executor = ProcessPoolExecutor(slots)


class Loky(ExecutorPeer):
    name = package = module = "loky"

    def start(self, slots: int) -> None:
        import loky

        self._executor = loky.get_reusable_executor(max_workers=slots)

    def stop(self) -> None:
        self._executor.shutdown(wait=True, kill_workers=True)


class ZFabricExecutor(ExecutorPeer):
    """The fabric through its concurrent.futures executor."""

    name = "zfabric-executor"
    package = module = "zfabric"

    def start(self, slots: int) -> None:
        import zfabric

        self._client = zfabric.Client(slots=slots)
        self._executor = self._client.get_executor()

    def stop(self) -> None:
        super().stop()
        self._client.close()


class GraphPeer(Peer):
    """A peer whose submit takes futures as arguments."""

    @abstractmethod
    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        """A future of fn(*args); futures among the arguments become their values."""

    @abstractmethod
    def result(self, future: Any) -> Any: ...

    def call(self, fn: Callable[..., Any], x: Any) -> Any:
        return self.result(self.submit(fn, x))

    def chain(self, links: int) -> int:
        future: Any = 0
        submit = self.submit
        for _ in range(links):
            future = submit(functions.increment, future)
        return int(self.result(future))

    def tree(self, leaves: int) -> int:
        submit = self.submit
        level = [submit(functions.increment, x) for x in range(leaves)]
        while len(level) > 1:
            level = [submit(functions.add, a, b) for a, b in zip(level[::2], level[1::2])]
        return int(self.result(level[0]))


class ZFabric(GraphPeer):
    name = package = module = "zfabric"

    def start(self, slots: int) -> None:
        import zfabric

        self._client = zfabric.Client(slots=slots)

    def stop(self) -> None:
        self._client.close()

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self._client.submit(fn, *args)

    def result(self, future: Any) -> Any:
        return future.result()

    def map(self, fn: Callable[..., Any], n: int) -> list[Any]:
        results: list[Any] = self._client.gather(self._client.map(fn, range(n)))
        return results


class Distributed(GraphPeer):
    name = package = module = "distributed"

    def start(self, slots: int) -> None:
        import distributed

        self._client = distributed.Client(
            n_workers=slots,
            threads_per_worker=1,
            dashboard_address=None,
            # The default log says much about event loops on a busy machine.
            silence_logs=40,
        )

    def stop(self) -> None:
        self._client.close()
        self._client.cluster.close()

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self._client.submit(fn, *args, pure=False)

    def result(self, future: Any) -> Any:
        return future.result()

    def map(self, fn: Callable[..., Any], n: int) -> list[Any]:
        results: list[Any] = self._client.gather(self._client.map(fn, range(n), pure=False))
        return results


class Ray(GraphPeer):
    name = package = module = "ray"

    def start(self, slots: int) -> None:
        import logging

        import ray

        ray.init(
            num_cpus=slots,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        self._ray = ray
        self._remote: dict[Callable[..., Any], Any] = {}

    def stop(self) -> None:
        self._ray.shutdown()

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        remote = self._remote.get(fn)
        if remote is None:
            remote = self._remote[fn] = self._ray.remote(num_cpus=1)(fn)
        return remote.remote(*args)

    def result(self, future: Any) -> Any:
        return self._ray.get(future)

    def map(self, fn: Callable[..., Any], n: int) -> list[Any]:
        results: list[Any] = self._ray.get([self.submit(fn, x) for x in range(n)])
        return results


class Parsl(GraphPeer):
    name = package = module = "parsl"

    def start(self, slots: int) -> None:
        import parsl
        from parsl.config import Config
        from parsl.executors import HighThroughputExecutor
        from parsl.providers import LocalProvider

        executor = HighThroughputExecutor(
            label="htex",
            address="127.0.0.1",
            max_workers_per_node=slots,
            provider=LocalProvider(init_blocks=1, max_blocks=1),
        )
        self._parsl = parsl
        parsl.load(Config(executors=[executor], usage_tracking=0))
        self._apps: dict[Callable[..., Any], Any] = {}

    def stop(self) -> None:
        self._parsl.dfk().cleanup()
        self._parsl.clear()

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        app = self._apps.get(fn)
        if app is None:
            app = self._apps[fn] = self._parsl.python_app(fn)
        return app(*args)

    def result(self, future: Any) -> Any:
        return future.result()

    def map(self, fn: Callable[..., Any], n: int) -> list[Any]:
        return [future.result() for future in [self.submit(fn, x) for x in range(n)]]


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (ZFabric, ZFabricExecutor, Pool, Loky, Distributed, Ray, Parsl)
}
