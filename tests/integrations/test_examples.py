"""The examples run, and what they say is right: they check themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

for _module in ("xarray", "dask.array", "h5netcdf", "matplotlib"):
    pytest.importorskip(_module)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
def test_climate(tmp_path: Path) -> None:
    picture = tmp_path / "climate.png"
    command = [sys.executable, str(EXAMPLES / "climate.py"), "--small", "--workers", "2"]
    command += ["--folder", str(tmp_path), "--picture", str(picture)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "the files agree with it" in ran.stdout
    assert picture.stat().st_size > 10_000
    assert len(list(tmp_path.glob("anomaly-*.nc"))) == 3
