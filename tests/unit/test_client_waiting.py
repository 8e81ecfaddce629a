"""result, wait, gather, as_completed, await, callbacks, progress."""

from __future__ import annotations

import asyncio
import io
import itertools
import signal
import threading
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.client_broker import FakeBroker
from zfabric.client import Client, as_completed, progress, wait
from zfabric.errors import ResultTimeout, TaskCancelled


def add(a: Any, b: Any = 1) -> Any:
    return a + b


def fail() -> None:
    raise LookupError("no")


def release(broker: FakeBroker) -> None:
    broker.hold = False
    broker.stir()


def test_result_times_out_and_the_task_goes_on(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    future = client.submit(add, 1)
    with pytest.raises(TimeoutError, match="goes on"):
        future.result(0.01)
    with pytest.raises(ResultTimeout):
        future.exception(timeout=0)
    assert future._outcome.waiters is None
    release(broker)
    assert future.result(10) == 2


def test_a_waiting_thread_is_woken(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    future = client.submit(add, 1)
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(future.result(10))) for _ in range(4)]
    for thread in threads:
        thread.start()
    release(broker)
    for thread in threads:
        thread.join(10)
    assert got == [2] * 4


def test_ctrl_c_in_result_leaves_the_client_usable(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    future = client.submit(add, 1)
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        future.result(10)
    assert future._outcome.waiters is None
    release(broker)
    assert future.result(10) == 2 and client.submit(add, 2).result(10) == 3


def test_missing_workers_are_told_but_while_a_broker_waits_for_its_own(
    client: Client, broker: FakeBroker
) -> None:
    broker.workers.clear()
    broker.settling = True
    client._warn_without_workers()  # warnings are errors
    broker.settling = False
    client._warned_at = -1e9
    with pytest.warns(UserWarning, match="no workers are connected"):
        client._warn_without_workers()


def test_wait_for_all_and_for_the_first(client: Client, broker: FakeBroker) -> None:
    done, not_done = wait(client.map(add, range(10)))
    assert len(done) == 10 and not not_done
    broker.hold = True
    held = client.submit(add, 1)
    ready = next(iter(done))
    result = wait([held, ready], return_when="FIRST_COMPLETED")
    assert result.done == {ready} and result.not_done == {held}
    assert wait([held], timeout=0.01).not_done == {held}
    assert wait([held], timeout=0.01, return_when="FIRST_COMPLETED").not_done == {held}
    assert held._outcome.waiters is None
    assert wait([]) == (set(), set())
    threading.Timer(0.02, release, (broker,)).start()
    assert wait([held], 10, "FIRST_COMPLETED").done == {held}


def test_wait_for_the_first_exception(client: Client, broker: FakeBroker) -> None:
    futures = [client.submit(add, 1), client.submit(fail)]
    assert futures[1] in wait(futures, 10, "FIRST_EXCEPTION").done
    assert wait(futures[:1], 10, "FIRST_EXCEPTION").done == {futures[0]}


def test_gather_keeps_the_nesting(client: Client) -> None:
    one, two = client.submit(add, 0), client.submit(add, 1)
    Pair = namedtuple("Pair", "left right")
    nested = {"a": [one, (two, 7)], "b": {one}, "c": Pair(one, "text"), "d": None}
    assert client.gather(nested) == {"a": [1, (2, 7)], "b": {1}, "c": Pair(1, "text"), "d": None}
    assert client.gather(one) == 1
    assert client.gather(f for f in (one, two)) == [1, 2]
    assert client.gather([]) == []
    assert client.gather([one, one]) == [1, 1]


def test_gather_with_errors(client: Client) -> None:
    futures = [client.submit(add, 0), client.submit(fail), client.submit(add, 1)]
    with pytest.raises(LookupError):
        client.gather(futures)
    assert client.gather(futures, errors="skip") == [1, 2]
    assert client.gather({"x": futures[1], "y": (futures[1], futures[2])}, errors="skip") == {
        "y": (2,)
    }


def test_the_loop_of_2017(client: Client) -> None:
    ac = as_completed(client.map(add, range(20)))
    seen = []
    for future in ac:
        value = future.result()
        seen.append(value)
        if value < 40:
            ac.add(client.submit(add, value, 20))
    assert sorted(seen) == list(range(1, 60))
    assert ac.count() == 0 and ac.is_empty()


def test_as_completed_gives_what_ends_first(client: Client, broker: FakeBroker) -> None:
    quick = client.submit(add, 0)
    quick.result(10)
    broker.hold = True
    slow = client.submit(add, 1)
    ac = as_completed([slow, quick])
    assert ac.count() == 2 and ac.has_ready()
    assert next(ac) is quick and not ac.has_ready()
    threading.Timer(0.02, release, (broker,)).start()
    assert next(ac) is slow
    with pytest.raises(StopIteration):
        next(ac)


def test_as_completed_with_results_and_errors(client: Client) -> None:
    futures = [client.submit(add, 1), client.submit(fail)]
    found = dict(as_completed(futures, with_results=True, raise_errors=False))
    assert found[futures[0]] == 2 and isinstance(found[futures[1]], LookupError)
    with pytest.raises(LookupError):
        list(as_completed(futures, with_results=True))


def test_as_completed_batches(client: Client, broker: FakeBroker) -> None:
    futures = client.map(add, range(100))
    wait(futures)
    (batch,) = as_completed(futures).batches()
    assert len(batch) == 100
    ac = as_completed(futures[:3])
    ac.update([futures[3]])
    assert len(ac.next_batch()) == 4 and ac.next_batch() == []
    assert ac.next_batch(block=False) == []


def test_the_same_future_twice_comes_twice(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    future = client.submit(add, 1)
    ac = as_completed([future, future])
    assert ac.count() == 2
    release(broker)
    assert list(ac) == [future, future]


def test_as_completed_times_out(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    with pytest.raises(ResultTimeout, match="1 task"):
        next(as_completed([client.submit(add, 1)], timeout=0.01))


def test_as_completed_over_a_lazy_map(client: Client) -> None:
    lazy = client.map(add, itertools.count(), max_inflight=5)
    seen = []
    for future in as_completed(lazy):
        seen.append(future.result())
        if len(seen) == 50:
            break
    assert len(set(seen)) == 50 and max(seen) <= 60
    finite = client.map(add, range(12), max_inflight=5)
    assert sorted(f.result() for f in as_completed(finite)) == list(range(1, 13))


def test_clear_forgets(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    future = client.submit(add, 1)
    ac = as_completed([future])
    ac.clear()
    assert list(ac) == [] and future._outcome.waiters is None


def test_a_dropped_as_completed_keeps_no_future(
    client: Client, broker: FakeBroker, wait_until: Callable[..., Any]
) -> None:
    broker.hold = True
    ac = as_completed(client.map(add, range(3)))
    del ac
    wait_until(lambda: len(broker.released) == 3)


def test_await(client: Client, broker: FakeBroker) -> None:
    async def main() -> tuple[Any, ...]:
        broker.hold = True
        future = client.submit(add, 1)
        asyncio.get_running_loop().call_later(0.02, release, broker)
        first = await future
        values = await asyncio.gather(*client.map(add, range(50)))
        with pytest.raises(LookupError):
            await client.submit(fail)
        found = [f.result() async for f in as_completed(client.map(add, range(10)))]
        pairs = [pair async for pair in as_completed(client.map(add, range(3)), with_results=True)]
        return first, values, sorted(found), sorted(value for _, value in pairs)

    first, values, found, pairs = asyncio.run(main())
    assert first == 2 and list(values) == list(range(1, 51))
    assert found == list(range(1, 11)) and pairs == [1, 2, 3]


def test_a_cancelled_await_leaves_nothing(client: Client, broker: FakeBroker) -> None:
    broker.hold = True
    future = client.submit(add, 1)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.ensure_future(waits(future)), 0.01)

    async def waits(future: Any) -> Any:
        return await future

    asyncio.run(main())
    assert future._outcome.waiters is None
    release(broker)
    assert future.result(10) == 2


def test_async_with(broker: FakeBroker) -> None:
    async def main() -> int:
        async with Client(broker.address) as client:
            return await client.submit(add, 1)

    assert asyncio.run(main()) == 2


def test_callbacks_run_in_a_helper_thread(
    client: Client, caplog: pytest.LogCaptureFixture, wait_until: Callable[..., Any]
) -> None:
    seen: list[tuple[str, Any]] = []

    def note(future: Any) -> None:
        seen.append((threading.current_thread().name, future.result()))

    def bad(_: Any) -> None:
        raise RuntimeError("of the user")

    client.submit(add, 1).add_done_callback(bad)
    client.submit(add, 1).add_done_callback(note)  # nobody else holds this one
    done = client.submit(add, 2)
    done.result(10)
    done.add_done_callback(note)
    wait_until(lambda: len(seen) == 2)
    assert sorted(seen) == [("zfabric-callbacks", 2), ("zfabric-callbacks", 3)]
    assert "of the user" in caplog.text


def test_who_waits_while_the_client_closes_is_woken(broker: FakeBroker) -> None:
    broker.hold = True
    client = Client(broker.address)
    future = client.submit(add, 1)
    threading.Timer(0.02, client.close).start()
    with pytest.raises(TaskCancelled, match="closed"):
        future.result(10)


def test_progress_in_a_pipe_and_in_a_terminal(client: Client) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    futures = [*client.map(add, range(10)), client.submit(fail)]
    wait(futures)
    piped, terminal = io.StringIO(), Terminal()
    progress(futures, file=piped)
    assert piped.getvalue().count("\n") == 1
    assert "100% 11/11" in piped.getvalue() and "1 failed" in piped.getvalue()
    progress({"all": futures}, file=terminal)
    assert terminal.getvalue().startswith("\r[####")
    assert progress([], file=piped) is None
