"""The examples run, and what they say is right: they check themselves."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
def test_glm(tmp_path: Path) -> None:
    for module in ("dask.array", "dask_glm", "sklearn", "matplotlib"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip(module)
    picture = tmp_path / "glm.png"
    command = [sys.executable, str(EXAMPLES / "glm.py"), "--iterations", "5", "--blocks", "2"]
    ran = subprocess.run(
        [*command, "--picture", str(picture)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert "threads / zfabric" in ran.stdout
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_climate(tmp_path: Path) -> None:
    for module in ("xarray", "dask.array", "h5netcdf", "matplotlib"):
        pytest.importorskip(module)
    picture = tmp_path / "climate.png"
    command = [sys.executable, str(EXAMPLES / "climate.py"), "--small", "--workers", "2"]
    command += ["--folder", str(tmp_path), "--picture", str(picture)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "the files agree with it" in ran.stdout
    assert picture.stat().st_size > 10_000
    assert len(list(tmp_path.glob("anomaly-*.nc"))) == 3
