"""A climate analysis from files to files: xarray and NetCDF on a fabric.

    python examples/climate.py                      some 400 MB of files, four worker processes
    python examples/climate.py --small              some 4 MB, for a look
    python examples/climate.py tcp://broker:8787 --folder /shared/climate

Workers write one file per year of daily temperatures, as a reanalysis has them: warm at the
equator, a cycle of the seasons, weather that moves from day to day, a slow trend, stored to a
hundredth of a degree. From these come the climatology of each month and each day's anomaly from
it, written as NetCDF by the workers. A serial run of plain numpy checks both.

Needs zfabric[xarray], dask[array], h5netcdf and, for the picture, matplotlib.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray

import zfabric
import zfabric.xarray  # lets xarray write by the fabric

ENGINE = "h5netcdf"
STEP_K = 0.01
"""What a value is rounded to, as in files of instruments and of models."""


class Grid(NamedTuple):
    """How much there is: files, and points per day."""

    n_years: int
    n_lat: int
    n_lon: int

    @property
    def nbytes(self) -> int:
        return round(self.n_years * 365.25) * self.n_lat * self.n_lon * 4


LARGE = Grid(n_years=16, n_lat=90, n_lon=180)
SMALL = Grid(n_years=3, n_lat=24, n_lon=36)
FIRST_YEAR = 2001


# --- The data: these two run in workers ---------------------------------------------------------


def write_year(folder: str, year: int, grid: Grid) -> str:
    """Write one year's file; its path."""
    time = pd.date_range(f"{year}-01-01", f"{year}-12-31")
    lat = np.linspace(-90, 90, grid.n_lat)
    lon = np.linspace(0, 360, grid.n_lon, endpoint=False)
    kelvin = temperatures(year, time.day_of_year.to_numpy(), lat, lon)
    data = xarray.Dataset(
        {"t2m": (("time", "lat", "lon"), kelvin, {"units": "K", "long_name": "temperature"})},
        {"time": time, "lat": lat, "lon": lon},
    )
    path = Path(folder, f"t2m-{year}.nc")
    data.to_netcdf(path, engine=ENGINE)
    return str(path)


def temperatures(year: int, days: Any, lat: Any, lon: Any) -> Any:
    """float32 in K, of shape (days, lat, lon)."""
    rng = np.random.default_rng(year)
    phi = np.deg2rad(lat)[None, :, None]
    season = np.cos(2 * np.pi * (days[:, None, None] - 200) / 365.25)
    mean = 302.0 - 48.0 * np.sin(phi) ** 2 + 4.0 * np.cos(np.deg2rad(lon))[None, None, :] ** 2
    seasonal = 17.0 * np.sin(phi) * season
    trend = 0.03 * (year - FIRST_YEAR)
    kelvin = mean + seasonal + trend + weather(rng, len(days), len(lat), len(lon))
    return (np.round(kelvin / STEP_K) * STEP_K).astype("f4")


def weather(rng: Any, n_days: int, n_lat: int, n_lon: int) -> Any:
    """Smooth fields of some 3 K that remember four fifths of the day before."""
    rows, columns = 12, 24
    coarse = rng.normal(size=(n_days, rows, columns))
    for day in range(1, n_days):
        coarse[day] = 0.8 * coarse[day - 1] + 0.6 * coarse[day]
    upward, across = _between(n_lat, rows), _between(n_lon, columns)
    return 3.0 * np.einsum("ir,drc,jc->dij", upward, coarse, across, optimize=True)


def _between(n_fine: int, n_coarse: int) -> Any:
    """Weights of linear interpolation, (n_fine, n_coarse)."""
    at = np.linspace(0, n_coarse - 1, n_fine)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(n_coarse)[None, :]))


# --- The analysis -------------------------------------------------------------------------------


def analyse(client: zfabric.Client, paths: Sequence[str], folder: Path) -> tuple[Any, list[Path]]:
    """The climatology, and the paths of the files of anomalies; all written by the workers."""
    with client.as_dask_scheduler(), opened(paths) as data:
        held = client.persist(data)  # read once, used twice; it stays with the workers
        with step("the climatology of each month"):
            climatology = client.persist(held.groupby("time.month").mean("time"))
            climatology.to_netcdf(folder / "climatology.nc", engine=ENGINE)
            climatology = climatology.compute()  # small: it goes along with each block below
        with step("each day's anomaly, a file per year"):
            anomalies = held.map_blocks(without_seasons, [climatology], template=held)
            years = sorted(set(data.time.dt.year.values.tolist()))
            written = [folder / f"anomaly-{year}.nc" for year in years]
            parts = [anomalies.sel(time=str(year)) for year in years]
            xarray.save_mfdataset(parts, written, engine=ENGINE)
        return climatology, written


def without_seasons(block: Any, climatology: Any) -> Any:
    """A block of days less the mean of their months.

    By blocks, as `data.groupby("time.month") - climatology` gives chunks of twelve days, and each
    chunk is a task that opens the file, writes and closes it.
    """
    return (block.groupby("time.month") - climatology).drop_vars("month")


