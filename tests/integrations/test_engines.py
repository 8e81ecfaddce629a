"""What users see of a client, the same on a fabric and on a cluster of dask.distributed."""

from __future__ import annotations

import io
import os
import socket
import threading
import time

import pytest

distributed = pytest.importorskip("distributed")

import zfabric  # noqa: E402
import zfabric.distributed  # noqa: E402
from zfabric.errors import (  # noqa: E402
    ClientClosed,
    ConfigError,
    ConnectFailed,
    ResultTimeout,
    TaskCancelled,
    TaskLost,
    UsageError,
)

# What Dask and Tornado leave to the garbage collector at the end of a loop is not ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module", params=["fabric", "dask", "dask+zmq"])
def client(request):
    if request.param == "fabric":
        with zfabric.Client(n_workers=2, slots=1, set_as_default=False) as made:
            yield made
        return
    protocol = "zmq" if request.param == "dask+zmq" else "tcp"
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=False,
        protocol=f"{protocol}://",
        dashboard_address=":0",
        silence_logs=50,
    ) as cluster:
        place = cluster.scheduler_address.partition("://")[2]
        with zfabric.Client(f"{request.param}://{place}", set_as_default=False) as made:
            yield made


def inc(x):
    return x + 1


def fail(text):
    raise LookupError(text)


def test_it_is_a_client(client) -> None:
    assert isinstance(client, zfabric.Client)
    assert zfabric.get_client() is client


def test_submit_and_result(client) -> None:
    future = client.submit(pow, 2, 10)
    assert isinstance(future, zfabric.Future)
    assert future.result(timeout=30) == 1024
    assert future.done() and future.status == "finished" and future.exception() is None
    assert client.submit(int, "ff", base=16).result() == 255


def test_map_and_gather(client) -> None:
    futures = client.map(pow, range(20), [2] * 20)
    assert client.gather(futures) == [n * n for n in range(20)]
    nested = {"a": futures[2], "b": [futures[3], (futures[4], "text")]}
    assert client.gather(nested) == {"a": 4, "b": [9, (16, "text")]}


def test_dependencies_in_arguments(client) -> None:
    a = client.submit(inc, 1)
    b = client.submit(inc, a)
    assert client.submit(sum, [a, b]).result() == 5
    assert client.submit(dict, {"x": a}, y=b).result() == {"x": 2, "y": 3}


def test_exceptions_have_their_type_and_their_traceback(client) -> None:
    future = client.submit(fail, "not here")
    with pytest.raises(LookupError, match="not here"):
        future.result(timeout=30)
    assert future.status == "error"
    assert isinstance(future.exception(), LookupError)
    assert "in fail" in future.traceback()
    with pytest.raises(LookupError):
        client.submit(inc, future).result()
    good = client.submit(inc, 1)
    assert client.gather([good, future], errors="skip") == [2]
    with pytest.raises(LookupError):
        client.gather([good, future])


def test_scatter(client) -> None:
    assert client.scatter(5).result() == 5
    many = client.scatter([1, 2, 3])
    assert client.gather(client.map(inc, many)) == [2, 3, 4]
    assert client.gather(client.scatter({"x": 1, "y": [2]})) == {"x": 1, "y": [2]}
    assert client.scatter((7,), broadcast=True)[0].result() == 7


def test_as_completed_and_wait(client) -> None:
    futures = client.map(inc, range(10))
    assert {f.result() for f in zfabric.as_completed(futures)} == set(range(1, 11))
    values = [v for _, v in zfabric.as_completed(client.map(inc, range(5)), with_results=True)]
    assert sorted(values) == [1, 2, 3, 4, 5]
    done, not_done = zfabric.wait(futures, timeout=30)
    assert done == set(futures) and not not_done
    first = zfabric.wait([client.submit(inc, 1)], return_when="FIRST_COMPLETED")
    assert len(first.done) == 1


def test_timeouts_and_cancel(client) -> None:
    from time import sleep

    busy = client.map(sleep, [0.5, 0.5], pure=False)
    queued = client.submit(sleep, 30)
    with pytest.raises(ResultTimeout):
        queued.result(timeout=0.01)
    client.cancel(queued)
    with pytest.raises(TaskCancelled):
        queued.result(timeout=30)
    assert queued.cancelled() and queued.status == "cancelled"
    client.gather(busy)


def test_retry(client, tmp_path) -> None:
    flag = str(tmp_path / "flag")
    future = client.submit(os.stat, flag)
    with pytest.raises(FileNotFoundError):
        future.result(timeout=30)
    (tmp_path / "flag").touch()
    future.retry()
    assert future.result(timeout=30).st_size == 0


def test_callbacks(client) -> None:
    called, seen = threading.Event(), []
    client.submit(inc, 1).add_done_callback(lambda f: (seen.append(f.result()), called.set()))
    assert called.wait(30) and seen == [2]


