"""Dask's collections on a real fabric: the same answers as its own schedulers."""

from __future__ import annotations

import gc
import operator
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

dask = pytest.importorskip("dask")
np = pytest.importorskip("numpy")
da = pytest.importorskip("dask.array")

import zfabric  # noqa: E402


def inc(x: Any) -> Any:
    return x + 1


def refuse(x: Any) -> Any:
    raise LookupError(f"not {x}")


@pytest.fixture(scope="module")
def client() -> Iterator[zfabric.Client]:
    with zfabric.Client(slots=2) as opened:
        yield opened


def stored(client: zfabric.Client) -> int:
    """Tasks and values that the fabric knows of."""
    tasks = client.info()["tasks"]
    return sum(tasks[s] for s in ("waiting", "ready", "running", "finished", "failed", "released"))


# --- the default ------------------------------------------------------------------------------


def test_a_client_is_the_default_until_it_closes(client: zfabric.Client) -> None:
    first = dask.config.get("scheduler")
    assert first.client is client
    with zfabric.Client(client.address) as second:
        assert dask.config.get("scheduler").client is second
        with zfabric.Client(client.address, set_as_default=False):
            assert dask.config.get("scheduler").client is second
    assert dask.config.get("scheduler").client is client
    assert dask.config.get("dataframe.shuffle.method") == "tasks"
    assert dask.base.get_scheduler() is dask.config.get("scheduler")


def test_a_client_made_before_dask_is_imported() -> None:
    code = """
import sys, zfabric
client = zfabric.Client(slots=1)
assert "dask" not in sys.modules
import dask
assert dask.config.get("scheduler").client is client
assert dask.delayed(pow)(2, 10).compute() == 1024
client.close()
assert dask.config.get("scheduler", None) is None
assert dask.config.get("array.rechunk.method", None) is None
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], timeout=60, check=True)


@pytest.mark.parametrize("before", [None, "sync"])
def test_a_client_closed_within_another_configuration_is_not_the_default_again(before: Any) -> None:
    code = f"""
import dask, os, zfabric
dask.config.set(scheduler={before!r})
ran = dask.delayed(os.getpid)()
client = zfabric.Client(slots=1)
with dask.config.set(scheduler="threads"):
    client.close()
    assert dask.config.get("scheduler") == "threads"
    assert dask.config.get("array.rechunk.method", None) is None
assert ran.compute() == os.getpid()
assert dask.base.get_scheduler() is None or {before!r}
client = zfabric.Client(slots=1)
assert ran.compute() != os.getpid()
client.close()
assert ran.compute() == os.getpid()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], timeout=60, check=True)


def test_as_dask_scheduler_and_by_name(client: zfabric.Client) -> None:
    x = da.arange(20, chunks=5)
    with dask.config.set(scheduler="sync"):
        with client.as_dask_scheduler() as scheduler:
            assert dask.config.get("scheduler") is scheduler
            assert x.sum().compute() == 190
        assert dask.config.get("scheduler") == "sync"
        assert x.sum().compute(scheduler=client) == 190
        assert x.sum().compute(scheduler=client.get, num_workers=3) == 190


# --- collections ------------------------------------------------------------------------------


@pytest.mark.parametrize("optimize", [True, False])
def test_arrays(client: zfabric.Client, optimize: bool) -> None:
    x = da.from_array(np.arange(4000.0).reshape(40, 100), chunks=(10, 25))
    for result in (
        (x + x.mean(axis=0)).sum(axis=1),
        x @ x.T,
        x.rechunk((40, 5)).cumsum(axis=0),
        da.linalg.svd(x.rechunk((10, 100)))[1],
        x[::3, x[0] > 10],
        x.map_blocks(lambda block: block * 2),
    ):
        expected = result.compute(scheduler="sync")
        np.testing.assert_allclose(result.compute(optimize_graph=optimize), expected)


def test_many_small_tasks_are_few_rows(client: zfabric.Client) -> None:
    x = da.ones((1000, 1000), chunks=(20, 20))
    before = client._submitter.n_submitted
    assert (x + x.T).sum().compute() == 2e6
    assert 0 < client._submitter.n_submitted - before < 500  # of about 5900 tasks


