"""The pool keeps the words of multiprocessing.Pool."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.unit.client_broker import FakeBroker
from zfabric import TaskCancelled
from zfabric.client import Client
from zfabric.client.chunks import InitializerFailed

begun: list[Any] = []


def add(a: Any, b: Any = 1) -> Any:
    return a + b


def fail(_: Any = None) -> None:
    raise LookupError("no")


def note(what: Any) -> None:
    begun.append(what)


class Likelihood:
    """As the samplers have them: data, a method, no plain function."""

    def __init__(self, n_bytes: int) -> None:
        self.data = np.zeros(n_bytes, np.uint8)

    def __call__(self, x: Any) -> float:
        return float(x) + float(self.data[0])

    def method(self, x: Any) -> float:
        return self(x)


def test_maps(client: Client) -> None:
    with client.pool() as pool:
        assert pool.size == pool._processes == 2
        assert pool.map(add, range(100)) == list(range(1, 101))
        assert pool.map(add, iter(range(5)), chunksize=2) == [1, 2, 3, 4, 5]
        assert pool.map(add, []) == []
        assert pool.starmap(add, [(1, 2), (3, 4)]) == [3, 7]
        assert list(pool.imap(add, range(7), 3)) == [1, 2, 3, 4, 5, 6, 7]
        assert sorted(pool.imap_unordered(add, range(7))) == [1, 2, 3, 4, 5, 6, 7]
        assert list(itertools.islice(pool.imap(add, itertools.count()), 3)) == [1, 2, 3]
        assert [x.tolist() for x in pool.map(add, np.zeros((3, 2)))] == [[1.0, 1.0]] * 3
        with pytest.raises(LookupError):
            pool.map(fail, [1])
        with pytest.raises(ValueError, match="Chunksize"):
            pool.map(abs, [1], chunksize=-1)
        with pytest.raises(ValueError, match="Chunksize"):
            pool.imap(add, [1], 0)


def slow_or_failing(x: int) -> int:
    if x == 1:
        raise LookupError(x)
    if x == 2:
        time.sleep(0.5)
    return x


@pytest.mark.parametrize("in_order", [True, False])
def test_an_iterator_of_a_pool_waits_as_long_as_asked_and_outlives_an_error(
    client: Client, in_order: bool
) -> None:
    with client.pool() as pool:
        found = (pool.imap if in_order else pool.imap_unordered)(slow_or_failing, range(4))
        values, errors, late = [], 0, 0
        while True:
            try:
                values.append(found.next(timeout=0.05))
            except StopIteration:
                break
            except LookupError:
                errors += 1
            except multiprocessing.TimeoutError:
                late += 1
        assert values == [0, 2, 3] if in_order else sorted(values) == [0, 2, 3]
        assert errors == 1 and late >= 1
        with pytest.raises(StopIteration):
            next(found)


def test_calls_and_callbacks(client: Client, wait_until: Callable[..., Any]) -> None:
    pool = client.pool()
    assert pool.apply(add, (1,), {"b": 5}) == 6
    values: list[Any] = []
    errors: list[Any] = []
    result = pool.apply_async(add, (1,), callback=values.append)
    mapped = pool.map_async(add, range(3), callback=values.append)
    starred = pool.starmap_async(add, [(1, 1)], callback=values.append)
    failed = pool.apply_async(fail, callback=values.append, error_callback=errors.append)
    nothing = pool.map_async(add, [], callback=values.append)
    assert result.get(10) == 2 and mapped.get(10) == [1, 2, 3] and starred.get() == [2]
    assert nothing.get() == []
    failed.wait(10)
    assert failed.ready() and not failed.successful() and result.successful()
    with pytest.raises(LookupError):
        failed.get()
    wait_until(lambda: len(values) == 4 and len(errors) == 1)
    assert isinstance(errors[0], LookupError)


def test_time_runs_out(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    result = client.pool().apply_async(add, (1,))
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(0.01)
    with pytest.raises(TimeoutError):
        result.get(0.01)


def test_life(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    pool = client.pool()
    with pytest.raises(ValueError, match="still running"):
        pool.join()
    result = pool.map_async(add, range(9))
    threading.Timer(0.02, let_run, (broker,)).start()
    pool.close()
    with pytest.raises(ValueError, match="not running"):
        pool.map(add, [1])
    pool.join()
    assert result.ready() and not pool._running
    with pytest.raises(NotImplementedError):
        pickle.dumps(pool)
    broker.hold = True
    with client.pool() as other:
        pending = other.map_async(add, range(9))
    with pytest.raises(TaskCancelled):
        pending.get(10)
    with pytest.raises(ValueError, match="at least 1"):
        client.pool(0)


def let_run(broker: FakeBroker) -> None:
    broker.hold = False
    broker.stir()


def test_the_initializer_runs_once_per_slot(client: Client) -> None:
    begun.clear()
    pool = client.pool(2, note, (7,))
    assert pool.map(add, range(50), 1) == list(range(1, 51))
    assert pool.apply(add, (1,)) == 2
    executor = client.get_executor(initializer=note, initargs=(8,))
    assert list(executor.map(add, range(9), chunksize=2)) == list(range(1, 10))
    assert executor.submit(add, 1).result(10) == 2
    assert begun == [7, 8]  # the fake broker has one slot


def test_an_initializer_that_fails(client: Client) -> None:
    executor = client.get_executor(initializer=fail)
    with pytest.raises(InitializerFailed, match="LookupError: no"):
        executor.submit(add, 1).result(10)
    with pytest.raises(InitializerFailed):
        executor.submit(add, 1)
    with pytest.raises(InitializerFailed):
        client.pool(initializer=fail).map(add, [1])
    with pytest.raises(TypeError, match="callable"):
        client.get_executor(initializer=3)


def test_the_function_goes_once_and_short_calls_are_cut_in_few(
    client: Client, broker: FakeBroker
) -> None:
    pool = client.pool()
    likelihood = Likelihood(20_000)
    for _ in range(3):
        assert pool.map(likelihood.method, np.arange(40.0)) == [float(x) for x in range(40)]
    submits = broker.seen["Submit"]
    assert sum(len(submit.functions) for submit in submits) == 1
    n_tasks = [len(submit.ids) for submit in submits]
    assert n_tasks == [8, 2, 2]  # at first nothing is known of its time


def test_map_sync(client: Client) -> None:
    assert client.map_sync(add, range(10)) == list(range(1, 11))
    assert client.map_sync(add, range(10), range(10), chunksize=3) == list(range(0, 20, 2))


def test_executor_map_with_a_buffer(client: Client, broker: FakeBroker) -> None:
    executor = client.get_executor()
    taken: list[int] = []

    def items() -> Any:
        for n in itertools.count():
            taken.append(n)
            yield n

    values = executor.map(add, items(), buffersize=3)
    assert len(taken) == 3
    assert [next(values) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert len(taken) == 8
    values.close()  # type: ignore[attr-defined]
    assert list(executor.map(add, range(10), buffersize=2, chunksize=3)) == list(range(1, 11))
    with pytest.raises(ValueError, match="buffersize"):
        executor.map(add, [1], buffersize=0)
    with pytest.raises(TypeError, match="buffersize"):
        executor.map(add, [1], buffersize="1")