def test_pure_calls_and_keys(client) -> None:
    named = client.submit(inc, 1, key="my-key-1")
    assert named.key == "my-key-1" and named.result() == 2
    assert client.submit(inc, 5, pure=True).result() == client.submit(inc, 5, pure=True).result()


def test_workers(client) -> None:
    client.wait_for_workers(2, timeout=30)
    names = client.workers()
    assert len(names) == 2
    assert set(client.run(os.getpid)) == set(names)
    assert client.submit(inc, 1, workers=names[0]).result() == 2
    assert len(client.info()["workers"]) == 2


def test_await(client) -> None:
    import asyncio

    async def ask():
        return await client.submit(inc, 41)

    assert asyncio.run(ask()) == 42


def test_collections(client) -> None:
    da = pytest.importorskip("dask.array")
    x = client.persist(da.ones((100, 100), chunks=50) + 1)
    assert isinstance(x, da.Array)
    assert float(client.compute(x.sum()).result()) == 20_000.0
    with client.as_dask_scheduler():
        assert float(x.sum().compute()) == 20_000.0


def test_what_a_persisted_collection_stands_on_can_be_waited_for(client) -> None:
    da = pytest.importorskip("dask.array")
    x = client.persist(da.ones((100, 100), chunks=50) + 1)
    assert len(zfabric.wait(x).done) == 4
    assert len(list(zfabric.as_completed([x]))) == 4
    shown = io.StringIO()
    zfabric.progress(x, file=shown)
    assert "4/4" in shown.getvalue()


def test_a_future_may_stand_in_what_is_delayed(client) -> None:
    dask = pytest.importorskip("dask")
    future = client.submit(inc, 1)
    with client.as_dask_scheduler():
        assert dask.delayed(inc)(future).compute() == 3
        assert dask.delayed(sum)([future, future, 3]).compute() == 7
    assert client.compute(dask.delayed(inc)(future)).result() == 3


def test_a_future_of_another_client_is_refused(client) -> None:
    with zfabric.Client(n_workers=1, slots=1, set_as_default=False) as other:
        with pytest.raises(UsageError, match="future of another client"):
            client.submit(inc, other.submit(inc, 1))


def test_compute_and_get_give_values_or_futures(client) -> None:
    da = pytest.importorskip("dask.array")
    x = da.ones((100, 100), chunks=50)
    assert float(client.compute(x.sum(), sync=True)) == 10_000.0
    total, five = client.compute([x.sum(), 5])
    assert float(total.result()) == 10_000.0 and five == 5
    graph = {"a": 1, "b": (inc, "a")}
    (b,) = client.get(graph, ["b"], sync=False)
    assert isinstance(b, zfabric.Future) and b.result() == 2
    assert list(client.get(graph, ["b"])) == [2]


def test_what_dask_cannot_serve_is_refused_by_name(client) -> None:
    if type(client) is zfabric.Client:
        pytest.skip("a fabric serves all of it")
    from zfabric.integrations.distributed.engine import REFUSED

    for verb in REFUSED:
        with pytest.raises(UsageError, match=f"{verb}.. does not exist on a Dask cluster"):
            getattr(client, verb)()
    with pytest.raises(UsageError, match="idempotent= is an option"):
        client.submit(inc, 1, idempotent=True)
    with pytest.raises(UsageError, match=r"distributed\.Lock"):
        zfabric.Lock("mine", client).acquire()


def test_after_close(client) -> None:
    if type(client) is zfabric.Client:
        pytest.skip("tests/e2e/ has it for the fabric")
    other = zfabric.Client(client.address, set_as_default=False)
    other.close()
    other.close()
    with pytest.raises(ClientClosed):
        other.submit(inc, 1)
    with pytest.raises(ClientClosed):
        other.get({"a": 1}, ["a"])
    with pytest.raises(ClientClosed):
        other.wait_for_workers(1)


def test_a_dask_cluster_that_goes_away_is_said_to_be_gone() -> None:
    cluster = distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp://",
        dashboard_address=":0", silence_logs=50,
    )  # fmt: skip
    place = cluster.scheduler_address.partition("://")[2]
    with zfabric.Client(f"dask://{place}", set_as_default=False) as client:
        future = client.submit(time.sleep, 3)
        cluster.close()
        with pytest.raises(TaskLost, match="is gone"):
            future.result(30)


def test_whoever_listens_there_and_says_nothing_is_no_scheduler() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ConnectFailed, match="no Dask scheduler answers"):
            zfabric.Client(f"dask://127.0.0.1:{port}", timeout=0.5)


def test_nobody_answers(free_port) -> None:
    with pytest.raises(ConnectFailed, match="no Dask scheduler answers"):
        zfabric.Client(f"dask://127.0.0.1:{free_port}", timeout=0.3)


@pytest.mark.parametrize("place", ["", "bad", "bad:", ":8786", "bad:xyz", "bad:0", "bad:99999"])
def test_an_address_without_a_place(place: str) -> None:
    with pytest.raises(ConfigError, match="dask://host:port"):
        zfabric.Client(f"dask://{place}")
