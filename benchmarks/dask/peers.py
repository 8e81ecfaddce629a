"""What computes a Dask collection: each with as many processes or threads as it is told."""

from __future__ import annotations

from typing import Any

import dask

TASKS = {"dataframe.shuffle.method": "tasks", "array.rechunk.method": "tasks"}


class Scheduler:
    """One of Dask's own: threads or sync."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._scheduler = {"threads": "threads", "sync": "synchronous"}[name]
        self._slots = 1

    def start(self, slots: int) -> None:
        self._slots = slots

    def compute(self, collection: Any) -> Any:
        with dask.config.set(TASKS):
            return collection.compute(scheduler=self._scheduler, num_workers=self._slots)

    def stop(self) -> None:
        pass


class Zfabric:
    name = "zfabric"

    def start(self, slots: int) -> None:
        from zfabric import Client

        self._client = Client(slots=slots)
        self._client.submit(int).result(30)

    def compute(self, collection: Any) -> Any:
        return collection.compute(scheduler=self._client)

    def stop(self) -> None:
        self._client.close()


class Distributed:
    """dask.distributed with one thread per process, as zfabric's slots are, and its own shuffle."""

    name = "distributed"

    def start(self, slots: int) -> None:
        from distributed import Client, LocalCluster

        self._cluster = LocalCluster(
            n_workers=slots, threads_per_worker=1, dashboard_address=None, memory_limit=0
        )
        self._client = Client(self._cluster)

    def compute(self, collection: Any) -> Any:
        return collection.compute(scheduler=self._client)

    def stop(self) -> None:
        self._client.close()
        self._cluster.close()


NAMES = ("distributed", "threads", "sync")


def peer(name: str) -> Zfabric | Distributed | Scheduler:
    """Raises KeyError for a name that is not one."""
    if name == "zfabric":
        return Zfabric()
    return Distributed() if name == "distributed" else Scheduler(name)
