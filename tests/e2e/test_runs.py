"""Named runs: tasks and results that outlive the client's process, and the broker's too."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.journalled import Journalled
from zfabric import Client
from zfabric.errors import Refused, UsageError


@pytest.fixture
def fabric(tmp_path: Path) -> Iterator[Journalled]:
    fabric = Journalled(tmp_path)
    yield fabric
    fabric.close()


def audited(path: str, name: str, wait_for: str = "") -> str:
    with open(path, "a") as file:
        file.write(f"{name}\n")
    while wait_for and not os.path.exists(wait_for):
        time.sleep(0.01)
    return name


HOLDER = """
import sys, time
sys.path[:0] = {tests!r}
import cloudpickle, test_runs
cloudpickle.register_pickle_by_value(test_runs)
from test_runs import audited
from zfabric import Client
client = Client({address!r}, run="nightly")
done = client.submit(audited, {audit!r}, "done", key="done")
large = client.submit(bytes, 1_000_000, key="large")
bad = client.submit(divmod, 1, 0, key="bad")
done.result(timeout=20), large.result(timeout=20), bad.exception(timeout=20)
running = client.submit(audited, {audit!r}, "running", {gate!r}, key="running")
client.submit(audited, {audit!r}, "waiting", {gate!r}, key="waiting")
client.submit(audited, {audit!r}, "behind", {gate!r}, key="behind")
nameless = client.submit(audited, {audit!r}, "nameless", {gate!r})
client.submit(lambda a, b: a + b, running, done, key="sum")
while "running" not in open({audit!r}).read():
    time.sleep(0.01)
if {leave!r}:
    client.detach()
    print("left", flush=True)
else:
    print(client.name, len(client.futures()), flush=True)
time.sleep(600)
"""


def hold(fabric: Journalled, leave: bool) -> tuple[subprocess.Popen[str], str]:
    audit, gate = str(fabric.directory / "audit"), str(fabric.directory / "gate")
    Path(audit).touch()
    here = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    holder = fabric.start(
        "-c",
        HOLDER.format(address=fabric.address, audit=audit, gate=gate, leave=leave, tests=here),
    )
    assert holder.stdout is not None
    return holder, holder.stdout.readline()


def check_all(fabric: Journalled, client: Client) -> None:
    found = client.futures()
    assert sorted(found) == ["bad", "behind", "done", "large", "running", "sum", "waiting"]
    assert found["done"].result(timeout=20) == "done"
    assert isinstance(found["bad"].exception(timeout=20), ZeroDivisionError)
    assert not found["running"].done()
    (fabric.directory / "gate").touch()
    assert found["sum"].result(timeout=20) == "runningdone"
    assert found["waiting"].result(timeout=20) == "waiting"
    assert found["behind"].result(timeout=20) == "behind"
    assert len(found["large"].result(timeout=20)) == 1_000_000
    # The same key is the same task; a new one has an id that none had.
    assert client.submit(audited, "/nowhere", "done", key="done") is found["done"]
    assert client.submit(len, found["large"], key="length").result(timeout=20) == 1_000_000
    ran = (fabric.directory / "audit").read_text().split("\n")[:-1]
    assert sorted(ran) == sorted(set(ran)), "a task ran twice"


def test_a_run_outlives_its_client_that_is_killed(
    fabric: Journalled, wait_until: Callable[..., Any]
) -> None:
    holder, line = hold(fabric, leave=False)
    assert line.split()[1] == "7"
    with pytest.raises(Refused, match=r"held by client .* has to detach first") as refused:
        Client(fabric.address, run="nightly")
    assert refused.value.code == "run"
    with Client(fabric.address, name="other") as other:
        with pytest.raises(Refused, match="held by client"):
            other.attach("nightly")
        with pytest.raises(UsageError, match="held by client"):
            other.end_run("nightly")
        assert other.submit(len, "abc").result(timeout=20) == 3  # it goes on without one
    holder.kill()
    holder.wait()
    with Client(fabric.address) as client:
        wait_until(lambda: client.runs()[0]["holder"] == "")
        assert client.attach("nightly") is client
        check_all(fabric, client)
        client.end_run()
    with Client(fabric.address) as client:
        assert client.runs() == []
        tasks = client.info()["tasks"]
        assert not tasks["finished"] and not tasks["failed"], tasks
        with pytest.raises(UsageError, match="there is no run"):
            client.end_run("nightly")


def test_a_run_outlives_its_client_and_its_broker(fabric: Journalled) -> None:
    _, line = hold(fabric, leave=True)
    assert line == "left\n"
    fabric.kill_broker()
    fabric.broker = fabric.start_broker()
    with Client(fabric.address, run="nightly") as client:
        check_all(fabric, client)
        client.futures()["large"].release()
        client.futures()["length"].release()
    with Client(fabric.address, run="nightly") as client:
        assert "large" not in client.futures() and "done" in client.futures()


def test_a_holder_of_a_run_survives_the_brokers_restart(
    fabric: Journalled, wait_until: Callable[..., Any]
) -> None:
    with Client(fabric.address, run="nightly") as client:
        gate = str(fabric.directory / "gate")
        audit = str(fabric.directory / "audit")
        Path(audit).touch()
        running = client.submit(audited, audit, "running", gate, key="running")
        wait_until(lambda: "running" in Path(audit).read_text(), 20.0)
        fabric.kill_broker()
        fabric.broker = fabric.start_broker()
        Path(gate).touch()
        assert running.result(timeout=20) == "running"
        assert client.futures() == {"running": running}


def test_misuse_is_named(fabric: Journalled) -> None:
    with pytest.raises(UsageError, match="printable"):
        Client(fabric.address, run="")
    with Client(fabric.address) as client:
        with pytest.raises(UsageError, match="holds none"):
            client.detach()
        with pytest.raises(UsageError, match="named run"):
            client.futures()
        future = client.submit(len, "abc")
        with pytest.raises(UsageError, match="before the first submit"):
            client.attach("late")
        assert future.result(timeout=20) == 3
    with Client(fabric.address, run="a") as client, pytest.raises(UsageError, match="run 'a'"):
        client.attach("b")
