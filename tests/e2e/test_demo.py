"""The main job on a real fabric: the same answer as a plain loop, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zfabric.client import Client
from zfabric.demo import job


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """About a hundred files, with some that cannot be parsed if the tests of lib2to3 are there."""
    library = job.standard_library()
    return [
        path
        for path in job.find_sources(library)
        if Path(path).relative_to(library).parts[0] in ("json", "email", "asyncio", "lib2to3")
    ]


@pytest.mark.parametrize("kind", ["process", "thread"])
@pytest.mark.usefixtures("leaves_nothing")
def test_the_answer_is_that_of_a_plain_loop(sources: list[str], kind: str) -> None:
    steps: list[tuple[int, int]] = []
    with Client(slots=2, kind=kind) as client:
        outcome = job.run_on(client, sources, lambda done, total: steps.append((done, total)))
        info = client.info()
    serial = job.run_serial(sources)
    assert outcome.answer() == serial.answer()
    assert outcome.tasks == serial.tasks
    assert steps[-1] == (outcome.tasks, outcome.tasks)
    assert sum(files for files, _ in outcome.summary.slots.values()) == len(sources)
    assert sum(worker["slots"] for worker in info["workers"]) == 2
    assert sum(worker["done"] for worker in info["workers"]) == outcome.tasks


def test_one_file_and_no_file() -> None:
    with Client(slots=1) as client:
        for files in ([], [__file__]):
            assert job.run_on(client, files).answer() == job.run_serial(files).answer()


def test_the_command_prints_the_same_table_as_serially(tmp_path: Path) -> None:
    for n in range(20):
        (tmp_path / f"m{n}.py").write_text(f"import os\ndef f{n}(x):\n" + "    if x: x()\n" * n)
    (tmp_path / "broken.py").write_text("def")
    answers = []
    for options in (["--slots", "2"], ["--serial"]):
        done = subprocess.run(
            [sys.executable, "-m", "zfabric", "demo", "--path", str(tmp_path), *options],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        answer, figures = done.stdout.rsplit("\n\n", 1)
        assert "tasks/s" in figures
        answers.append(answer)
    assert answers[0] == answers[1]
    assert "m19.py" in answers[0]
