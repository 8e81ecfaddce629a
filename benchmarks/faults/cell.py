"""One fault on one system, in a process of its own: `python -m benchmarks.faults.cell`.

Whatever the system does, the process ends within a bound and leaves no other behind: it adopts
what its children leave, and kills it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.faults.cases import CASES
from benchmarks.faults.distributed_system import Distributed
from benchmarks.faults.parsl_system import Parsl
from benchmarks.faults.systems import NoSuchVerb, System
from benchmarks.faults.work import QUICK, Account, Bench, Sizes
from benchmarks.faults.zfabric_system import ZFabric

SYSTEMS: dict[str, type[System]] = {system.name: system for system in (ZFabric, Distributed, Parsl)}

PR_SET_CHILD_SUBREAPER = 36

STOP_S = 10.0
"""That a system may take to end before what is left of it is killed."""


def run(system: str, case: str, quick: bool) -> dict[str, Any]:
    """The account as JSON has it, from a process of its own.

    Raises RuntimeError when the system did not even start, with the end of what it said.
    """
    sizes = QUICK if quick else Sizes()
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": _before(root, os.environ.get("PYTHONPATH", "")),
        # Parsl starts its parts by their names, wherever this interpreter's programs are.
        "PATH": _before(str(Path(sys.executable).parent), os.environ.get("PATH", "")),
    }
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        outcome = Path(directory) / "outcome.json"
        with (Path(directory) / "log").open("w+") as log:
            cell = subprocess.Popen(
                [sys.executable, "-m", __name__, system, case, directory, "quick" if quick else ""],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
            try:
                cell.wait(120.0 + 4 * sizes.hung_s)
            except subprocess.TimeoutExpired:
                # The calls of its own client did not come back.
                return Account(n=sizes.n, hung=sizes.n, errors=["the client hangs"]).as_json()
            finally:
                _kill_below(cell.pid)
                cell.kill()
                cell.wait()
            if outcome.exists():
                found: dict[str, Any] = json.loads(outcome.read_text())
                return found
            log.seek(0)
            raise RuntimeError(f"{system}, {case}: {log.read()[-2000:]}")


def main(argv: list[str]) -> None:
    system_name, case_name, name, quick = argv
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    directory, case = Path(name), CASES[case_name]
    outcome = directory / "outcome.json"
    system = SYSTEMS[system_name](directory, case.shape)
    bench = Bench(system, QUICK if quick else Sizes())
    try:
        system.start()
        bench.warm_up()
        account = case.run(bench)
        account.twice = max(account.twice, 0 if case.name == "copy" else bench.count_twice())
        if not account.hung:
            account.goes_on = bench.goes_on()
    except NoSuchVerb as error:
        account = Account(verb=str(error))
    outcome.with_suffix(".part").write_text(json.dumps(account.as_json()))
    outcome.with_suffix(".part").rename(outcome)
    # Some libraries' ends hang when what they talked to is dead; nobody has to wait for that.
    threading.Timer(STOP_S, _end).start()
    with contextlib.suppress(Exception):
        system.stop()
    _end()


def _before(first: str, rest: str) -> str:
    return os.pathsep.join(filter(None, (first, rest)))


def _end() -> None:
    _kill_below(os.getpid())
    os._exit(0)


def _kill_below(pid: int) -> None:
    """All that descend from it, again until none is left that could start another."""
    import psutil

    for _ in range(10):
        try:
            found = psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            return
        alive = [process for process in found if process.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=1.0)


if __name__ == "__main__":
    main(sys.argv[1:])
