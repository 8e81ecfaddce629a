"""`Client("dask://scheduler:8786")`: zfabric's verbs on a cluster of dask.distributed.

The scheduler, the workers and the values are Dask's; the futures are zfabric's, with outcomes that
are settled by Dask's futures, so whatever waits for futures works as it does on a fabric.
`dask+zmq://` and `dask+tls://` say how to reach the scheduler; `dask://` is tcp.

What Dask has nothing like is refused by name.
"""

from __future__ import annotations

import asyncio
import itertools
import operator
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any
from weakref import WeakSet

import distributed
import msgpack

from zfabric.client import current
from zfabric.client.callbacks import Callbacks
from zfabric.client.client import Client
from zfabric.client.collections.held import foreign
from zfabric.client.future import FAILED, Future
from zfabric.client.waiting import WARN_AGAIN_S, futures_of, sleep_until
from zfabric.codec.exceptions import dump_exception
from zfabric.config import Settings
from zfabric.core.submitter import LOADED, PENDING, Outcome
from zfabric.errors import (
    ClientClosed,
    ConfigError,
    ConnectFailed,
    DataLost,
    ResultTimeout,
    UsageError,
)
from zfabric.messages import CANCELLED, ERROR, KILLED, LOST, STORED

REFUSED = {
    "why": "Dask's dashboard shows what a task waits for",
    "links": "Dask keeps no record of links",
    **dict.fromkeys(("attach", "detach", "end_run", "runs", "futures"), "Dask has no named runs"),
    "get_executor": "use distributed.Client.get_executor()",
    "pool": "it needs a fabric",
    "map_sync": "it needs a fabric; use gather(map(...))",
}
"""Verbs that this engine does not have, and what to do."""


def _check_place(address: str, place: str) -> None:
    host, _, port = place.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"{address!r} does not say where a Dask scheduler is: write"
            " dask://host:port, as in dask://127.0.0.1:8786"
        )


def _meet(target: str, timeout: float) -> None:
    """Raises OSError when nobody there speaks as a Dask scheduler does. distributed's own client
    waits for ever where something listens and says nothing, as another kind of server does."""

    async def meet() -> None:
        arguments = distributed.security.Security().get_connection_args("client")
        comm = await distributed.comm.connect(target, timeout=timeout, **arguments)
        await comm.close()

    found: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(asyncio.wait_for(meet(), timeout))
        except (OSError, TimeoutError, ValueError) as exc:
            found.append(exc)

    thread = threading.Thread(target=run, name="zfabric-meet", daemon=True)
    thread.start()  # the caller's own thread may have a loop that runs
    thread.join()
    if found:
        raise OSError(str(found[0])) from found[0]


class DaskFuture(Future):
    """A future whose task runs on a Dask cluster.

    To Dask it is a collection of one value, so that it may stand in `delayed(f)(future)`.
    """

    __slots__ = ("_dask",)
    _client: DaskClient

    def __init__(self, client: DaskClient, dask: distributed.Future, task: int) -> None:
        super().__init__(client, Outcome(task, 1))
        self._dask = dask
        self._watch()

    def _watch(self) -> None:
        outcome, client = self._outcome, self._client
        self._dask.add_done_callback(lambda dask: _settle(outcome, dask, client))

    @property
    def key(self) -> str:
        """Dask's key."""
        return str(self._dask.key)

    def release(self) -> None:
        """Forget the task and its value now."""
        self._dask.release()

    def __dask_graph__(self) -> dict[Any, Any]:
        return {self._dask.key: self._dask}

    def __dask_keys__(self) -> list[Any]:
        return [self._dask.key]

    def __dask_postcompute__(self) -> tuple[Callable[[Any], Any], tuple[()]]:
        return operator.itemgetter(0), ()

    def __dask_tokenize__(self) -> tuple[str, str]:
        return "zfabric-dask-future", str(self._dask.key)

    @staticmethod
    def __dask_optimize__(dsk: Any, keys: Any, **options: Any) -> Any:
        return dsk


