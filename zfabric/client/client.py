"""`Client`: what users hold. Each method is a few lines; the rooms beside it do the work."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import msgpack

from zfabric.client import current, engines, misuse, named_runs
from zfabric.client.callbacks import Callbacks
from zfabric.client.calls import Calls
from zfabric.client.fabric import find_fabric
from zfabric.client.future import FAILED, Future
from zfabric.client.gathering import gather
from zfabric.client.io_thread import IoThread
from zfabric.client.lazy_map import LazyMap
from zfabric.client.sharing import are_still
from zfabric.client.values import Values
from zfabric.client.waiting import (
    WARN_AGAIN_S,
    add_waiter,
    futures_of,
    sleep_until,
    warn_without_workers,
)
from zfabric.client.why import TaskStory, stories_named, stories_of
from zfabric.config import Settings
from zfabric.core.submitter import Outcome
from zfabric.errors import ResultTimeout, UsageError, ZFabricError

if TYPE_CHECKING:
    from zfabric.client.collections.scheduler import DaskScheduler
    from zfabric.client.executor import ClientExecutor
    from zfabric.client.pool import Pool
    from zfabric.client.showing import LogPrinter

log = logging.getLogger(__name__)

POLL_S = 0.02
"""Between two looks at the workers while waiting for them."""


class Client:
    """A connection with a fabric: submits calls, gives futures.

    address: of the broker, or the path of a join file, or a LocalFabric, or `dask://host:port`
        of a Dask scheduler (see zfabric.distributed). Without one: ZFABRIC_ADDRESS; inside a task,
        the fabric that runs it; else a LocalFabric is started, owned, and closed with the client.
    n_workers, slots, kind: of that LocalFabric. slots: per worker, None for one per core.
        kind: "process" or "thread". processes=False is short for kind="thread".
        memory_limit: bytes that a slot's process may take; a task above it ends as MemoryExceeded.
    run: attach to this named run, see `attach`.
    name: what the broker's logs call it.
    timeout: seconds until a first contact without an answer raises ConnectFailed.
    set_as_default: Dask's collections compute here without being told, until it is closed.
        Not inside a task. Dask is not imported for it.
    show_logs: print what tasks of this client write, as they write it, on whatever host they run,
        with `[name-number] ` before each line. A LocalFabric of its own leaves that to it then.
    settings: any field of zfabric.config.Settings.

    Safe to use from many threads. Closing it, by `with`, `close()` or when nobody holds it any
    more, forgets all its tasks; who still waits for one gets TaskCancelled.
    """

    def __new__(cls, address: Any = None, *_args: Any, **_options: Any) -> Client:
        kind = (engines.engine_of(address) or cls) if cls is Client else cls
        return super().__new__(kind)

    def __init__(
        self,
        address: Any = None,
        *,
        n_workers: int | None = None,
        slots: int | None = None,
        kind: str | None = None,
        processes: bool | None = None,
        memory_limit: int | None = None,
        run: str | None = None,
        name: str | None = None,
        timeout: float | None = None,
        set_as_default: bool = True,
        show_logs: bool = False,
        **settings: Any,
    ) -> None:
        self._forked = False
        self._closed = False
        self._is_default = False
        self._graphs: Any = None
        """What `collections` remembers; made by the first graph."""
        self._fabric: Any = None
        if run is not None:
            named_runs.check_name(run)
        misuse.refuse_unknown_options(settings)
        self._settings = Settings.load(connect_timeout_s=timeout, **settings)
        fabric = find_fabric(
            address,
            n_workers=n_workers,
            slots=slots,
            kind=kind,
            processes=processes,
            memory_limit=memory_limit,
            echo=not show_logs,
        )
        self._fabric = fabric.owned
        self.address: str = fabric.address
        self.name = name or f"client-{os.getpid()}"
        self._lock = threading.RLock()
        self._io = IoThread(self.address, self.name, fabric.depth, self._settings, fabric.join)
        if self._fabric is not None:
            self._io.link.broker_ended = self._fabric.broker_ended
        self._submitter = self._io.submitter
        self._drop = self._submitter.released.append
        self._printer: LogPrinter | None = None
        if show_logs:
            from zfabric.client.showing import LogPrinter

            self._io.link.on_output = self._printer = LogPrinter(self._submitter.name_of)
        self._callbacks = Callbacks()
        self._values = Values(self)
        self._calls = Calls(self)
        self._kept: dict[int, Future] = {}
        self._sync_pool: Pool | None = None
        self._warned_at = -WARN_AGAIN_S
        if run is not None:
            self._io.link.run = run
            self._calls.kept = {}
        try:
            self._io.start(self._settings.connect_timeout_s)
            if run is not None:
                named_runs.futures(self)
        except BaseException:
            self.close()
            raise
        current.opened(self)
        if set_as_default and not fabric.depth:
            from zfabric.client.collections.default import set_default

            self._is_default = True
            set_default(self)

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
        resources: Mapping[str, float] | None = None,
        workers: str | Iterable[str] | None = None,
        timeout: float | None = None,
        retry_on: type[BaseException] | tuple[type[BaseException], ...] = (),
        idempotent: bool = True,
        must_fit: bool = True,
        **kwargs: Any,
    ) -> Future:
        """Run fn(*args, **kwargs) on some worker.

        Futures among the arguments, also inside lists, tuples, dicts and objects, become their
        values there; the call runs once they exist.

        key: a name; while a future with it is alive, it is returned instead.
        pure: equal calls share one future.
        retries: how often to run again after it failed, with growing pauses; retry_on: only after
            these exceptions and their subclasses.
        timeout: seconds that it may run, waiting in line not counted; then its process is killed,
            whatever it does, and it ends as TaskTimeout. Slots that are threads cannot do that.
        idempotent: False for what must not run twice: where its process or worker vanishes when
            it may have begun, it ends as UnknownOutcome.
        priority: higher runs sooner.  resources: what it occupies on a worker, {"GPU": 1}.
        workers: name or names of those that may run it.  must_fit: where none of the workers there
            are could ever run it, it ends at once as NoWorkerFits; False: it waits for one.
        Raises Unserialisable when an argument cannot be sent, naming the path to it.
        """
        if key is None and not pure:
            plain = not (retries or priority or resources or workers or retry_on)
            if plain and timeout is None and idempotent is True and must_fit is True:
                return self._calls.submit(fn, args, kwargs)
        options = misuse.options_of(
            key, retries, priority, resources, workers, timeout, retry_on, idempotent, must_fit
        )
        if key is None and not pure:
            return self._calls.submit(fn, args, kwargs, options)
        return self._calls.submit_named(fn, args, kwargs, key, options)

    @overload
    def map(
        self, fn: Callable[..., Any], /, *iterables: Iterable[Any], max_inflight: int, **more: Any
    ) -> LazyMap: ...

    @overload
    def map(
        self, fn: Callable[..., Any], /, *iterables: Iterable[Any], **more: Any
    ) -> list[Future]: ...

    def map(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: Iterable[Any],
        key: str | Iterable[str] | None = None,
        pure: bool = False,
        retries: int = 0,
        priority: int = 0,
        resources: Mapping[str, float] | None = None,
        workers: str | Iterable[str] | None = None,
        timeout: float | None = None,
        retry_on: type[BaseException] | tuple[type[BaseException], ...] = (),
        idempotent: bool = True,
        must_fit: bool = True,
        max_inflight: int | None = None,
        **kwargs: Any,
    ) -> list[Future] | LazyMap:
        """A future of fn(a, b, ..., **kwargs) for each row of zip(*iterables).

        key: a list of keys, or the beginning of all of them.  Other options as in submit.
        max_inflight: return an iterator instead, which submits as its futures are taken and
            keeps at most that many unfinished. For long and endless iterators.
        """
        if not iterables:
            raise UsageError("map() needs something to iterate over: map(f, items)")
        rows: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
        wishes = (retries, priority, resources, workers, timeout, retry_on, idempotent, must_fit)
        if max_inflight is None:
            misuse.refuse_endless(iterables)
            if key is None and not pure and not kwargs:
                options = misuse.options_of(None, *wishes)
                return self._calls.map(fn, rows, options, are_still(iterables))
        names = None if key is None else _names(key)
        if kwargs:
            kwargs = self._values.spread(kwargs)

        def submit(row: tuple[Any, ...]) -> Future:
            name = None if names is None else next(names)
            options = misuse.options_of(name, *wishes)
            if name is None and not pure:
                return self._calls.submit(fn, row, kwargs, options)
            return self._calls.submit_named(fn, row, kwargs, name, options)

        if max_inflight is not None:
            return LazyMap(self, submit, rows, max_inflight)
        return [submit(row) for row in rows]

    def gather(self, futures: Any, errors: str = "raise") -> Any:
        """The values of futures, in the nesting they come in: lists, tuples, sets, dicts.

        errors: "raise" raises the first failed one's exception, "skip" leaves failed ones out.
        """
        return gather(self, futures, errors)

    def scatter(self, data: Any, broadcast: bool = False) -> Any:
        """Put data into the workers' stores: a list gives a list of futures, a dict a dict,
        anything else one future.

        broadcast: put a copy on each worker rather than on one.
        A value whose worker dies ends as DataLost: no task can make it again.
        """
        if isinstance(data, dict):
            return dict(
                zip(data, self._values.scatter(list(data.values()), broadcast), strict=True)
            )
        if type(data) in (list, tuple, set, frozenset):
            return type(data)(self._values.scatter(list(data), broadcast))
        return self._values.scatter([data], broadcast)[0]

    def cancel(self, futures: Any) -> None:
        """End these tasks (nested as you like), whoever waits for them.

        One that runs is killed, whatever it is doing: SIGKILL to its slot's process and to all
        that it has started in its process group. The slot is replaced, and no other task is
        touched. In a slot that is a thread (kind="thread") it cannot be killed: it keeps its slot
        until it ends by itself, and its outcome is thrown away.
        """
        self._io.call(self._io.link.cancel, [f._outcome for f in self._own(futures)])

    def retry(self, futures: Any) -> None:
        """Run failed tasks again; their futures become pending. Others are left alone."""
        self._io.call(self._submitter.retry, [f._outcome for f in self._own(futures)], FAILED)

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """fn(*args, **kwargs) once on each worker: {worker's name: result}."""
        futures = {
            name: self._calls.submit(
                fn, args, kwargs, misuse.options_of(None, 0, RUN_PRIORITY, None, name)
            )
            for name in self.workers()
        }
        return self.gather(futures)  # type: ignore[no-any-return]

    def fire_and_forget(self, futures: Any) -> None:
        """Keep these until they have ended, also when nobody holds them any more."""
        for future in self._own(futures):
            self._kept[future.task_id] = future
            if not add_waiter(future._outcome, self._forget):
                self._forget(future._outcome)

    def get_executor(self, **options: Any) -> ClientExecutor:
        """A concurrent.futures.Executor over this client.

        options: those of submit, from retries on, for all its calls.
            initializer, initargs: run once in each slot before the first of its calls there.
        """
        from zfabric.client.executor import ClientExecutor

        return ClientExecutor(self, **options)

    def pool(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
    ) -> Pool:
        """A pool with the words of multiprocessing.Pool, for libraries that take one.

        processes: how many slots to cut work for; None for all there are.
        initializer, initargs: run once in each slot before the first of its calls there.
        """
        from zfabric.client.pool import Pool

        return Pool(self, processes, initializer, initargs)

    def map_sync(
        self, fn: Callable[..., Any], /, *iterables: Iterable[Any], chunksize: int | None = None
    ) -> list[Any]:
        """[fn(a, b, ...) for each row of zip(*iterables)]: for what takes a function like map,
        such as scipy's `workers=`.

        chunksize: rows per task; None cuts them for the slots there are.
        """
        pool = self._sync_pool
        if pool is None:
            pool = self._sync_pool = self.pool()
        if len(iterables) == 1:
            return pool.map(fn, iterables[0], chunksize)
        if not iterables:
            raise UsageError("map_sync() needs something to iterate over: map_sync(f, items)")
        return pool.starmap(fn, zip(*iterables, strict=False), chunksize)

    # --- Dask's collections -------------------------------------------------------------------

    @property
    def get(self) -> DaskScheduler:
        """`client.get(graph, keys)` runs a Dask graph; also what Dask takes as a scheduler.

        See DaskScheduler.get: nested keys give nested values.
        """
        from zfabric.client.collections.scheduler import DaskScheduler

        return DaskScheduler(lambda: self)

    def compute(self, collections: Any, **options: Any) -> Any:
        """A future of a Dask collection's value; for a list of collections a list.

        options: sync=True for the values themselves; optimize_graph, priority, retries,
        resources, workers. See DaskScheduler.compute.
        """
        return self.get.compute(collections, **options)

    def persist(self, collections: Any, **options: Any) -> Any:
        """The same kind of Dask collection, its data computed and left on the workers.

        The data goes when the last collection made of it does. options: as in compute.
        """
        return self.get.persist(collections, **options)

    def as_dask_scheduler(self) -> AbstractContextManager[DaskScheduler]:
        """`with client.as_dask_scheduler():` Dask computes here inside, in all threads."""
        from zfabric.client.collections.default import as_scheduler

        return as_scheduler(self.get)

    @property
    def asynchronous(self) -> bool:
        """Always False: Dask asks this of whatever it may compute by."""
        return False

    # --- the fabric ---------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What the broker knows: workers, tasks by state, bytes, uptime, and the address."""
        if self._submitter.closed_text:
            misuse.refuse_closed(self)
        answer = msgpack.unpackb(self._io.ask("info", self._settings.dead_s))
        answer["address"] = self.address
        return answer  # type: ignore[no-any-return]

    def why(self, tasks: Future | Iterable[Future] | str) -> list[TaskStory]:
        """Why tasks have not ended: futures of this client, or a key, whoever submitted it.

        One TaskStory per future, or per task of that key; print them.
        """
        if isinstance(tasks, str):
            return stories_named(self, tasks)
        return stories_of(self, list(self._own(tasks)))

    def links(self, timeout: float = 5.0) -> list[dict[str, Any]]:
        """The links over which values move, as this client and its workers have measured them.

        Each has: at (who tells), peer, direction ("in" or "out"), rate (bytes/s; 0: unknown),
        round_trip_s, raw_nbytes and wire_nbytes (before and after compression), verdicts (a count
        by reason) and saved_s (seconds of the link, less what compressing cost).
        Workers that do not answer within `timeout` seconds are left out.
        """
        from zfabric.client.links import links_of

        return links_of(self, timeout)

    def workers(self) -> list[str]:
        """The names of the workers that are connected now."""
        return [worker["name"] for worker in self.info()["workers"]]

    def wait_for_workers(self, n_workers: int = 1, timeout: float | None = None) -> None:
        """Return when that many workers are connected. Raises ResultTimeout."""
        deadline = None if timeout is None else monotonic() + timeout
        pause = threading.Event()
        while (found := len(self.info()["workers"])) < n_workers:
            if deadline is not None and monotonic() >= deadline:
                raise ResultTimeout(
                    f"{found} of {n_workers} workers are connected to {self.address} after"
                    f" {timeout:.3g} s; start more with `zfabric worker {self.address}`"
                )
            pause.wait(POLL_S)

    # --- named runs ---------------------------------------------------------------------------

    def attach(self, run: str) -> Client:
        """Hold the run of that name, which begins now if there is none; returns this client.

        Tasks submitted with a key then outlive this client and its process: whoever attaches next
        finds them in `futures()`. Only before the first submit. `Client(address, run="name")`
        does the same at once. Raises Refused (code "run") while another client holds the run.
        """
        if self._submitter.closed_text:
            misuse.refuse_closed(self)
        named_runs.attach(self, run, self._settings.connect_timeout_s)
        return self

    def futures(self) -> dict[str, Future]:
        """The futures of the run's tasks by their keys, whoever submitted them."""
        if self._submitter.closed_text:
            misuse.refuse_closed(self)
        return named_runs.futures(self)

    def detach(self, timeout: float = 30.0) -> None:
        """Leave the run and close this client; tasks with a key go on, and their results stay.

        Returns when the broker has all that was submitted, with a journal on its disk. Raises
        ResultTimeout, with the client still open, when it has not after `timeout` seconds.
        """
        if self._submitter.closed_text:
            misuse.refuse_closed(self)
        if not self._io.link.run:
            raise UsageError("detach() leaves a named run, and this client holds none")
        self._calls.repeats.tidy()
        named_runs.sync(self, timeout)
        self.close()

    def runs(self) -> list[dict[str, Any]]:
        """The runs at the broker: name, holder ("" for none), its host and pid, left_s (seconds
        since it left), tasks, unfinished."""
        return named_runs.listed(self)

    def end_run(self, run: str | None = None) -> None:
        """Forget a run with all its tasks: the one that this client holds, and the client is
        closed; or one that nobody holds. Raises UsageError where there is none, or it is held."""
        if self._submitter.closed_text:
            misuse.refuse_closed(self)
        name = run or self._io.link.run
        if not name:
            raise UsageError("end_run() needs the name of a run, as this client holds none")
        named_runs.end(self, name)
        if name == self._io.link.run:
            self._io.link.run = ""
            self.close()

    # --- life ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Forget all tasks, end the thread, and the local fabric if the client started it.

        Tasks with a key in a named run stay.
        """
        if self._closed:
            return
        self._closed = True
        current.closed(self)
        if self._is_default:
            from zfabric.client.collections.default import unset_default

            unset_default(self)
        io = getattr(self, "_io", None)
        if io is not None and not self._forked:
            self._calls.repeats.tidy()
            named_runs.leave(self)
            io.close()
            self._kept.clear()
            self._sync_pool = None
            self._callbacks.close()
            if self._printer is not None:
                self._printer.close()
        if self._fabric is not None and not self._forked:
            self._fabric.close()

    def __enter__(self) -> Client:
        if not self._io.is_open:
            misuse.refuse_closed(self)
        return self

    def __reduce__(self) -> Any:
        raise UsageError("a Client cannot be sent; inside a task use zfabric.get_client()")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        from zfabric.client.awaiting import in_thread

        await in_thread(self.close)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __repr__(self) -> str:
        if not self._io.is_open:
            return f"<Client {self.address} closed>"
        try:
            info = msgpack.unpackb(self._io.ask("info", 1.0))
        except ZFabricError:
            return f"<Client {self.address} (the broker does not answer)>"
        workers, tasks = info["workers"], info["tasks"]
        memory = sum(worker["memory"] for worker in workers) / 2**20
        return (
            f"<Client {self.address} workers={len(workers)}"
            f" slots={sum(worker['slots'] for worker in workers)} memory={memory:.0f}MiB"
            f" tasks={tasks['running']} running, {tasks['waiting'] + tasks['ready']} waiting>"
        )

    # --- for the rooms beside it --------------------------------------------------------------

    def _sleep_until(self, outcome: Outcome, deadline: float | None) -> bool:
        return sleep_until(self, outcome, deadline)

    def _own(self, nested: Any) -> list[Future]:
        if self._submitter.closed_text:
            misuse.refuse_closed(self)
        futures = futures_of(nested, "this call")
        for future in futures:
            if future._client is not self:
                raise UsageError(f"{future!r} belongs to another client: ask that one")
        return futures

    def _forget(self, outcome: Outcome) -> None:
        self._kept.pop(outcome.id, None)

    def _warn_without_workers(self) -> None:
        """Warn when nothing can run; seldom, and never raise."""
        now = monotonic()
        if now - self._warned_at < WARN_AGAIN_S:
            return
        self._warned_at = now
        try:
            info = msgpack.unpackb(self._io.ask("info", 1.0))
        except ZFabricError:
            return
        if not info["workers"] and not info.get("settling"):  # else they are on their way back
            warn_without_workers(self.address)
        for text in info.get("unfit", ()):
            log.warning("%s", text)

    def _mark_forked(self) -> None:
        self._forked = True
        self._submitter.closed_text = "it was made before os.fork()"


RUN_PRIORITY = 2**20
"""`run` is for a look at the workers: before whatever is queued."""


def _names(key: str | Iterable[str]) -> Iterator[str]:
    if isinstance(key, str):
        return (f"{key}-{number}" for number in itertools.count())
    return iter(key)
