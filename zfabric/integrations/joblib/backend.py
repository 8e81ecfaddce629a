"""The backend: joblib's batches become tasks, and their ends joblib's callbacks.

joblib waits for ever for a batch whose callback does not come. So the callback hangs on the
future, which ends in every case, also when its worker dies, it is cancelled or the client closed.

Large arguments that many batches share, such as the data of a grid search, go to the fabric once
per call of Parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from joblib import register_parallel_backend
from joblib.parallel import (
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
    parallel_config,
)

from zfabric.client import Client, Future, get_client
from zfabric.client.waiting import blocked

SHARED_NBYTES = 16 * 1024
"""Arguments from this size on are put into a worker's store once per call of Parallel."""

DEEPEST = 1
"""Level of nesting whose calls are tasks; those of deeper levels run where they are."""


class ZFabricBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """What `parallel_config("zfabric", ...)` makes.

    client: None for that of `zfabric.get_client()`, when it is first needed.
    inner_max_num_threads: of BLAS and OpenMP inside a task; needs threadpoolctl on the workers.
    wait_for_workers_timeout: seconds, while there are no workers.
    submit: retries, priority, resources, workers: as in Client.submit, for all batches.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    supports_sharedmem = False
    uses_threads = False
    default_n_jobs = -1
    # Nobody else is served before a batch ends, so they should be short; a task costs little.
    MIN_IDEAL_BATCH_DURATION = 0.05
    MAX_IDEAL_BATCH_DURATION = 1.0

    def __init__(
        self,
        client: Client | None = None,
        *,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        wait_for_workers_timeout: float = 10.0,
        **submit: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self._given = client
        self._wait_s = wait_for_workers_timeout
        self._executor_options = submit
        self._unfinished: dict[int, Future] = {}
        self._shared: dict[int, tuple[Any, Future]] = {}
        if nesting_level:
            # A forest with n_jobs=None inside a grid search should not be cut up as well.
            self.default_n_jobs = 1

    @property
    def client(self) -> Client:
        """The client whose fabric runs the calls."""
        if self._given is None:
            self._given = get_client()
        return self._given

    def __reduce__(self) -> Any:
        return _nested, (self.nesting_level, self.inner_max_num_threads)

    # --- what joblib asks ---------------------------------------------------------------------

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many run at once: n_jobs, the fabric's slots for -1, one less for -2, ..."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if n_jobs > 0:
            return n_jobs
        return max(self._n_slots() + 1 + n_jobs, 1)

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        prefer: Any = None,
        require: Any = None,
        **_: Any,
    ) -> int:
        """Make ready for one Parallel; the options that are not used are about local processes."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        return n_jobs

    def submit(self, func: Any, callback: Callable[[Future], object] | None = None) -> Future:
        """Queue a batch."""
        client = self.client
        calls = [self._with_futures(*item) for item in func.items]
        nested = (func._backend, func._n_jobs)
        future = client.submit(
            run_batch, calls, nested, self.inner_max_num_threads, **self._executor_options
        )
        self._unfinished[future.task_id] = future
        client._callbacks.when_done(future, _Ended(self._unfinished, callback))
        return future

    def retrieve_result_callback(self, future: Future) -> Any:
        """The values of a batch that has ended."""
        return future.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancel all batches that have not ended."""
        unfinished = list(self._unfinished.values())
        self._unfinished.clear()
        if unfinished and self.client._io.is_open:
            self.client.cancel(unfinished)

    def stop_call(self) -> None:
        """One call of Parallel is over: its data goes."""
        self._shared.clear()

    def terminate(self) -> None:
        """Parallel is done with it."""
        self._shared.clear()
        self.reset_batch_stats()

    def get_nested_backend(self) -> tuple[Any, int | None]:
        """What calls of Parallel inside a task use."""
        level = (self.nesting_level or 0) + 1
        if level > DEEPEST:
            return SequentialBackend(nesting_level=level), None
        return _nested(level, self.inner_max_num_threads), None

    @contextmanager
    def retrieval_context(self) -> Iterator[None]:
        """While a task only waits for nested calls, its slot runs others: perhaps these."""
        with blocked():
            yield

    # --- inside -------------------------------------------------------------------------------

    def _n_slots(self) -> int:
        client = self.client
        workers = client.info()["workers"]
        if not workers:
            client.wait_for_workers(1, self._wait_s)
            workers = client.info()["workers"]
        return sum(worker["slots"] for worker in workers)

    def _with_futures(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """A call with its large arguments as futures."""
        share = self._share
        return fn, tuple(map(share, args)), {name: share(each) for name, each in kwargs.items()}

    def _share(self, argument: Any) -> Any:
        if _nbytes(argument) < SHARED_NBYTES:
            return argument
        held = self._shared.get(id(argument))
        if held is None:
            # The argument is held as well: its id may not become another one's.
            held = self._shared[id(argument)] = (argument, self.client.scatter([argument])[0])
        return held[1]


class _Ended:
    """Tells joblib; holds no backend, as futures hold this."""

    __slots__ = ("_callback", "_unfinished")

    def __init__(
        self, unfinished: dict[int, Future], callback: Callable[[Future], object] | None
    ) -> None:
        self._unfinished = unfinished
        self._callback = callback

    def __call__(self, future: Future) -> None:
        self._unfinished.pop(future.task_id, None)
        if self._callback is not None:
            self._callback(future)


def run_batch(
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]],
    nested: tuple[Any, int | None],
    inner_max_num_threads: int | None,
) -> list[Any]:
    """The task: what joblib's BatchedCalls does, with a limit on the threads below it."""
    backend, n_jobs = nested
    with parallel_config(backend=backend, n_jobs=n_jobs), _few_threads(inner_max_num_threads):
        return [fn(*args, **kwargs) for fn, args, kwargs in calls]


def _few_threads(most: int | None) -> Any:
    if most is None:
        return nullcontext()
    from threadpoolctl import threadpool_limits

    return threadpool_limits(most)


def _nbytes(argument: Any) -> int:
    """Bytes of arrays and data frames, of bytes and texts; 0 for what is not known."""
    if isinstance(argument, (bytes, bytearray, str)):
        return len(argument)
    try:
        nbytes = argument.nbytes
    except Exception:
        nbytes = None
    if isinstance(nbytes, int):
        return nbytes
    if hasattr(argument, "memory_usage"):  # pandas
        try:
            return int(argument.memory_usage().sum())
        except Exception:
            return 0
    data = getattr(argument, "data", None)  # a sparse matrix
    return int(getattr(data, "nbytes", 0) or 0)


def _nested(nesting_level: int | None, inner_max_num_threads: int | None) -> ZFabricBackend:
    return ZFabricBackend(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)


def register() -> None:
    """Let joblib know the name "zfabric"."""
    register_parallel_backend("zfabric", ZFabricBackend)