class DaskClient(Client):
    """See the module. Options are those of Client that make sense for an existing cluster."""

    def __init__(
        self,
        address: str,
        *,
        name: str | None = None,
        timeout: float | None = None,
        set_as_default: bool = True,
        **options: Any,
    ) -> None:
        self._closed = True  # until there is something to close
        self._forked = False
        if options:
            raise UsageError(
                f"{', '.join(sorted(options))}: no option of a client of an existing Dask cluster"
            )
        scheme, _, place = address.partition("://")
        self.address = address
        self.name = name or f"client-{os.getpid()}"
        self._settings = Settings.load(connect_timeout_s=timeout)
        _check_place(address, place)
        target = f"{scheme.partition('+')[2] or 'tcp'}://{place}"
        try:
            _meet(target, self._settings.connect_timeout_s)
            self._dask = distributed.Client(
                target,
                timeout=self._settings.connect_timeout_s,
                name=name,
                set_as_default=set_as_default,
            )
        except OSError as exc:
            raise ConnectFailed(
                address,
                self._settings.connect_timeout_s,
                f"no Dask scheduler answers at {target}; start `dask scheduler`",
            ) from exc
        self._closed = False
        self._numbers = itertools.count(1)
        self._callbacks = Callbacks()
        self._values: Any = _Values()
        self._submitter: Any = _Ending()
        self._io: Any = self._submitter
        self._warned_at = -WARN_AGAIN_S
        current.opened(self)
        _open.add(self)

    # --- calls --------------------------------------------------------------------------------

    def submit(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        key: str | None = None,
        pure: bool = False,
        retries: int = 0,
        priority: int = 0,
        resources: Any = None,
        workers: Any = None,
        **kwargs: Any,
    ) -> Future:
        """As on a fabric. Futures count in lists, tuples, sets and dicts."""
        self._check(kwargs)
        return self._wrapped(
            self._dask.submit(
                fn,
                *[self._unwrapped(arg) for arg in args],
                key=key,
                pure=pure,
                **self._options(retries, priority, resources, workers),
                **{name: self._unwrapped(arg) for name, arg in kwargs.items()},
            )
        )

    def map(  # type: ignore[override]
        self,
        fn: Callable[..., Any],
        /,
        *iterables: Iterable[Any],
        key: Any = None,
        pure: bool = False,
        retries: int = 0,
        priority: int = 0,
        resources: Any = None,
        workers: Any = None,
        **kwargs: Any,
    ) -> list[Future]:
        """As on a fabric, without max_inflight."""
        self._check(kwargs)
        if not iterables:
            raise UsageError("map() needs something to iterate over: map(f, items)")
        rows = list(zip(*iterables, strict=False))
        if not rows:
            return []
        if isinstance(key, str):
            key = [f"{key}-{number}" for number in range(len(rows))]
        futures = self._dask.map(
            fn,
            *[[self._unwrapped(item) for item in column] for column in zip(*rows, strict=True)],
            key=key if key is None else list(key),
            pure=pure,
            **self._options(retries, priority, resources, workers),
            **{name: self._unwrapped(arg) for name, arg in kwargs.items()},
        )
        return [self._wrapped(future) for future in futures]

    def gather(self, futures: Any, errors: str = "raise") -> Any:
        """As on a fabric; values come from Dask side by side."""
        if hasattr(futures, "__next__"):
            futures = list(futures)
        found = futures_of(futures)
        for future in found:
            sleep_until(self, future._outcome, None)
        stored = [f for f in found if f._outcome.status == STORED]
        if stored and not self._closed:
            values = self._dask.gather([f._dask for f in stored], errors="skip")
            if len(values) == len(stored):
                for future, value in zip(stored, values, strict=True):
                    _keep(future._outcome, value)
        return super().gather(futures, errors)

    def scatter(self, data: Any, broadcast: bool = False) -> Any:
        """As on a fabric."""
        self._check({})
        if isinstance(data, dict):
            values = self._scattered(list(data.values()), broadcast)
            return dict(zip(data, values, strict=True))
        if type(data) in (list, tuple, set, frozenset):
            return type(data)(self._scattered(list(data), broadcast))
        return self._scattered([data], broadcast)[0]

    def _scattered(self, values: list[Any], broadcast: bool) -> list[Future]:
        if not values:
            return []
        futures = self._dask.scatter(values, broadcast=broadcast, hash=False)
        return [self._wrapped(future) for future in futures]

    def cancel(self, futures: Any) -> None:
        """End these tasks, whoever waits for them. Dask lets running ones go on unheard."""
        own = self._own(futures)
        self._dask.cancel([f._dask for f in own], force=True)
        for future in own:
            if future._outcome.status == PENDING:
                _end(future._outcome, CANCELLED, b"")

    def retry(self, futures: Any) -> None:
        """Run failed tasks again; their futures become pending."""
        failed = [f for f in self._own(futures) if f._outcome.status in FAILED]
        for future in failed:
            future._outcome.status = PENDING
            future._outcome.payload = None
        self._dask.retry([f._dask for f in failed])
        for future in failed:
            future._watch()

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """fn(*args, **kwargs) once on each worker: {worker's name: result}."""
        names = {address: name for name, address in self._addresses().items()}
        return {names[a]: value for a, value in self._dask.run(fn, *args, **kwargs).items()}

    def fire_and_forget(self, futures: Any) -> None:
        """Keep these until they have ended."""
        distributed.fire_and_forget([f._dask for f in self._own(futures)])

    # --- collections --------------------------------------------------------------------------

    @property
    def get(self) -> Any:
        """Dask's own `get`, for `scheduler=`; with sync=False its futures are zfabric's."""
        return self._get

    def _get(self, dsk: Any, keys: Any, *, sync: bool = True, **options: Any) -> Any:
        self._check({})
        found = self._dask.get(dsk, keys, sync=sync, **options)
        return found if sync else self._rewrapped(found)

    def compute(self, collections: Any, *, sync: bool = False, **options: Any) -> Any:
        """A future for each collection's value, or with sync=True the values. What is no collection
        is given back as it is."""
        self._check({})
        found = self._dask.compute(collections, sync=sync, **options)
        return found if sync else self._rewrapped(found)

    def _rewrapped(self, found: Any) -> Any:
        if isinstance(found, (list, tuple)):
            return type(found)(self._rewrapped(each) for each in found)
        return self._wrapped(found) if isinstance(found, distributed.Future) else found

    def persist(self, collections: Any, **options: Any) -> Any:
        """The same collections, with their data on the workers."""
        self._check({})
        return self._dask.persist(collections, **options)

    def as_dask_scheduler(self) -> AbstractContextManager[Any]:
        """Within it, Dask's collections compute here."""
        return self._dask.as_current()

    # --- the cluster --------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What the scheduler says of itself; `workers` is a list, as on a fabric."""
        self._check({})
        told = dict(self._dask.scheduler_info(n_workers=-1))
        told["workers"] = [
            {**worker, "name": str(worker["name"]), "address": address}
            for address, worker in told["workers"].items()
        ]
        told["address"] = self.address
        return told

    def _addresses(self) -> dict[str, str]:
        return {worker["name"]: worker["address"] for worker in self.info()["workers"]}

    def wait_for_workers(self, n_workers: int = 1, timeout: float | None = None) -> None:
        """Return when that many workers are connected. Raises ResultTimeout."""
        self._check({})
        try:
            self._dask.wait_for_workers(n_workers, timeout=timeout)
        except TimeoutError as exc:
            raise ResultTimeout(str(exc)) from exc

    def close(self) -> None:
        """Leave the cluster; its tasks that nobody else holds are forgotten."""
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        current.closed(self)
        self._submitter.closed_text = "it was closed"
        self._callbacks.close()
        self._dask.close()

    def __enter__(self) -> Client:
        self._check({})
        return self

    def __repr__(self) -> str:
        return f"<Client {self.address}{' closed' if self._closed else ''} on {self._dask!r}>"

    # --- inside -------------------------------------------------------------------------------

    def _wrapped(self, dask: Any) -> DaskFuture:
        return DaskFuture(self, dask, next(self._numbers))

    def _unwrapped(self, argument: Any) -> Any:
        """The argument with Dask's futures in place of ours."""
        if isinstance(argument, Future):
            if argument._client is not self:
                raise UsageError(
                    f"{argument.key} is a future of another client: what is made on one cluster"
                    " stays there; give its value, future.result()"
                )
            return argument._dask  # type: ignore[attr-defined]
        kind = type(argument)
        if kind is dict:
            return {name: self._unwrapped(item) for name, item in argument.items()}
        if kind in (list, tuple, set, frozenset):
            return kind([self._unwrapped(item) for item in argument])
        return argument

    def _drop(self, task: int) -> None:  # type: ignore[override]
        """Dask forgets when its own future goes."""

    def _warn_without_workers(self) -> None:
        """Dask's scheduler says so in its own words."""

    @property
    def is_cut_off(self) -> bool:
        """Whether the cluster has gone away, and not this client."""
        return not self._closed and self._dask.status != "running"

    def _check(self, kwargs: dict[str, Any]) -> None:
        if self._closed:
            raise ClientClosed("this client was closed; make a new one")
        if self._dask.status == "closed":
            raise ClientClosed(f"the Dask cluster at {self.address} is gone; make a new client")
        for name in ("timeout", "retry_on", "idempotent", "max_inflight"):
            if name in kwargs:
                raise UsageError(f"{name}= is an option that a Dask cluster does not have")

    def _options(self, retries: int, priority: int, resources: Any, workers: Any) -> dict[str, Any]:
        options: dict[str, Any] = {"retries": retries, "priority": priority}
        if resources:
            options["resources"] = dict(resources)
        if workers:
            names = [workers] if isinstance(workers, str) else list(workers)
            known = self._addresses()
            options["workers"] = [known.get(name, name) for name in names]
        return options