def test_dataframes(client: zfabric.Client) -> None:
    pd = pytest.importorskip("pandas")
    dd = pytest.importorskip("dask.dataframe")
    frame = pd.DataFrame({"k": np.arange(300) % 7, "v": np.arange(300.0)})
    df = dd.from_pandas(frame, npartitions=6)
    for result in (
        df.groupby("k").v.mean(),
        df.shuffle("k").map_partitions(len).sum(),
        df.merge(df[df.v < 50], on="k").v_x.sum(),
        df.set_index("v").k.cumsum(),
    ):
        got, expected = result.compute(), result.compute(scheduler="sync")
        if hasattr(expected, "sort_index"):
            pd.testing.assert_series_equal(got.sort_index(), expected.sort_index())
        else:
            assert got == expected
    kept = df.persist()
    assert kept.v.sum().compute() == frame.v.sum()
    assert len(kept) == 300


def test_bags_and_delayed(client: zfabric.Client) -> None:
    bag = pytest.importorskip("dask.bag").from_sequence(range(100), npartitions=8)
    assert bag.map(inc).filter(lambda n: n % 3 == 0).sum().compute() == 1683
    assert dict(bag.groupby(lambda n: n % 2, shuffle="tasks").map(lambda kv: (kv[0], len(kv[1]))))
    lazy = dask.delayed(inc, pure=True)
    tree = dask.delayed(sum)([lazy(n) for n in range(10)])
    assert tree.compute() == 55
    kept = tree.persist()
    assert kept.compute() == 55


def test_a_coroutine_function(client: zfabric.Client) -> None:
    async def later(x: int) -> int:
        return x + 1

    assert dask.delayed(later)(1).compute() == 2


def test_xarray_objects(client: zfabric.Client) -> None:
    xr = pytest.importorskip("xarray")
    data = xr.Dataset({"a": (("x", "y"), np.arange(600.0).reshape(20, 30))}).chunk(x=5)
    kept = data.persist()
    assert zfabric.wait([kept]).not_done == set()
    xr.testing.assert_allclose((kept - kept.mean("x")).compute(), (data - data.mean("x")).compute())
    future = client.compute(data)
    xr.testing.assert_allclose(future.result(), data.compute(scheduler="sync"))


def test_a_mixture_keeps_its_order(client: zfabric.Client) -> None:
    x, y = da.ones(16, chunks=4).sum(), da.ones(32, chunks=4).sum()
    futures = client.compute([x, dask.delayed(inc)(1), y])
    assert client.gather(futures) == [16, 2, 32]
    kept = client.persist([x, dask.delayed(inc)(1), y])
    assert client.compute(kept, sync=True) == [16, 2, 32]
    assert client.compute([x, 5, "text"], sync=True)[1:] == [5, "text"]


@pytest.mark.parametrize("fused", [True, False])
def test_a_store_that_would_be_lost_is_refused(client: zfabric.Client, fused: bool) -> None:
    x = da.from_array(np.ones((4, 6)), chunks=(2, 6)) + 1
    with pytest.raises(zfabric.UsageError, match=r"copies of it on the workers"):
        da.store(x, np.zeros((4, 6)), optimize_graph=fused)
    lazy = da.store(x, np.zeros((4, 6)), compute=False)
    with pytest.raises(zfabric.UsageError, match=r"x\.to_zarr\(path\)"):
        lazy.compute(optimize_graph=fused)
    with pytest.raises(zfabric.UsageError, match="copies"):
        da.store(x.rechunk((4, 6)), np.zeros((4, 6)), optimize_graph=fused)


@pytest.mark.parametrize("fused", [True, False])
def test_chunks_that_share_a_block_of_a_zarr_array_are_all_written(
    client: zfabric.Client, tmp_path: Path, fused: bool
) -> None:
    """Two at a time on one block lose what one of them wrote, unless one lock keeps all apart."""
    zarr = pytest.importorskip("zarr")
    target = zarr.create_array(tmp_path / "z.zarr", shape=(100_000,), chunks=(33_000,), dtype="f8")
    da.store(da.ones(100_000, chunks=1000), target, optimize_graph=fused)
    assert target[:].sum() == 100_000


