"""xarray on a fabric.

    import xarray, zfabric, zfabric.xarray

    with zfabric.Client() as client, client.as_dask_scheduler():
        year = xarray.open_mfdataset("era/*.nc", engine="h5netcdf", parallel=True).mean("time")
        year.to_netcdf("mean.nc", engine="h5netcdf")

Reading and computing need nothing of this. Writing does: see `enable`.
"""

from __future__ import annotations

from zfabric.integrations.xarray.locks import FileLock
from zfabric.integrations.xarray.writing import disable, enable

__all__ = ["FileLock", "disable", "enable"]

enable()
