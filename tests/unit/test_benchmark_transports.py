"""The harness of transports: pairs run, tables and the page hold what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.transports import command, page
from benchmarks.transports.pair import Plan
from benchmarks.transports.ways import WAYS, missing

BLOCKING = ["zmq tcp", "zmq inproc", "zmq tcp, 2 MiB parts", "plain socket", "shared memory"]


@pytest.mark.parametrize("name", [*BLOCKING, "asyncio streams", "multiprocessing pipe"])
def test_a_pair_measures_itself(name: str) -> None:
    small, large = command.run(name, Plan((64, 3 * 2**20), 0.002, False, ("random",)), 60)
    assert small["size"] == 64 and 0 < small["p50_s"] <= small["p99_s"]
    assert large["gb_per_s"] > 0 and large["messages_per_s"] > 0


def test_a_pair_that_fails_says_why() -> None:
    with pytest.raises(OSError, match="KeyError"):
        command.run("pigeons", Plan((64,), 0.002, False), 60)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WAYS["tornado"], "needs", "no_such_module")
    assert missing("tornado") == "no_such_module"
    assert missing("plain socket") == ""


def test_the_table_and_the_page(tmp_path: Path) -> None:
    samples = [
        {"way": way, "size": size, "fill": "random", "busy": busy, "p50_s": 1e-5, "p99_s": 2e-5,
         "messages_per_s": 1e4, "gb_per_s": 1.5, "cpu_s_per_gb": 0.5}
        for way in ("zmq tcp", "pipe") for size in (64, 2**20) for busy in (False, True)
    ]  # fmt: skip
    text = command.table(samples)
    assert "1 MiB, both ends hold the GIL" in text and text.count("zmq tcp") == 4
    page.write(tmp_path, {"cores": 2, "cpu": "x", "system": "y", "python": "3", "load_1min": 0,
                          "versions": {}}, samples, text)  # fmt: skip
    content = (tmp_path / "transports.html").read_text()
    assert "<pre>" in content and 'src="http' not in content


def test_what_was_measured_before_it_is_cut_off_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = command.run

    def run(name: str, plan: Plan, timeout_s: float) -> list[command.Sample]:
        if name == "zmq inproc":
            raise KeyboardInterrupt
        return measure(name, plan._replace(sizes=(64, 2**20), seconds=0.002), timeout_s)

    monkeypatch.setattr(command, "run", run)
    ways = "plain socket,zmq inproc"
    assert command.main(["--quick", "--ways", ways, "--out", str(tmp_path)]) == 1
    assert "CUT OFF" in capsys.readouterr().out
    samples = json.loads((tmp_path / "transports.json").read_text())["samples"]
    assert {sample["way"] for sample in samples} == {"plain socket"}