def test_a_zarr_store_in_memory_is_refused(client: zfabric.Client) -> None:
    zarr = pytest.importorskip("zarr")
    target = zarr.create_array(zarr.storage.MemoryStore(), shape=(4,), chunks=(2,), dtype="f8")
    for store in (target, {}):
        with pytest.raises(zfabric.UsageError, match="in this process's memory"):
            da.to_zarr(da.ones(4, chunks=2), store)


def test_an_open_hdf5_file_is_refused(client: zfabric.Client, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        with pytest.raises(zfabric.UsageError, match="HDF5 file that this process has open"):
            da.store(da.ones(4, chunks=2), file.create_dataset("x", shape=(4,), dtype="f8"))


def test_a_store_that_workers_can_open(client: zfabric.Client, tmp_path: Path) -> None:
    x = da.from_array(np.arange(24.0).reshape(4, 6), chunks=(2, 3))
    da.store(x, Numbered(tmp_path))
    assert sorted(float(path.name) for path in tmp_path.iterdir()) == [0.0, 3.0, 12.0, 15.0]


class Numbered:
    """Makes a file for each chunk, named by its first number."""

    shape = (4, 6)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setitem__(self, index: Any, values: Any) -> None:
        (self.folder / str(values.flat[0])).touch()


def test_p2p_says_where_it_runs(client: zfabric.Client) -> None:
    pytest.importorskip("distributed")
    dd = pytest.importorskip("dask.dataframe")
    pd = pytest.importorskip("pandas")
    df = dd.from_pandas(pd.DataFrame({"k": range(20), "v": range(20)}), npartitions=3)
    with pytest.raises(zfabric.UsageError, match="the method 'tasks'"):
        df.shuffle("k", shuffle_method="p2p").compute()
    x = da.ones((8, 8), chunks=(2, 8))
    with pytest.raises(zfabric.UsageError, match="the method 'tasks'"):
        x.rechunk((8, 2), method="p2p").compute()


def test_a_dataframe_of_futures(client: zfabric.Client) -> None:
    dd = pytest.importorskip("dask.dataframe")
    pd = pytest.importorskip("pandas")

    def part(n: int) -> Any:
        return pd.DataFrame({"k": np.arange(10) % 3, "v": np.arange(10.0) + n})

    futures = client.map(part, range(3))
    expected = pd.concat([part(n) for n in range(3)])
    for frame in (
        dd.from_delayed(futures),
        dd.from_delayed(futures, meta=part(0).iloc[:0]),
        dd.from_delayed([dask.delayed(future) for future in futures]),
    ):
        pd.testing.assert_frame_equal(frame.compute(), expected)
        pd.testing.assert_series_equal(
            frame.groupby("k").v.mean().compute(), expected.groupby("k").v.mean()
        )


# --- raw graphs -------------------------------------------------------------------------------


def test_raw_graphs_and_nested_keys(client: zfabric.Client) -> None:
    graph = {
        "a": 1,
        "b": (inc, "a"),
        ("c", 0): (operator.add, "a", "b"),
        ("c", 1): (sum, ["a", "b"]),
    }
    assert client.get(graph, "b") == 2
    assert client.get(graph, ["a", ["b", [("c", 0)]], ("c", 1)]) == [1, [2, [3]], 3]
    assert client.get(graph, ("c", 0), num_workers=4, allow_other_workers=True) == 3
    futures = client.get(graph, ["a", ["b"]], sync=False)
    assert client.gather(futures) == [1, [2]]
    alias = {"x": "y", "y": "z", "z": (inc, 4)}
    assert client.get(alias, ["x", "y", "z"]) == [5, 5, 5]
    with pytest.raises(zfabric.UsageError, match="nowhere"):
        client.get({"a": (inc, 1)}, ["nowhere"])
    for circle in ({"a": (inc, "a")}, {"a": (inc, "b"), "b": (inc, "a")}):
        with pytest.raises(RuntimeError, match="Cycle"):
            client.get(circle, ["a"])


def test_errors_name_the_task(client: zfabric.Client) -> None:
    with pytest.raises(LookupError, match="not 3") as caught:
        client.get({"bad": (refuse, 3), "next": (inc, "bad")}, "next")
    assert "test_dask_collections.py" in str(caught.value.__cause__)
    assert client.get({"good": (inc, 3)}, "good") == 4


def test_annotations_reach_the_rows(client: zfabric.Client) -> None:
    with dask.annotate(workers=["no-such-worker"]):
        never = dask.delayed(inc)(1)
    future = client.compute(never, optimize_graph=False)
    story = future.why()
    assert "no-such-worker" in str(story) or story.state != "finished"
    assert not future.done()
    future.cancel()
    assert client.compute(dask.delayed(inc)(1), priority=5, retries=2).result() == 2


# --- persisting -------------------------------------------------------------------------------


def test_persisted_data_stays_and_goes(
    client: zfabric.Client, wait_until: Callable[..., Any]
) -> None:
    gc.collect()
    wait_until(lambda: stored(client) == 0)
    x = da.ones((400, 400), chunks=(100, 100)).persist()
    assert all(future.done() for future in zfabric.wait([x]).done)
    y = (x + 1).persist()
    del x
    assert y.sum().compute() == 2 * 160_000
    assert stored(client) > 0
    zfabric.progress(y)
    del y
    gc.collect()
    wait_until(lambda: stored(client) == 0)


@pytest.mark.parametrize("scheduler", ["threads", "sync", "client"])
def test_persist_is_the_same_on_each_scheduler(client: zfabric.Client, scheduler: str) -> None:
    x = da.random.default_rng(0).random((100, 10), chunks=(20, 10))
    with dask.config.set(scheduler=client if scheduler == "client" else scheduler):
        x, mean = dask.persist(x, x.mean(axis=0))
        for _ in range(3):
            x = (x - mean).persist()
        result = dask.compute(x.std(), x.sum(axis=0))
    alone = da.random.default_rng(0).random((100, 10), chunks=(20, 10)).compute(scheduler="sync")
    expected = alone - 3 * alone.mean(axis=0)
    np.testing.assert_allclose(result[0], expected.std())
    np.testing.assert_allclose(result[1], expected.sum(axis=0))


def test_what_needs_a_persisted_chunk_that_failed_raises_what_that_did(
    client: zfabric.Client,
) -> None:
    failed = da.ones((4, 4), chunks=2).map_blocks(refuse, dtype=float).persist()
    zfabric.wait(failed)
    for needs in (failed, failed.sum()):
        with pytest.raises(LookupError, match="not"):
            needs.compute()


def test_what_is_persisted_is_not_computed_again(client: zfabric.Client) -> None:
    first = dask.delayed(np.random.default_rng)().random()
    kept = first.persist()
    value = kept.compute()
    assert kept.compute() == value
    assert dask.delayed(inc)(kept).compute() == inc(value)


def test_futures_in_graphs(client: zfabric.Client) -> None:
    future = client.submit(np.arange, 4)
    assert dask.delayed(sum)(future).compute() == 6
    assert dask.delayed(lambda parts: sum(map(sum, parts)))([future, [1]]).compute() == 7
    x = da.from_delayed(dask.delayed(future), shape=(4,), dtype=int)
    assert x.sum().compute() == 6
    total = client.compute(x.sum())
    assert client.submit(inc, total).result() == 7


def test_nested_compute_inside_a_task(client: zfabric.Client) -> None:
    def nested(n: int) -> Any:
        assert dask.config.get("scheduler") == "sync"
        return da.arange(n, chunks=2).sum().compute()

    assert dask.compute(*[dask.delayed(nested)(n) for n in range(8)]) == tuple(
        sum(range(n)) for n in range(8)
    )


def test_nested_compute_by_the_tasks_own_client(client: zfabric.Client) -> None:
    def nested(n: int) -> Any:
        with zfabric.get_client().as_dask_scheduler():
            return da.arange(n, chunks=2).sum().compute()

    assert client.gather(client.map(nested, range(8))) == [sum(range(n)) for n in range(8)]


def test_another_version_of_dask_is_refused() -> None:
    from zfabric.client.collections.running import Runner, runner_for

    build, (version,) = Runner().__reduce__()
    assert build(version) is not None
    with pytest.raises(zfabric.CodecError, match=r"dask is 1\.2\.3 at the client"):
        runner_for("1.2.3")


def test_a_collection_of_a_closed_client() -> None:
    with zfabric.Client(slots=1) as first:
        x = da.ones(10, chunks=5).persist()
        assert first.get is not None
    with (
        zfabric.Client(slots=1),
        pytest.raises(zfabric.UsageError, match="by the client that persisted it"),
    ):
        x.sum().compute()