def _refusing(verb: str, advice: str) -> Any:
    def refuse(self: DaskClient, *_args: Any, **_options: Any) -> Any:
        raise UsageError(f"{verb}() does not exist on a Dask cluster: {advice}")

    refuse.__doc__ = f"Refused: {advice}."
    return refuse


for _verb, _advice in REFUSED.items():
    setattr(DaskClient, _verb, _refusing(_verb, _advice))


class _Ending:
    """What futures and waits of zfabric ask of a client's inner parts."""

    closed_text = ""
    broker_ended = None

    @property
    def is_open(self) -> bool:
        return not self.closed_text


class _Values:
    """Fetches values by Dask's futures."""

    def begin_fetch(self, future: DaskFuture) -> None:
        """Nothing is begun early: gather() has fetched already what it could."""

    def fetch(self, future: DaskFuture, deadline: float | None) -> None:
        """Have the value in its outcome. Raises ResultTimeout, DataLost."""
        timeout = None if deadline is None else max(0.0, deadline - monotonic())
        try:
            _keep(future._outcome, future._dask.result(timeout=timeout))
        except TimeoutError as exc:
            raise ResultTimeout(f"the value of {future.key} has not come in time") from exc
        except distributed.CancelledError as exc:
            raise DataLost(f"{future.key}: the value is gone from the cluster", future.key) from exc


