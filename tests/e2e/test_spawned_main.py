"""What a script defines travels also from the processes that multiprocessing spawns for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import multiprocessing
import sys

import zfabric

FACTOR = 3


class Point:
    def __init__(self, x):
        self.x = x


class TooFar(Exception):
    pass


def scaled(point):
    if point.x > 10:
        raise TooFar(point.x)
    return Point(FACTOR * point.x)


def child(address):
    assert scaled.__module__ == "__mp_main__"
    with zfabric.Client(address) as client:
        found = client.submit(scaled, Point(5)).result(30)
        assert type(found) is Point and found.x == 15
        assert [p.x for p in client.map_sync(scaled, [Point(1), Point(2)])] == [3, 6]
        assert client.submit(lambda: FACTOR).result(30) == 3
        error = client.submit(scaled, Point(11)).exception(30)
        assert type(error) is TooFar and error.args == (11,)


if __name__ == "__main__":
    with zfabric.Client(slots=1) as client:
        assert client.submit(scaled, Point(2)).result(30).x == 6
        process = multiprocessing.get_context("spawn").Process(target=child, args=[client.address])
        process.start()
        process.join()
        sys.exit(process.exitcode)
"""


def test_from_a_script_and_from_a_module_run_by_name(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    for how in (["script.py"], ["-m", "script"]):
        done = subprocess.run(
            [sys.executable, *how], cwd=tmp_path, timeout=90, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
