"""The executor keeps the contract of concurrent.futures."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.client_broker import FakeBroker
from zfabric.client import Client


def add(a: Any, b: Any = 1) -> Any:
    return a + b


def keywords(**kwargs: Any) -> dict[str, Any]:
    return kwargs


def fail() -> None:
    raise LookupError("no")


def test_submit_gives_genuine_futures(client: Client) -> None:
    with client.get_executor() as executor:
        future = executor.submit(add, 1, b=4)
        assert isinstance(executor, cf.Executor) and isinstance(future, cf.Future)
        assert future.result(10) == 5
        assert executor.submit(keywords, fn=1, self=2, key=3, retries=4).result(10) == {
            "fn": 1,
            "self": 2,
            "key": 3,
            "retries": 4,
        }
        failed = executor.submit(fail)
        with pytest.raises(LookupError):
            failed.result(10)
        assert isinstance(failed.exception(), LookupError)
    assert client.submit(add, 1).result(10) == 2  # the client is still open


@pytest.mark.timeout(60)
def test_what_map_iterates_over_may_use_the_executor(client: Client) -> None:
    with client.get_executor() as executor:
        inner = executor.map(add, range(5), buffersize=2)
        assert list(executor.map(add, inner)) == list(range(2, 7))
        rows = (executor.submit(add, n).result(10) for n in range(3))
        assert list(executor.map(add, rows)) == [2, 3, 4]
        before = executor.submit(add, 1)
        assert list(executor.map(add, (before.result(10) for _ in range(2)))) == [3, 3]


def test_map_over_more_rows_than_are_submitted_at_a_time(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zfabric.client.executor.BATCH_ROWS", 3)
    with client.get_executor() as executor:
        assert list(executor.map(add, range(10))) == list(range(1, 11))


def test_map(client: Client) -> None:
    with client.get_executor() as executor:
        assert list(executor.map(add, range(10), range(10))) == list(range(0, 20, 2))
        assert list(executor.map(add, range(10), chunksize=3)) == list(range(1, 11))
        assert list(executor.map(add, [])) == []
        with pytest.raises(ValueError, match="chunksize"):
            executor.map(add, [1], chunksize=0)
        values = executor.map(pow, [2, "x"], [2, 2])
        assert next(values) == 4
        with pytest.raises(TypeError):
            next(values)


def test_map_times_out(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    values = client.get_executor().map(add, [1], timeout=0.01)
    with pytest.raises(TimeoutError):
        next(values)


def test_what_nobody_holds_runs_all_the_same(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    executor = client.get_executor()
    executor.submit(add, 1)
    executor.map(add, range(3))
    gc.collect()
    threading.Timer(0.02, let_run, (broker,)).start()
    executor.shutdown(wait=True)
    assert broker.n_run == 4


def let_run(broker: FakeBroker) -> None:
    broker.hold = False
    broker.stir()


def test_cancel(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    executor = client.get_executor()
    future = executor.submit(add, 1)
    called: list[Any] = []
    future.add_done_callback(called.append)
    assert future.cancel() and future.cancelled() and called == [future]
    with pytest.raises(cf.CancelledError):
        future.result(1)
    assert cf.wait([future], 1).done == {future}
    let_run(broker)
    done = executor.submit(add, 1)
    assert done.result(10) == 2 and not done.cancel()


def test_shutdown(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    executor = client.get_executor()
    futures = [executor.submit(add, n) for n in range(5)]
    executor.map(add, range(5))
    executor.shutdown(wait=True, cancel_futures=True)
    assert all(future.cancelled() for future in futures)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(add, 1)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(add, [1])


def test_as_completed_and_wait_of_the_standard_library(client: Client) -> None:
    executor = client.get_executor()
    futures = [executor.submit(add, n) for n in range(50)]
    assert {f.result() for f in cf.as_completed(futures, 10)} == set(range(1, 51))
    assert not cf.wait(futures, 10).not_done


def test_values_are_not_kept(client: Client, wait_until: Callable[..., Any]) -> None:
    class Thing:
        pass

    executor = client.get_executor()
    future = executor.submit(Thing)
    seen = weakref.ref(future.result(10))
    del future
    gc.collect()
    wait_until(lambda: seen() is None)


def test_asyncio_and_max_workers(client: Client) -> None:
    executor = client.get_executor()

    async def main() -> int:
        return await asyncio.get_running_loop().run_in_executor(executor, add, 1)

    assert asyncio.run(main()) == 2
    assert executor._max_workers == 2


def test_options_apply_to_all_calls(client: Client, broker: FakeBroker) -> None:
    executor = client.get_executor(retries=3)
    list(executor.map(add, [1, 2]))
    assert [o.retries for _, o in broker.seen["Submit"][-1].options] == [3, 3]
    executor.submit(add, 1).result(10)
    assert broker.seen["Submit"][-1].options[0][1].retries == 3
