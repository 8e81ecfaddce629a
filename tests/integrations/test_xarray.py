"""xarray reads, computes and writes real files by several worker processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

xarray = pytest.importorskip("xarray")
pytest.importorskip("dask.array")
pytest.importorskip("h5netcdf")
np = pytest.importorskip("numpy")

import zfabric  # noqa: E402
import zfabric.xarray  # noqa: E402
from zfabric.integrations.xarray import writing  # noqa: E402

ENGINE = "h5netcdf"
N_FILES, DAYS, LAT, LON = 4, 6, 12, 16


@pytest.fixture(scope="module")
def client() -> Iterator[zfabric.Client]:
    """Two workers of one slot each: processes that share nothing but the files."""
    with zfabric.Client(n_workers=2, slots=1) as opened, opened.as_dask_scheduler():
        yield opened


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    paths = []
    for number in range(N_FILES):
        values = rng.normal(size=(DAYS, LAT, LON)).astype("f4")
        data = xarray.Dataset(
            {"t": (("time", "lat", "lon"), values)},
            {"time": np.arange(number * DAYS, (number + 1) * DAYS), "lat": np.arange(LAT)},
        )
        paths.append(folder / f"part-{number}.nc")
        data.to_netcdf(paths[-1], engine=ENGINE)
    return paths


@pytest.fixture(scope="module")
def truth(files: list[Path]) -> Any:
    parts = [xarray.load_dataset(path, engine=ENGINE) for path in files]
    return xarray.concat(parts, "time")


def opened(files: list[Path], **options: Any) -> Any:
    return xarray.open_mfdataset(
        files, engine=ENGINE, combine="nested", concat_dim="time", **options
    )


def double(x: Any) -> Any:
    return 2 * x


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.usefixtures("client")
def test_reductions(files: list[Path], truth: Any, parallel: bool) -> None:
    with opened(files, parallel=parallel) as data:
        xarray.testing.assert_allclose(data.mean("time").compute(), truth.mean("time"))
        anomaly = (data - data.mean("time")).std()
        xarray.testing.assert_allclose(anomaly.compute(), (truth - truth.mean("time")).std())
        grouped = data.groupby(data.time % 3).mean()
        xarray.testing.assert_allclose(grouped.compute(), truth.groupby(truth.time % 3).mean())


def test_persist_and_apply_ufunc(client: zfabric.Client, files: list[Path], truth: Any) -> None:
    with opened(files, chunks={"lat": 6}) as data:
        held = data.persist()
        assert held.t.chunks == data.t.chunks
        xarray.testing.assert_identical(held.max().compute(), truth.max())
        both = client.persist([data.t, data + 1])
        xarray.testing.assert_identical(both[0].compute(), truth.t)
        doubled = xarray.apply_ufunc(
            double, data.t, dask="parallelized", output_dtypes=[data.t.dtype]
        )
        xarray.testing.assert_identical(doubled.compute(), double(truth.t))


@pytest.mark.usefixtures("client")
def test_many_chunks_into_one_file(files: list[Path], truth: Any, tmp_path: Path) -> None:
    with opened(files, chunks={"time": 2, "lat": 4}) as data:
        (data + 1).to_netcdf(tmp_path / "one.nc", engine=ENGINE)
        held = data.persist()  # Dask names its chunks in what follows, and does not hold them
        later = held.to_netcdf(tmp_path / "later.nc", engine=ENGINE, compute=False)
        later.compute()
    with xarray.open_dataset(tmp_path / "one.nc", engine=ENGINE) as found:
        xarray.testing.assert_identical(found.load(), truth + 1)
    with xarray.open_dataset(tmp_path / "later.nc", engine=ENGINE) as found:
        xarray.testing.assert_identical(found.load(), truth)


@pytest.mark.usefixtures("client")
def test_many_files(files: list[Path], truth: Any, tmp_path: Path) -> None:
    with opened(files) as data:
        parts = [data.isel(time=slice(n * 8, n * 8 + 8)) * 3 for n in range(3)]
        paths = [tmp_path / f"{n}.nc" for n in range(3)]
        xarray.save_mfdataset(parts, paths, engine=ENGINE)
    found = [xarray.load_dataset(path, engine=ENGINE) for path in paths]
    xarray.testing.assert_identical(xarray.concat(found, "time"), truth * 3)


@pytest.mark.usefixtures("client")
def test_zarr(files: list[Path], truth: Any, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    with opened(files) as data:
        data.to_zarr(tmp_path / "all.zarr", zarr_format=2, consolidated=True)
    with xarray.open_zarr(tmp_path / "all.zarr") as found:
        xarray.testing.assert_identical(found.load(), truth)


def test_who_held_the_lock(client: zfabric.Client, files: list[Path], tmp_path: Path) -> None:
    """While somebody else has the file's lock, nobody writes to it."""
    path = tmp_path / "locked.nc"
    with opened(files) as data:
        delayed = data.to_netcdf(path, engine=ENGINE, compute=False)
        lock = zfabric.xarray.FileLock(str(path))
        lock.acquire()
        writing_thread = threading.Thread(target=delayed.compute)
        writing_thread.start()
        with xarray.open_dataset(path, engine=ENGINE) as found:
            assert not np.isfinite(found.t).any() or (found.t == 0).all()
        lock.release()
        writing_thread.join(60)
    assert not writing_thread.is_alive() and not lock.locked()


def test_other_schedulers_are_left_alone(tmp_path: Path) -> None:
    import dask
    from xarray.backends import locks

    with dask.config.set(scheduler="threads"):
        assert not writing.is_fabric()
        assert locks.get_dask_scheduler() == "threaded"
        assert not isinstance(locks.get_write_lock("a"), zfabric.Lock)
    with zfabric.Client(slots=1, kind="thread") as client, client.as_dask_scheduler():
        assert isinstance(locks.get_write_lock("a"), zfabric.xarray.FileLock)
        zfabric.xarray.disable()
        try:
            assert locks.get_dask_scheduler() == "threaded"
        finally:
            zfabric.xarray.enable()


def test_writing_without_our_locks_says_what_to_import(tmp_path: Path) -> None:
    data = xarray.Dataset({"t": ("x", np.arange(8.0))}).chunk(x=2)
    with zfabric.Client(slots=1, kind="thread") as client, client.as_dask_scheduler():
        zfabric.xarray.disable()
        try:
            with pytest.raises(zfabric.UsageError, match="import zfabric.xarray"):
                data.to_netcdf(tmp_path / "a.nc", engine=ENGINE)
            lazy = data.to_netcdf(tmp_path / "b.nc", engine=ENGINE, compute=False)
            with pytest.raises(zfabric.UsageError, match="import zfabric.xarray"):
                lazy.compute()
        finally:
            zfabric.xarray.enable()


def test_a_file_lock_without_a_fabric_is_not_to_be_had() -> None:
    with zfabric.Client(slots=1, kind="thread") as ended:
        pass
    lock = zfabric.xarray.FileLock("nowhere", ended)
    assert lock.acquire(False) is False
    with pytest.raises(zfabric.ClientClosed):
        lock.acquire()