def _future_of(value: Any) -> Future | None:
    """For what stands in a collection that was persisted by one of these clients."""
    if isinstance(value, distributed.Future):
        for client in _open:
            if client._dask is value.client:
                return client._wrapped(value)
    return None


_open: WeakSet[DaskClient] = WeakSet()
foreign.append(_future_of)

_settling = threading.Lock()


def _keep(outcome: Outcome, value: Any) -> None:
    outcome.value = value
    outcome.status = LOADED


def _settle(outcome: Outcome, dask: Any, client: DaskClient) -> None:
    """Dask says that a task has ended: in a thread of Dask's for callbacks."""
    status = dask.status
    if status == "finished":
        _end(outcome, STORED, None)
    elif status == "error":
        error = dask.exception()
        if isinstance(error, distributed.KilledWorker):
            _end(outcome, KILLED, msgpack.packb([str(error)]))
        else:
            _end(outcome, ERROR, dump_exception(error.with_traceback(dask.traceback())))
    elif client.is_cut_off:
        _end(outcome, LOST, msgpack.packb([f"the Dask cluster at {client.address} is gone"]))
    elif status == "lost":
        _end(outcome, LOST, msgpack.packb(["its value is gone from the cluster"]))
    else:
        _end(outcome, CANCELLED, b"")


def _end(outcome: Outcome, status: int, payload: bytes | None) -> None:
    with _settling:
        if outcome.status != PENDING:
            return
        outcome.payload = payload
        outcome.status = status
        waiters, outcome.waiters = outcome.waiters, None
    for waiter in waiters or ():
        waiter(outcome)
