"""The fabric and its peers for large values, each used through its own API."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from concurrent.futures import Future, ProcessPoolExecutor
from types import FunctionType
from typing import Any

import numpy as np

from benchmarks.tasks.peers import PEERS as TASK_PEERS


def make(nbytes: int, fill: int) -> Any:
    return np.full(nbytes, fill, "u1")


def touch(array: Any) -> int:
    """Reads one byte per page."""
    return int(array[::4096].sum())


def first(array: Any) -> int:
    """Reads one byte."""
    return int(array[0])


def split(nbytes: int, n: int, seed: int) -> list[Any]:
    return [make(nbytes, (seed + part) % 251) for part in range(n)]


def pick(parts: list[Any], index: int) -> Any:
    return parts[index]


def join(*parts: Any) -> int:
    return sum(touch(part) for part in parts)


class DataPeer(ABC):
    """Workers with one slot each."""

    name: str
    n_workers = 2

    def missing(self) -> str:
        """The line that installs it, or ""."""
        known = TASK_PEERS.get(self.name)
        return "" if known is None else known().missing()

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def submit(self, fn: Any, *args: Any) -> Any:
        """A handle of the result, which stays where it is made if the peer can do that."""

    def submit_to_each(self, fn: Any, handle: Any) -> list[Any]:
        """One call per worker, each on its own where the peer can be told so."""
        return [self.submit(fn, handle) for _ in range(self.n_workers)]

    def most_sent(self) -> int | None:
        """Bytes of values that have left the worker of which most have; None: it cannot be told."""
        return None

    @abstractmethod
    def wait(self, handles: list[Any]) -> None: ...

    @abstractmethod
    def gather(self, handle: Any) -> Any: ...

    @abstractmethod
    def scatter(self, array: Any) -> Any: ...


class Zfabric(DataPeer):
    name = "zfabric"
    shared = "on"

    def start(self) -> None:
        from zfabric import Client
        from zfabric.launch.local import LocalFabric

        os.environ["ZFABRIC_SHARED_MEMORY"] = self.shared
        # Without keys, as its peers and the plain socket: `security` tells what those cost.
        scheme = "ipc" if self.shared == "on" else "tcp"
        self._fabric = LocalFabric(self.n_workers, slots=1, scheme=scheme, keys=False)
        self._client = Client(self._fabric.address)
        self._client.wait_for_workers(self.n_workers, timeout=60)

    def stop(self) -> None:
        self._client.close()
        self._fabric.close()
        del os.environ["ZFABRIC_SHARED_MEMORY"]

    def submit(self, fn: Any, *args: Any) -> Any:
        return self._client.submit(fn, *args)

    def submit_to_each(self, fn: Any, handle: Any) -> list[Any]:
        names = [worker["name"] for worker in self._client.info()["workers"]]
        assert len(names) == self.n_workers
        return [self._client.submit(fn, handle, workers=name) for name in names]

    def wait(self, handles: list[Any]) -> None:
        from zfabric import wait

        wait(handles)

    def gather(self, handle: Any) -> Any:
        return self._client.gather(handle)

    def scatter(self, array: Any) -> Any:
        return self._client.scatter(array)

    def most_sent(self) -> int:
        sent: dict[str, int] = {}
        for link in self._client.links():
            if link["direction"] == "out":
                sent[link["at"]] = sent.get(link["at"], 0) + link["raw_nbytes"]
        return max(sent.values(), default=0)


class ZfabricTcp(Zfabric):
    name = "zfabric-tcp"
    shared = "off"


class Distributed(DataPeer):
    name = "distributed"

    def start(self) -> None:
        from distributed import Client, LocalCluster

        self._cluster = LocalCluster(
            n_workers=self.n_workers, threads_per_worker=1, dashboard_address=None, memory_limit=0
        )
        self._client = Client(self._cluster)
        self._workers = list(self._client.scheduler_info()["workers"])

    def stop(self) -> None:
        self._client.close()
        self._cluster.close()

    def submit(self, fn: Any, *args: Any) -> Any:
        return self._client.submit(fn, *args, pure=False)

    def submit_to_each(self, fn: Any, handle: Any) -> list[Any]:
        return [self._client.submit(fn, handle, workers=[w], pure=False) for w in self._workers]

    def wait(self, handles: list[Any]) -> None:
        from distributed import wait

        wait(handles)

    def gather(self, handle: Any) -> Any:
        return self._client.gather(handle)

    def scatter(self, array: Any) -> Any:
        return self._client.scatter(array, hash=False)

    def most_sent(self) -> int:
        return max(self._client.run(_sent_by).values())


def _sent_by(dask_worker: Any) -> int:
    return sum(entry["total"] for entry in dask_worker.transfer_outgoing_log)


def _call(fn: Any, *args: Any) -> Any:
    return fn(*args)


class Ray(DataPeer):
    name = "ray"

    def start(self) -> None:
        import ray

        ray.init(num_cpus=self.n_workers, include_dashboard=False, log_to_driver=False)
        self._ray = ray

    def stop(self) -> None:
        self._ray.shutdown()

    def submit(self, fn: Any, *args: Any) -> Any:
        if isinstance(fn, FunctionType):
            return self._ray.remote(fn).remote(*args)
        return self._ray.remote(_call).remote(fn, *args)  # it takes no builtins

    def wait(self, handles: list[Any]) -> None:
        self._ray.wait(handles, num_returns=len(handles), fetch_local=False)

    def gather(self, handle: Any) -> Any:
        return self._ray.get(handle)

    def scatter(self, array: Any) -> Any:
        return self._ray.put(array)


class Pool(DataPeer):
    """ProcessPoolExecutor: all values go through the caller, who has them when a call has ended;
    so its scatter and gather say nothing."""

    name = "pool"

    def start(self) -> None:
        self._pool = ProcessPoolExecutor(self.n_workers)

    def stop(self) -> None:
        self._pool.shutdown()

    def submit(self, fn: Any, *args: Any) -> Any:
        args = tuple(a.result() if isinstance(a, Future) else a for a in args)
        return self._pool.submit(fn, *args)

    def wait(self, handles: list[Any]) -> None:
        for handle in handles:
            handle.result()

    def gather(self, handle: Any) -> Any:
        return handle.result() if isinstance(handle, Future) else handle

    def scatter(self, array: Any) -> Any:
        return array


PEERS = {peer.name: peer for peer in (Zfabric, ZfabricTcp, Distributed, Ray, Pool)}