def opened(paths: Sequence[str]) -> Any:
    """All years as one dataset, each file a chunk; workers read the headers."""
    return xarray.open_mfdataset(
        paths, engine=ENGINE, parallel=True, combine="nested", concat_dim="time", chunks={}
    )


def check(paths: Sequence[str], folder: Path, anomaly_paths: Sequence[Path]) -> Any:
    """Do it all again with numpy alone. Returns each year's mean anomaly in K, weighted by area.

    Raises AssertionError where the fabric's files say anything else.
    """
    years = [xarray.load_dataset(path, engine=ENGINE) for path in paths]
    months = [year.time.dt.month.values for year in years]
    climatology = np.stack(
        [
            np.concatenate([y.t2m.values[m == month] for y, m in zip(years, months)]).mean(
                axis=0, dtype="f8"
            )
            for month in range(1, 13)
        ]
    )
    found = xarray.load_dataset(folder / "climatology.nc", engine=ENGINE)
    np.testing.assert_allclose(found.t2m.values, climatology, atol=2e-3)
    weights = np.cos(np.deg2rad(years[0].lat.values))[None, :, None]
    means = []
    for year, month, path in zip(years, months, anomaly_paths):
        anomaly = year.t2m.values - climatology[month - 1]
        written = xarray.load_dataset(path, engine=ENGINE)
        assert (written.time.values == year.time.values).all()
        np.testing.assert_allclose(written.t2m.values, anomaly, atol=4e-3)
        means.append(float((anomaly * weights).mean() / weights.mean()))
    return means


# --- Telling ------------------------------------------------------------------------------------


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print what was done, and how long it took."""
    began = perf_counter()
    yield
    print(f"{perf_counter() - began:8.2f} s  {what}", flush=True)


def tell_links(client: zfabric.Client) -> None:
    """What the sampler decided on each link that moved anything."""
    print("\nlinks, and what the sampler decided for the values that they carried:")
    moved = [link for link in client.links() if link["raw_nbytes"]]
    for link in moved:
        rate = f"{link['rate'] / 1e6:.0f} MB/s" if link["rate"] else "rate unknown"
        verdicts = ", ".join(f"{reason} {n}" for reason, n in link["verdicts"].items())
        print(
            f"  {link['at']} {link['direction']} {link.get('peer_name', link['peer'])}: "
            f"{link['raw_nbytes'] / 1e6:.1f} MB as {link['wire_nbytes'] / 1e6:.1f} MB, {rate}; "
            f"{verdicts or 'nothing was sampled'}"
        )
    if not moved:
        print("  none: on one host values are handed over as memory; over a network it decides")


def draw(climatology: Any, means: Sequence[float], path: Path) -> None:
    """The range of the seasons as a map, and the trend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 3.8), width_ratios=(3, 2), layout="constrained"
    )
    difference = climatology.t2m.sel(month=7) - climatology.t2m.sel(month=1)
    mesh = left.pcolormesh(
        climatology.lon, climatology.lat, difference, cmap="RdBu_r", vmin=-40, vmax=40
    )
    figure.colorbar(mesh, ax=left, label="K")
    left.set(title="July less January", xlabel="longitude", ylabel="latitude")
    years = np.arange(FIRST_YEAR, FIRST_YEAR + len(means))
    right.bar(years, means, color=["#b2182b" if mean > 0 else "#2166ac" for mean in means])
    right.locator_params(axis="x", integer=True, nbins=6)
    right.axhline(0, color="black", linewidth=0.8)
    right.set(title="mean anomaly of each year", ylabel="K")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("address", nargs="?", help="of a fabric; without it one is started here")
    parser.add_argument("--small", action="store_true", help="some 4 MB rather than 400")
    parser.add_argument("--folder", type=Path, help="for the files; all workers must see it")
    parser.add_argument("--picture", type=Path, help="a PNG to draw")
    parser.add_argument("--workers", type=int, default=4, help="of the fabric that is started")
    options = parser.parse_args(arguments)
    grid = SMALL if options.small else LARGE
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        local = {} if options.address else {"n_workers": options.workers, "slots": 1}
        with zfabric.Client(options.address, **local) as client:
            client.wait_for_workers(1 if options.address else options.workers)
            print(f"{grid.n_years} years, {grid.nbytes / 1e6:.0f} MB, {client!r}")
            with step("the files, written by the workers"):
                years = range(FIRST_YEAR, FIRST_YEAR + grid.n_years)
                futures = client.map(lambda year: write_year(str(folder), year, grid), years)
                paths = client.gather(futures)
            with step("the analysis in all"):
                climatology, anomaly_paths = analyse(client, paths, folder)
            tell_links(client)
        with step("the check: the same by numpy in one process, and all files read back"):
            means = check(paths, folder, anomaly_paths)
        print(f"the files agree with it; mean anomaly of the last year: {means[-1]:+.3f} K")
        if options.picture:
            draw(climatology, means, options.picture)
            print(f"drew {options.picture}")


if __name__ == "__main__":
    main()
