"""`python -m benchmarks faults`, on zfabric alone: some faults for real, and the tables."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import cell, command, garbage, page, tasks
from benchmarks.faults.audit import Audit
from benchmarks.faults.cases import CASES
from benchmarks.faults.work import Account

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("fault", ["slot", "cancel"])
def test_zfabric_has_all_its_answers(fault: str) -> None:
    account = cell.run("zfabric", fault, quick=True)
    assert not account["errors"]
    assert {account[field] for field in ("lost", "wrong", "twice", "hung")} == {0}
    assert account["recovery_s"] is not None
    assert account["goes_on"]


@pytest.mark.skipif("FAULT_SECONDS" not in os.environ, reason="a minute of faults: make faults")
@pytest.mark.parametrize("fault", sorted(CASES.keys() - {"slot", "cancel"}))
def test_nor_does_it_lose_one_in_any_other_fault(fault: str) -> None:
    account = cell.run("zfabric", fault, quick=True)
    assert not account["errors"]
    assert {account[field] for field in ("lost", "wrong", "hung")} == {0}
    assert account["goes_on"]


def test_a_system_that_does_not_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'weather'"):
        cell.run("zfabric", "weather", quick=True)


def test_the_audit_tells_what_began_and_ended(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit")
    path = str(audit.path)
    assert tasks.piece(path, "a", 0.0) == tasks.answer("a")
    assert len(tasks.block(path, "a", 1000)) == 1000
    tasks.note(path, "b", "began")
    assert audit.count("ended") == {"a": 2}
    assert audit.running() == [("b", os.getpid())]
    assert audit.where("a") == os.getpid()
    assert audit.where("b") == 0


def test_garbage_is_thrown_until_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        port = server.getsockname()[1]
        assert garbage.throw(port, 20, held=5) == 20
    assert garbage.throw(port, 3, held=1) == 0


def account(**fields: Any) -> dict[str, Any]:
    return {**Account(n=10, goes_on=True).as_json(), **fields}


def test_the_tables_add_up_rounds() -> None:
    rounds = {
        ("slot", "zfabric"): [account(recovery_s=0.5), account(recovery_s=0.7)],
        ("slot", "parsl"): [account(recovery_s=1.0), account(lost=2, twice=1)],
        ("cancel", "zfabric"): [account(recovery_s=0.1, goes_on=False)],
        ("cancel", "parsl"): [account(n=0, verb="no cancel", goes_on=None)],
    }
    systems = ["zfabric", "parsl"]
    lines = page.markdown(rounds, systems).splitlines()
    assert lines[2:] == [
        "| process killed that runs a task | 0.6 (max 0.7) s | 2 lost, 1 ran twice of 20 |",
        "| cancel of an endless loop | takes no new work, 0.1 s | no such verb |",
    ]
    assert page.account(rounds, "parsl").splitlines()[2:] == [
        "| process killed that runs a task | 2 | 20 | 2 | 0 | 1 | 0 | - |",
        "| cancel of an endless loop | 1 | 0 | 0 | 0 | 0 | 0 | - |",
    ]
    text = page.table(rounds, systems).splitlines()
    assert text[1].endswith("0.6 (max 0.7)")
    assert text[3].endswith("takes no new work")
    assert text[4].endswith("no such verb: no cancel")


def test_unknown_names_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--peers", "storm", "--faults", "rain"]) == 2
    said = capsys.readouterr().err
    assert "no peer 'storm'" in said
    assert "no fault 'rain'" in said
