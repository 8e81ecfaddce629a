"""What may run once at most, on workers that are cut off or leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fault.shaken import Shaken, piece
from zfabric import Client, UnknownOutcome, wait

pytestmark = [
    pytest.mark.fault,
    # Said while the only worker is cut off.
    pytest.mark.filterwarnings("ignore:no workers are connected"),
]

PATIENCE_S = 60.0
NAMES = [f"p{n}" for n in range(6)]


@pytest.fixture
def fabric(tmp_path: Path, leaves_nothing: None) -> Iterator[Shaken]:
    made = Shaken(tmp_path, {})
    yield made
    made.close()


def test_a_worker_that_was_cut_off_goes_on_with_them(
    fabric: Shaken, wait_until: Callable[..., Any]
) -> None:
    gate = fabric.directory / "gate"
    fabric.add_worker("a")
    with Client(fabric.address) as client:
        client.wait_for_workers(1, timeout=PATIENCE_S)
        number = fabric.number(client, "a")
        due = {
            name: client.submit(piece, fabric.audit, name, str(gate), idempotent=False)
            for name in NAMES
        }
        wait_until(lambda: len(fabric.executions()) == 2, PATIENCE_S)
        fabric.proxies["a"].refuse()
        fabric.proxies["a"].cut()
        wait_until(lambda: not client.info()["workers"], PATIENCE_S)
        codes = {due[name].why().reasons[0][0] for name in NAMES}
        assert "doubt" in codes and codes <= {"doubt", "no workers"}
        fabric.proxies["a"].accept()
        wait_until(lambda: fabric.number(client, "a") not in (0, number), PATIENCE_S)
        gate.touch()
        assert [due[name].result(PATIENCE_S)[0] for name in NAMES] == NAMES
    assert sorted(e.name for e in fabric.executions()) == NAMES


def test_a_worker_that_leaves_gives_back_what_has_not_begun(
    fabric: Shaken, wait_until: Callable[..., Any]
) -> None:
    gate = fabric.directory / "gate"
    leaving = fabric.add_worker("a")
    with Client(fabric.address) as client:
        client.wait_for_workers(1, timeout=PATIENCE_S)
        due = {
            name: client.submit(piece, fabric.audit, name, str(gate), idempotent=False)
            for name in NAMES
        }
        wait_until(lambda: len(fabric.executions()) == 2, PATIENCE_S)
        begun = {execution.name for execution in fabric.executions()}
        leaving.terminate()
        leaving.wait(PATIENCE_S)
        fabric.add_worker("b")
        gate.touch()
        wait(list(due.values()), PATIENCE_S)
        for name in NAMES:
            if name in begun:
                with pytest.raises(UnknownOutcome, match="said good-bye|lost"):
                    due[name].result(0)
            else:
                assert due[name].result(0)[0] == name
    assert sorted(e.name for e in fabric.executions()) == NAMES
