"""submit, map, keys and arguments, against a small broker."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.client_broker import FakeBroker
from zfabric.client import Client
from zfabric.core.submitter import PENDING


def add(a: Any, b: Any = 1) -> Any:
    return a + b


def total(nested: dict[str, Any]) -> int:
    return sum(nested["some"]) + nested["more"][0]


def fail(text: str) -> None:
    raise LookupError(text)


def test_submit_gives_the_value(client: Client) -> None:
    future = client.submit(pow, 2, 10)
    assert future.result(10) == 1024
    assert future.result() == 1024 and future.done() and future.status == "finished"
    assert future.exception() is None and not future.cancelled()


def test_all_keywords_but_the_options_are_the_functions_own(client: Client) -> None:
    assert client.submit(dict, fn=1, self=2).result(10) == {"fn": 1, "self": 2}


def test_lambdas_and_closures_travel(client: Client) -> None:
    factor = 3
    assert client.submit(lambda x: x * factor, 4).result(10) == 12


def test_futures_among_the_arguments_become_their_values(client: Client) -> None:
    one, two = client.submit(add, 0), client.submit(add, 1)
    assert client.submit(add, one, b=two).result(10) == 3
    assert client.submit(total, {"some": [one, two], "more": (two,)}).result(10) == 5


def test_the_error_of_a_dependency_reaches_the_dependents(client: Client) -> None:
    with pytest.raises(LookupError, match="gone"):
        client.submit(add, client.submit(fail, "gone")).result(10)


def test_a_failed_task_raises_its_own_type_anew_each_time(client: Client) -> None:
    future = client.submit(fail, "nothing here")
    with pytest.raises(LookupError, match="nothing here") as first:
        future.result(10)
    with pytest.raises(LookupError) as second:
        future.result(10)
    assert first.value is not second.value
    assert isinstance(future.exception(), LookupError)
    assert "in fail" in (future.traceback() or "")
    assert future.status == "error"


def test_map_rows(client: Client) -> None:
    assert client.gather(client.map(add, range(5000), range(5000))) == [2 * n for n in range(5000)]
    assert client.gather(client.map(add, [1, 2], b=10)) == [11, 12]
    assert client.map(add, []) == []


def test_map_with_futures_and_large_rows_among_small_ones(client: Client) -> None:
    middle = client.submit(add, 1)
    rows = [1, middle, "x" * 3000, b"y" * 3000]
    assert client.gather(client.map(id_of, rows)) == [1, 2, "x" * 3000, b"y" * 3000]


def id_of(x: Any) -> Any:
    return x


def test_options_travel(client: Client, broker: FakeBroker) -> None:
    client.submit(
        add, 1, retries=2, priority=5, resources={"GPU": 1}, workers=["a"], key="k"
    ).result(10)
    ((row, options),) = broker.seen["Submit"][-1].options
    assert row == 0
    assert (options.retries, options.priority, options.workers) == (2, 5, ("a",))
    assert options.resources == {"GPU": 1.0} and options.key == "k"


def test_one_key_one_future_while_it_lives(client: Client, broker: FakeBroker) -> None:
    first = client.submit(add, 1, key="mine")
    assert client.submit(add, 1, key="mine") is first
    assert first.key == "mine" and "mine" in repr(first)
    assert first.result(10) == 2 and broker.n_run == 1
    del first
    gc.collect()
    assert client.submit(add, 1, key="mine").result(10) == 2
    assert broker.n_run == 2


def test_equal_pure_calls_share_a_future(client: Client) -> None:
    one = client.submit(add, 1, b=2, pure=True)
    assert client.submit(add, 1, b=2, pure=True) is one
    assert client.submit(add, 2, b=2, pure=True) is not one
    assert client.submit(add, 1, b=2) is not one
    assert client.map(add, [7, 7], pure=True)[0] is client.submit(add, 7, pure=True)


def test_map_keys(client: Client) -> None:
    assert [f.key for f in client.map(add, [1, 2], key="part")] == ["part-0", "part-1"]
    assert [f.key for f in client.map(add, [1, 2], key=["a", "b"])] == ["a", "b"]
    assert client.submit(add, 1).key.startswith("add-")


def test_a_dropped_future_is_released(
    client: Client, broker: FakeBroker, wait_until: Callable[..., Any]
) -> None:
    future = client.submit(add, 1)
    future.result(10)
    task = future.task_id
    del future
    wait_until(lambda: task in broker.released)
    assert client._submitter.outcomes == {}


def test_the_value_of_a_dropped_future_goes_at_once(client: Client) -> None:
    class Thing:
        pass

    future = client.submit(Thing)
    thing = weakref.ref(future.result(10))
    assert thing() is future.result()
    del future
    assert thing() is None


def test_release_at_once(
    client: Client, broker: FakeBroker, wait_until: Callable[..., Any]
) -> None:
    broker.hold = True
    future = client.submit(add, 1)
    future.release()
    wait_until(lambda: future.task_id in broker.released)
    wait_until(lambda: future.status == "cancelled")


def test_cancel(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    future = client.submit(add, 1)
    assert future.cancel() and future.cancelled() and future.status == "cancelled"
    done = client.submit(add, 1)
    broker.hold = False
    assert done.result(10) == 2
    assert not done.cancel() and done.result() == 2


def test_cancel_many(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    futures = client.map(add, range(100))
    client.cancel({"some": futures[:50], "rest": futures[50:]})
    assert all(f.cancelled() for f in futures)
    assert len(broker.seen.get("Cancel", [])) <= 1


def test_retry(client: Client, broker: FakeBroker, tmp_path: Any) -> None:
    flag = tmp_path / "flag"

    def once() -> str:
        if not flag.exists():
            flag.touch()
            raise OSError("the first time")
        return "fine"

    future = client.submit(once)
    with pytest.raises(OSError, match="first"):
        future.result(10)
    future.retry()
    assert future.result(10) == "fine"


def test_lazy_map_over_an_endless_iterator(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    lazy = client.map(add, itertools.count(), max_inflight=10)
    taken = [next(lazy) for _ in range(10)]
    assert len(client._submitter.outcomes) == 10
    broker.hold = False
    broker.stir()
    assert [f.result(10) for f in taken] == list(range(1, 11))
    assert [next(lazy).result(10) for _ in range(25)] == list(range(11, 36))
    assert sum(o.status == PENDING for o in client._submitter.outcomes.values()) <= 10


def test_lazy_map_that_ends(client: Client) -> None:
    lazy = client.map(add, range(30), max_inflight=4)
    assert client.gather(lazy) == list(range(1, 31))


def test_lazy_map_goes_on_when_taken_futures_are_dropped(
    client: Client, broker: FakeBroker
) -> None:
    broker.hold = True
    lazy = client.map(add, range(6), max_inflight=2)
    n_taken = 0
    for future in lazy:
        n_taken += 1
        del future
    assert n_taken == 6


def test_many_threads_share_a_client(client: Client) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def work(start: int) -> list[int]:
        return [client.submit(add, start, n).result(30) for n in range(50)]

    with ThreadPoolExecutor(8) as pool:
        for start, values in enumerate(pool.map(work, range(8))):
            assert values == [start + n for n in range(50)]


def test_two_clients_of_one_broker(client: Client, broker: FakeBroker) -> None:
    with Client(broker.address) as other:
        mine, theirs = client.map(add, range(100)), other.map(add, range(100), range(100))
        assert client.gather(mine) == list(range(1, 101))
        assert other.gather(theirs) == list(range(0, 200, 2))
    assert client.submit(add, 1).result(10) == 2


def test_a_medium_array_travels_and_is_writable(client: Client) -> None:
    numpy = pytest.importorskip("numpy")
    data = numpy.arange(4000, dtype="u1")
    back = client.submit(id_of, data).result(10)
    assert (back == data).all() and back.flags.writeable


def test_fire_and_forget_keeps_a_task(
    client: Client, broker: FakeBroker, wait_until: Callable[..., Any]
) -> None:
    import zfabric

    broker.hold = True
    zfabric.fire_and_forget(client.submit(add, 1))
    gc.collect()
    broker.hold = False
    broker.stir()
    wait_until(lambda: broker.n_run == 1)
    wait_until(lambda: not client._kept)
    wait_until(lambda: broker.released)
