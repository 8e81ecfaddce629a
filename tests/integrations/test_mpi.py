"""The mpi transport under `mpiexec -n 2`: the whole contract on each rank, and ranks that talk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py")

HERE = Path(__file__).parent
MPIEXEC = Path(sys.executable).with_name("mpiexec")
COMMAND = str(MPIEXEC) if MPIEXEC.exists() else shutil.which("mpiexec")

ENVIRON = {
    # Open MPI's words for: root may, more ranks than cores may, and none of them spins.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


@pytest.mark.slow
@pytest.mark.skipif(COMMAND is None, reason="no mpiexec")
def test_the_contract_holds_under_mpiexec() -> None:
    assert COMMAND is not None
    done = subprocess.run(
        [COMMAND, "-n", "2", sys.executable, str(HERE / "mpi_ranks.py")],
        env={**os.environ, **ENVIRON, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=110,
    )
    said = done.stdout[-4000:] + done.stderr[-2000:]
    assert done.returncode == 0, said
    assert "rank 0 of 2: 0" in said and "rank 1 of 2: 0" in said, said
