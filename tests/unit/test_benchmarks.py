"""The harness of the benchmarks: right answers on a real peer, spread, verdicts, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.measure import Overdue, Results, deadline, environment, quantile
from benchmarks.tasks import targets, workloads
from benchmarks.tasks.peers import PEERS, Pool

TINY = workloads.Sizes(map=20, calls=20, links=5, leaves=64, small=20, budget_s=1.0)


def some_results() -> Results:
    results = Results()
    for peer, rates in {"zfabric": (100_000, 90_000, 120_000), "pool": (9_000, 9_100)}.items():
        for rate in rates:
            results.add(peer, "no-op map", "rate", rate, "tasks/s", 50, higher_is_better=True)
    return results


def test_a_peer_runs_every_workload() -> None:
    peer, results = Pool(), Results()
    peer.start(1)
    try:
        workloads.run(peer, results, TINY)
    finally:
        peer.stop()
    assert not results.failures
    assert {workload for workload, _ in results.rows()} == {
        "no-op map", "submit→result", "chain", "tree", "small results",
    }  # fmt: skip
    assert all(series.median > 0 for series in results)


def test_a_workload_that_fails_is_noted() -> None:
    class Broken(Pool):
        def chain(self, links: int) -> int:
            if links > 4:
                raise OSError("no")
            return links

    peer, results = Broken(), Results()
    peer.start(1)
    try:
        workloads.run(peer, results, TINY)
    finally:
        peer.stop()
    assert results.failures == [("pool", "chain", "OSError: no")]
    assert "FAILED pool, chain" in report.table(results, ["pool"])


def test_the_table_has_medians_and_spread() -> None:
    text = report.table(some_results(), ["zfabric", "pool", "ray"])
    assert "100,000" in text
    assert "90,000..120,000" in text
    assert "9,050" in text
    assert text.splitlines()[1].endswith(" -")


def test_the_table_for_a_page() -> None:
    text = report.markdown(some_results(), ["zfabric", "pool", "ray"])
    assert text.splitlines()[2] == "| no-op map, rate, tasks/s | 100,000 | 9,050 |  |"


def test_verdicts_are_ratios_of_one_run() -> None:
    (first, second, *_) = targets.verdicts(some_results())
    assert "11.0   must" in first
    assert "aim ≥ 12" in first
    assert "100,000   aim" in second


def test_without_our_figures_there_is_no_verdict() -> None:
    assert targets.verdicts(Results()) == []


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "out" / "tasks.json"
    report.write_json(path, environment(["pytest"]), some_results(), slots=2)
    content = json.loads(path.read_text())
    assert content["slots"] == 2
    assert content["environment"]["versions"]["pytest"]
    assert content["results"][0]["min"] == 90_000


@pytest.mark.parametrize(("q", "value"), [(0.0, 1), (0.5, 3), (0.99, 4), (1.0, 4)])
def test_quantile(q: float, value: int) -> None:
    assert quantile([1, 2, 3, 4], q) == value


def test_sizes_fit_the_budget() -> None:
    assert workloads.fitting(1000, 300.5) == 300
    assert workloads.fitting(1000, 10_000) == 1000
    assert workloads.fitting(1000, 0.1) == 50
    assert workloads.fitting(20, 0.1) == 20


def test_a_peer_that_hangs_is_given_up() -> None:
    def hang() -> None:
        with deadline(0.05):
            threading.Event().wait(60)

    with pytest.raises(Overdue):
        hang()


def test_a_missing_peer_names_its_install_line() -> None:
    class Missing(PEERS["ray"]):  # type: ignore[misc]
        module = "no_such_module_anywhere"

    assert Missing().missing() == "pip install ray"
    assert PEERS["pool"]().missing() == ""


def test_the_command_line_knows_its_subjects() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "weather"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "tasks" in done.stderr


def test_what_keys_cost_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.security import command

    assert command.main(["--mib", "8", "--calls", "10", "--rounds", "1"]) in (0, 1)
    out = capsys.readouterr().out
    for workload in ("messages", "values"):
        assert f"{workload}, 2 connections, to plain: " in out
    assert "messages, 2 connections, to bare: " in out
    assert "values to a client, 2 connections, to plain: " in out
    assert "submit→result, to plain: " in out


def test_the_data_benchmark_runs_on_a_peer() -> None:
    from benchmarks.data import workloads as data_workloads
    from benchmarks.data.peers import Pool as DataPool

    peer, results = DataPool(), Results()
    peer.start()
    try:
        sizes = data_workloads.Sizes(100_000, 100_000, 64_000, 4, 5, 1)
        data_workloads.run(peer, results, sizes)
        data_workloads.broadcast(peer, results, sizes)
    finally:
        peer.stop()
    assert {"gather", "scatter", "shuffle 4 x 4", "broadcast to 4 workers"} <= {
        series.workload for series in results
    }
    assert not results.failures


def test_targets_are_ratios_of_what_was_measured() -> None:
    from benchmarks.data import targets

    results = Results()
    assert targets.table(results) == ""
    results.add("socket", "gather", "rate", 2.0, "GB/s", 1)
    results.add("zfabric-tcp", "gather", "rate", 1.9, "GB/s", 1)
    results.add("zfabric-tcp", "scatter", "rate", 1.0, "GB/s", 1)
    sent = "sent by one worker at most / size"
    results.add("zfabric-tcp", "broadcast to 4 workers", sent, 2.0, "x", 1)
    first, second, third = targets.table(results).splitlines()
    assert "2.00   wanted <= 3" in third
    assert "0.95   wanted >= 0.85" in first and "short" not in first
    assert "0.50" in second and second.endswith("short of it")
