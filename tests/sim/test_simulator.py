"""Thousands of small fabrics in virtual time, each with its own faults.

A failing seed is printed. Run it alone with `python -m zfabric.testing.simulator SEED`, and add
it to corpus.txt, which is always replayed. ZFABRIC_SEEDS=0:100000 runs others than the usual ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zfabric.core.session import Session
from zfabric.testing import simulator

CORPUS = Path(__file__).with_name("corpus.txt")

CHUNK = 250
"""Seeds per test: none of them takes long, and a failure names few."""

SEEDS = [int(part) for part in os.environ.get("ZFABRIC_SEEDS", "0:1000").split(":")]


def corpus() -> list[int]:
    lines = CORPUS.read_text().splitlines()
    return [int(line.split()[0]) for line in lines if line.strip() and line[0] != "#"]


@pytest.mark.parametrize("seed", corpus())
def test_what_failed_once(seed: int) -> None:
    assert simulator.simulate(seed).n_steps > 0


@pytest.mark.parametrize("first", range(*SEEDS, CHUNK))
def test_everything_ends_and_nothing_is_left(first: int) -> None:
    """In as many processes as there are cores."""
    end = min(first + CHUNK, SEEDS[1])
    jobs = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "zfabric.testing.simulator", str(first), str(end), "-j", jobs]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


def test_the_same_seed_gives_the_same_run() -> None:
    assert simulator.simulate(5) == simulator.simulate(5)


def test_runs_differ_and_do_something() -> None:
    reports = [simulator.simulate(seed) for seed in range(30)]
    assert len({report.n_steps for report in reports}) > 25
    assert sum(report.n_checked for report in reports) > 300
    assert sum(report.n_faults for report in reports) > 20


def test_a_broken_machine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that send nothing again: what a cut connection took is never made good."""
    monkeypatch.setattr(Session, "reconnected", lambda session: None)
    monkeypatch.setattr(Session, "_on_nack", lambda session, expected: None)
    monkeypatch.setattr(simulator, "LIVENESS_S", 20.0)
    found = simulator.failures(range(12))
    assert found
    assert "seed" in found[0][1]
