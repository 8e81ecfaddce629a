"""The client on real brokers and workers."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zfabric
from zfabric.errors import (
    KilledTask,
    NoWorkerFits,
    TaskError,
    Unserialisable,
)
from zfabric.launch.local import LocalFabric


def add(a: Any, b: Any = 1) -> Any:
    return a + b


def fail(text: str) -> None:
    raise LookupError(text)


def identity(x: Any) -> Any:
    return x


def nested_sum(depth: int) -> int:
    """A tree of tasks whose inner nodes wait for their children inside a task."""
    if depth == 0:
        return 1
    client = zfabric.get_client()
    return sum(client.gather([client.submit(nested_sum, depth - 1) for _ in range(2)]))


@pytest.fixture(scope="module", params=["process", "thread"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def client(kind: str) -> Iterator[zfabric.Client]:
    with zfabric.Client(slots=2, kind=kind) as opened:
        yield opened


def test_the_whole_way(client: zfabric.Client) -> None:
    assert client.submit(pow, 2, 10).result(20) == 1024
    assert client.gather(client.map(add, range(3000))) == list(range(1, 3001))
    future = client.submit(add, 0)
    for _ in range(200):
        future = client.submit(add, future)
    assert future.result(20) == 201
    assert client.submit(sum, [client.submit(add, n) for n in range(4)]).result(20) == 10
    with pytest.raises(LookupError, match="of the task") as caught:
        client.submit(fail, "of the task").result(20)
    assert "test_client_fabric.py" in str(caught.value.__cause__)


def test_the_loop_of_2017(client: zfabric.Client) -> None:
    ac = zfabric.as_completed(client.map(add, range(20)))
    seen = []
    for future in ac:
        seen.append(future.result())
        if seen[-1] < 100:
            ac.add(client.submit(add, future, 50))
    assert len(seen) > 40 and min(seen) == 1


def test_large_values_go_directly(client: zfabric.Client) -> None:
    numpy = pytest.importorskip("numpy")
    data = numpy.arange(1_000_000.0)
    doubled = client.submit(numpy.multiply, data, 2)
    assert (client.submit(numpy.subtract, doubled, data).result(30) == data).all()
    back = doubled.result(30)
    assert (back == 2 * data).all() and back.flags.writeable
    assert doubled.result() is back
    fetched = client.gather([client.submit(numpy.full, 50_000, n) for n in range(10)])
    assert [int(a[0]) for a in fetched] == list(range(10))
    assert client.gather(client.map(len, [b"x" * 200_000, b"y" * 300_000])) == [200_000, 300_000]


def test_scatter(client: zfabric.Client) -> None:
    numpy = pytest.importorskip("numpy")
    data = numpy.ones(300_000)
    futures = client.scatter({"large": data, "small": 7})
    assert client.submit(numpy.sum, futures["large"]).result(30) == 300_000
    assert client.gather(futures)["small"] == 7
    one, two = client.scatter([data, "text"], broadcast=True)
    assert client.submit(len, two).result(30) == 4 and one.result(30).shape == data.shape
    assert client.scatter(5).result(30) == 5


def test_one_large_object_in_many_rows_travels_once(
    client: zfabric.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    numpy = pytest.importorskip("numpy")
    put: list[int] = []
    plain = client._values._put_group

    def counted(items: Any, *options: Any) -> Any:
        put.extend(sum(map(len, frames)) for frames in items)
        return plain(items, *options)

    monkeypatch.setattr(client._values, "_put_group", counted)
    data = numpy.arange(100_000)

    def at(array: Any, number: int, other: Any = None) -> tuple[int, bool]:
        return int(array[number]), other is None or other is array

    found = client.gather(client.map(at, [data] * 100, range(100)))
    assert found == [(n, True) for n in range(100)]
    assert len(put) == 1 and put[0] > data.nbytes
    # In other shapes: with something large of each row's own, twice in a row, as keywords.
    put.clear()
    own = [numpy.full(20_000, n) for n in range(5)]
    assert client.gather(client.map(at, [data] * 5, range(5), own)) == [
        (n, False) for n in range(5)
    ]
    assert client.gather(client.map(at, [data] * 5, range(5), [data] * 5)) == found[:5]
    assert sum(put) < 3 * data.nbytes + 5 * own[0].nbytes
    # What a generator yields may change from one to the next.
    put.clear()
    pairs = ((n, data) for n in range(100))
    assert client.gather(
        client.map(lambda pair, array: int(array[pair]), *zip(*pairs, strict=True))
    )
    assert len(put) == 1
    assert client.gather(client.map(at, (data for _ in range(100)), range(100))) == found
    assert len(put) == 3


def test_a_large_function_travels_as_a_value(client: zfabric.Client) -> None:
    table = os.urandom(2_000_000)

    def look_up(n: int) -> int:
        return table[n]

    with pytest.warns(UserWarning, match=r"table \(2 MB\)"):
        first = client.submit(look_up, 3)
    assert first.result(30) == table[3]
    assert client.gather(client.map(look_up, range(20))) == list(table[:20])


def test_tasks_submit_tasks_and_wait(client: zfabric.Client) -> None:
    """Parents fill every slot and wait: their children have to run all the same."""
    assert client.gather([client.submit(nested_sum, 2) for _ in range(4)]) == [4] * 4


def test_coroutine_functions_run_as_tasks(client: zfabric.Client) -> None:
    async def soon(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    assert client.submit(soon, 1).result(20) == 2


def test_misuse_is_told(client: zfabric.Client) -> None:
    with pytest.raises(NoWorkerFits, match=r"^add-\d{1,5} asks for .*GPU"):
        client.submit(add, 1, resources={"GPU": 1}).result(20)
    with pytest.raises(NoWorkerFits, match="nobody"):
        client.submit(add, 1, workers="nobody").result(20)
    with pytest.raises(Unserialisable, match=r"args\[0\]"):
        client.submit(add, threading.Lock())
    with pytest.raises(Unserialisable):
        client.submit(threading.Lock).result(20)


def test_retry_and_retries(client: zfabric.Client, tmp_path: Path) -> None:
    def until(path: Path, n: int) -> int:
        seen = len(list(path.iterdir()))
        (path / str(seen)).touch()
        if seen < n:
            raise OSError(f"try {seen}")
        return seen

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert client.submit(until, tmp_path / "a", 2, retries=2).result(20) == 2
    future = client.submit(until, tmp_path / "b", 1)
    with pytest.raises(OSError, match="try 0"):
        future.result(20)
    future.retry()
    assert future.result(20) == 1


def test_lazy_map(client: zfabric.Client) -> None:
    lazy = client.map(add, itertools.count(), max_inflight=20)
    seen = [f.result() for f in itertools.islice(zfabric.as_completed(lazy), 300)]
    assert len(set(seen)) == 300 and max(seen) <= 340


def test_await_and_executor(client: zfabric.Client) -> None:
    async def main() -> list[int]:
        return list(await asyncio.gather(*client.map(add, range(20))))

    assert asyncio.run(main()) == list(range(1, 21))
    with client.get_executor() as executor:
        assert list(executor.map(add, range(100), chunksize=7)) == list(range(1, 101))
        assert executor.submit(add, 1).result(20) == 2


def pass_gate(here: str, gate: str) -> str:
    """Say that it runs, and wait until it may end."""
    Path(here).touch()
    while not os.path.exists(gate):
        time.sleep(0.01)
    return "passed"


def test_an_executor_that_shuts_down_lets_running_calls_end(
    tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    here, gate = tmp_path / "here", tmp_path / "gate"
    # A fabric of its own, as one that has run short tasks sends many rows ahead.
    with zfabric.Client(slots=1, kind="thread") as client:
        executor = client.get_executor()
        running = executor.submit(pass_gate, str(here), str(gate))
        wait_until(here.exists)
        others = [executor.submit(pass_gate, str(here), str(gate)) for _ in range(100)]
        executor.shutdown(wait=False, cancel_futures=True)
        wait_until(lambda: sum(f.cancelled() for f in others) > 50)
        assert not running.done()
        gate.touch()
        executor.shutdown(wait=True)
        assert running.result() == "passed" and all(f.done() for f in others)
        assert {f.result() for f in others if not f.cancelled()} <= {"passed"}


def test_info_run_and_repr(client: zfabric.Client) -> None:
    client.wait_for_workers(1, timeout=20)
    (worker,) = client.info()["workers"]
    assert worker["slots"] == 2 and "workers=1 slots=2" in repr(client)
    pids = client.run(os.getpid)
    assert list(pids) == [worker["name"]]


def test_two_clients_on_one_broker(client: zfabric.Client) -> None:
    with zfabric.Client(client.address) as other:
        mine, theirs = client.map(add, range(500)), other.map(add, range(500), range(500))
        assert client.gather(mine) == list(range(1, 501))
        assert other.gather(theirs) == list(range(0, 1000, 2))


def test_what_nobody_wants_is_freed(client: zfabric.Client, wait_until: Callable[..., Any]) -> None:
    numpy = pytest.importorskip("numpy")
    gc.collect()  # a function with large data of another test
    wait_until(lambda: client.info()["workers"][0]["values"] == 0)
    futures = client.map(numpy.zeros, [100_000] * 5)
    zfabric.wait(futures)
    wait_until(lambda: client.info()["workers"][0]["values"] >= 5)
    del futures
    wait_until(lambda: client.info()["workers"][0]["values"] == 0)
    with zfabric.Client(client.address) as other:
        kept = other.scatter([numpy.zeros(100_000)])
        wait_until(lambda: client.info()["workers"][0]["values"] == 1)
        del kept
    wait_until(lambda: client.info()["workers"][0]["values"] == 0)


def test_a_slot_that_dies() -> None:
    with zfabric.Client(slots=1) as client:
        with pytest.raises(KilledTask, match="3") as caught:
            client.submit(os._exit, 7).result(60)
        assert len(caught.value.attempts) == 3
        assert client.submit(add, 1).result(20) == 2


def test_a_value_lost_with_its_worker_is_computed_again(wait_until: Callable[..., Any]) -> None:
    numpy = pytest.importorskip("numpy")
    with LocalFabric(n_workers=2, slots=1) as fabric, zfabric.Client(fabric) as client:
        client.wait_for_workers(2, timeout=20)
        pids = client.run(os.getppid)
        name = sorted(pids)[0]
        future = client.submit(numpy.arange, 100_000)
        zfabric.wait([future])
        worker = [w for w in client.info()["workers"] if w["values"]][0]
        data = client.scatter(numpy.zeros(100_000))
        os.kill(worker["pid"], 9)
        assert int(future.result(60).sum()) == sum(range(100_000))
        try:
            assert data.result(60).shape == (100_000,)
        except TaskError as exc:
            assert "data" in str(exc)
        assert name in pids


def test_scripts_need_no_main_guard_and_leave_no_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import zfabric

            class Point:
                def __init__(self, x):
                    self.x = x

            def move(point):
                return Point(point.x + 1)

            client = zfabric.Client(slots=1)
            print(client.submit(move, Point(4)).result().x, client.info()["workers"][0]["pid"])
            kept = client.submit(lambda: 3)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stderr == "" and done.returncode == 0
    value, pid = done.stdout.split()
    assert value == "5"
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert not Path(f"/proc/{pid}").exists()


def test_the_address_from_the_environment(
    client: zfabric.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZFABRIC_ADDRESS", client.address)
    with zfabric.Client() as other:
        assert other.address == client.address and other._fabric is None
        assert other.submit(add, 1).result(20) == 2


def test_values_that_were_not_fetched_before_close_raise_rather_than_wait() -> None:
    client = zfabric.Client(slots=1, kind="thread")
    future = client.submit(bytes, 2_000_000)
    zfabric.wait([future])
    client.close()
    with pytest.raises(zfabric.ClientClosed):
        future.result()
    with pytest.raises(zfabric.ClientClosed, match="closed"):
        client.scatter([1, 2])


def test_what_is_posted_after_the_thread_has_ended_is_done_all_the_same() -> None:
    client = zfabric.Client(slots=1, kind="thread")
    client.close()
    done = threading.Event()
    client._io.post(done.set)
    assert done.is_set() and client._io.data is None
