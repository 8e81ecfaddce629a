"""Sessions of real processes: stopped, killed, cut off, flapping and half-open.

What holds in all of it: nothing is lost, no attempt begins twice, and a worker that was only cut
off keeps its running tasks and its values. The audit file of `shaken` has a line per execution.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.fault.shaken import QUICK, Shaken, kill_with_all, piece
from zfabric import Client, Future
from zfabric.testing.chaos import DOWN, UP, ChaosProxy, stopped

pytestmark = [
    pytest.mark.fault,
    pytest.mark.usefixtures("leaves_nothing"),
    # Said while the only worker is cut off.
    pytest.mark.filterwarnings("ignore:no workers are connected"),
]

PATIENCE_S = 40.0
ROUNDS = 12 if "FAULT_SECONDS" in os.environ else 4
DEAD_S = float(QUICK["ZFABRIC_DEAD_S"])

MB = 1_000_000
LARGE = 3 * MB
N_LARGE = 100

USER = """
import sys, zfabric

def value(n, nbytes):
    return bytes([n % 251]) * nbytes

address, n, nbytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with zfabric.Client(address) as client:
    futures = client.map(value, range(n), [nbytes] * n)
    zfabric.wait(futures)
    assert futures[0].result()
    print("fetching", flush=True)
    got = client.gather(futures)
print("right" if got == [value(i, nbytes) for i in range(n)] else "wrong", flush=True)
"""

LEASED = """
import sys, zfabric
from tests.fault.shaken import piece

address, audit, gate = sys.argv[1:]
with zfabric.Client(address) as client:
    try:
        client.submit(piece, audit, "running", gate).result(60)
    except zfabric.errors.ZFabricError as exc:
        print("lost" if "no longer knows this client" in str(exc) else repr(exc), flush=True)
    client.wait_for_workers(1, timeout=60)
    print("goes on" if client.submit(len, "abc").result(60) == 3 else "stands", flush=True)
"""


@pytest.fixture
def fabric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shaken]:
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    fabric = Shaken(tmp_path, {})
    yield fabric
    fabric.close()


@pytest.fixture
def slow_fabric(tmp_path: Path) -> Iterator[Shaken]:
    """With the usual settings."""
    fabric = Shaken(tmp_path, {})
    yield fabric
    fabric.close()


def pass_time(seconds: float) -> None:
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, seconds + 20)


def begun(fabric: Shaken, name: str, times: int = 1) -> None:
    wait_until(lambda: len(fabric.ran(name)) >= times, PATIENCE_S, f"{name} began")


# --- processes that stand still -------------------------------------------------------------------


def a_stopped_broker(fabric: Shaken, seconds: float, cut: bool) -> None:
    for name in ("a", "b"):
        fabric.add_worker(name)
    gate = str(fabric.directory / "gate")
    with Client(fabric.front.address) as client:
        client.wait_for_workers(2, timeout=PATIENCE_S)
        kept = client.submit(piece, fabric.audit, "kept", nbytes=1_000_000, workers="a")
        running = client.submit(piece, fabric.audit, "running", gate, workers="b")
        begun(fabric, "running")
        pid = kept.result(PATIENCE_S)[1]
        before = [fabric.number(client, name) for name in ("a", "b")]
        with stopped(fabric.broker.pid):
            behind = client.map(piece, [fabric.audit] * 50, [f"{n}" for n in range(50)])
            if cut:
                for proxy in (fabric.front, *fabric.proxies.values()):
                    assert proxy.cut()
            pass_time(seconds)
            assert not any(future.done() for future in behind)
        assert [name for name, _, _ in client.gather(behind)] == [f"{n}" for n in range(50)]
        Path(gate).touch()
        assert running.result(PATIENCE_S)[0] == "running"
        assert client.submit(len, kept).result(PATIENCE_S) == 3
        assert client.info()["clients"] == 1
        assert [fabric.number(client, name) for name in ("a", "b")] == before, "was given up"
        assert [e.pid for e in fabric.ran("kept")] == [pid]
    assert len(fabric.executions()) == 52


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True], ids=["", "and its connections break"])
def test_row_4_nobody_is_given_up_by_a_broker_that_slept(fabric: Shaken, cut: bool) -> None:
    a_stopped_broker(fabric, DEAD_S + 1.0, cut)


@pytest.mark.slow
@pytest.mark.skipif("FAULT_SECONDS" not in os.environ, reason="a minute: `make faults` runs it")
def test_row_4_for_a_minute(slow_fabric: Shaken) -> None:
    a_stopped_broker(slow_fabric, 60.0, False)


def one_at_a(fabric: Shaken, client: Client, gate: str) -> Future:
    """A task that runs at worker "a" until there is a file `gate`; then "b" is there as well."""
    client.wait_for_workers(1, timeout=PATIENCE_S)
    task = client.submit(piece, fabric.audit, "task", gate)
    begun(fabric, "task")
    fabric.add_worker("b")
    client.wait_for_workers(2, timeout=PATIENCE_S)
    return task


@pytest.mark.slow
def test_row_3_a_worker_that_slept_is_replaced_fenced_and_used_again(fabric: Shaken) -> None:
    fabric.add_worker("a")
    gate = str(fabric.directory / "gate")
    with Client(fabric.address) as client:
        task = one_at_a(fabric, client, gate)
        before = fabric.number(client, "a")
        with stopped(fabric.workers["a"].pid):
            begun(fabric, "task", 2)  # elsewhere
            assert fabric.number(client, "a") == 0
            Path(gate).touch()  # both end: the slot at "a" was not stopped
            name, pid, _ = task.result(PATIENCE_S)
        first, second = fabric.ran("task")
        assert (name, pid) == ("task", second.pid)
        assert second.attempt > first.attempt and second.pid != first.pid
        after = wait_until(lambda: fabric.number(client, "a"), PATIENCE_S, "it is back")
        assert after > before
        again = client.submit(piece, fabric.audit, "again", workers="a").result(PATIENCE_S)
        assert again[1] != second.pid
        assert task.result()[1] == second.pid
    assert not fabric.ran_twice()


def test_row_2_a_killed_worker_is_noticed_at_once(fabric: Shaken) -> None:
    process = fabric.add_worker("a")
    gate = str(fabric.directory / "gate")
    with Client(fabric.address) as client:
        task = one_at_a(fabric, client, gate)
        kill_with_all(process)
        killed = time.monotonic()
        wait_until(lambda: not fabric.number(client, "a"), PATIENCE_S)
        noticed_s = time.monotonic() - killed
        Path(gate).touch()
        assert task.result(PATIENCE_S)[1] == fabric.ran("task")[-1].pid
    assert "its connection broke" in fabric.log("broker"), "not found by its silence"
    if "FAULT_SECONDS" in os.environ:  # promised where the machine has nothing else to do
        assert noticed_s < 1.0


@pytest.mark.slow
def test_row_5_a_client_that_stands_still_amid_large_values_goes_on(fabric: Shaken) -> None:
    """They are relayed by the broker, which keeps no more of them than it may."""
    fabric.add_worker("a", "--data-address", "")
    user = fabric.start_program(USER, fabric.address, str(N_LARGE), str(LARGE))
    assert user.stdout is not None
    with Client(fabric.address) as client:
        client.wait_for_workers(1, timeout=PATIENCE_S)
        assert user.stdout.readline() == "fetching\n"
        before = fabric.broker_nbytes()
        with stopped(user.pid):
            pass_time(DEAD_S + 1.0)  # it has a lease
            assert client.submit(len, "abc").result(PATIENCE_S) == 3
            assert client.info()["unacked_bytes"] < 80 * MB
            assert fabric.broker_nbytes() - before < 150 * MB
            assert client.info()["clients"] == 2
        assert user.stdout.readline() == "right\n"


@pytest.mark.slow
def test_row_36_a_client_whose_lease_ended_is_told_so_and_begins_anew(tmp_path: Path) -> None:
    settings = {**QUICK, "ZFABRIC_LEASE_S": "0.5"}
    fabric = Shaken(tmp_path, settings)
    try:
        fabric.add_worker("a")
        gate = str(tmp_path / "gate")
        user = fabric.start_program(LEASED, fabric.address, fabric.audit, gate)
        assert user.stdout is not None
        begun(fabric, "running")
        with Client(fabric.address) as client, stopped(user.pid):
            wait_until(lambda: client.info()["clients"] == 1, PATIENCE_S, "its lease ended")
            held = ("waiting", "ready", "running", "finished", "failed")
            wait_until(lambda: not any(client.info()["tasks"][name] for name in held), PATIENCE_S)
        assert user.stdout.readline() == "lost\n"
        assert user.stdout.readline() == "goes on\n"
    finally:
        fabric.close()


# --- connections ----------------------------------------------------------------------------------


def cut(proxy: ChaosProxy, number: int) -> None:
    proxy.cut()


def flap(proxy: ChaosProxy, number: int) -> None:
    """Down for three tenths of a second, less than the grace; every fourth time for longer."""
    proxy.refuse()
    proxy.cut()
    time.sleep(0.3 if number % 4 else 1.0)
    proxy.accept()


def cut_inside(proxy: ChaosProxy, number: int) -> None:
    """At another byte each time: of a head or a message, then of the next handshake, if it has as
    many."""
    counted = proxy.counts["cut"]
    proxy.cut_after(37 * number**2, UP if number % 2 else DOWN)
    wait_until(lambda: proxy.counts["cut"] > counted, PATIENCE_S)
    proxy.cut_after(-1, UP if number % 2 else DOWN)


def freeze(proxy: ChaosProxy, number: int) -> None:
    """Silent, one way or both."""
    proxy.freeze((UP, DOWN, None)[number % 3])
    time.sleep(0.2)
    proxy.thaw()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["client", "worker"])
@pytest.mark.parametrize("fault", [cut, flap, cut_inside, freeze], ids=lambda f: f.__name__)
def test_rows_16_and_19_nothing_is_lost_or_runs_twice_over_bad_connections(
    fabric: Shaken, where: str, fault: Callable[[ChaosProxy, int], None]
) -> None:
    fabric.add_worker("a")
    proxy = fabric.front if where == "client" else fabric.proxies["a"]
    gate = str(fabric.directory / "gate")
    with Client(fabric.front.address) as client:
        client.wait_for_workers(1, timeout=PATIENCE_S)
        kept = client.submit(piece, fabric.audit, "kept", nbytes=1_000_000)
        running = client.submit(piece, fabric.audit, "running", gate)
        begun(fabric, "running")
        due = {}
        for number in range(ROUNDS):
            for n in range(100):
                name = f"{number}.{n}"
                due[name] = client.submit(piece, fabric.audit, name)
            fault(proxy, number)
            wait_until(lambda: due[f"{number}.0"].done(), PATIENCE_S)  # noqa: B023
        assert [name for name, _, _ in client.gather(list(due.values()))] == list(due)
        Path(gate).touch()
        assert running.result(PATIENCE_S)[:2] == ("running", fabric.ran("running")[0].pid)
        assert len(kept.result(PATIENCE_S)[2]) == 1_000_000
        assert proxy.counts["connections"] > (1 if fault is not freeze else 0)
    assert not fabric.ran_twice()
    # There was one worker: it was cut off, and all that it had stayed with it.
    names = [execution.name for execution in fabric.executions()]
    assert sorted(names) == sorted({*due, "kept", "running"})


@pytest.mark.slow
def test_row_14_a_worker_cut_off_for_long_keeps_its_task_and_its_value(fabric: Shaken) -> None:
    fabric.add_worker("a")
    fabric.add_worker("b")
    proxy = fabric.proxies["a"]
    gate = str(fabric.directory / "gate")
    with Client(fabric.address) as client:
        client.wait_for_workers(2, timeout=PATIENCE_S)
        kept = client.submit(piece, fabric.audit, "kept", nbytes=1_000_000, workers="a")
        running = client.submit(piece, fabric.audit, "running", gate, workers="a")
        begun(fabric, "running")
        pid = kept.result(PATIENCE_S)[1]
        proxy.refuse()
        proxy.cut()
        wait_until(lambda: not fabric.number(client, "a"), PATIENCE_S, "given up")
        # Both are for "a" only: nobody else gets them, and it finds them as its own.
        proxy.accept()
        wait_until(lambda: fabric.number(client, "a"), PATIENCE_S, "it is back")
        Path(gate).touch()
        assert running.result(PATIENCE_S)[1] == fabric.ran("running")[0].pid
        assert client.submit(lambda made: made[1], kept, workers="b").result(PATIENCE_S) == pid
    assert sorted(e.name for e in fabric.executions()) == ["kept", "running"]


@pytest.mark.slow
@pytest.mark.parametrize("way", [None, UP, DOWN], ids=["both ways", "up", "down"])
def test_rows_14_and_15_silence_beyond_dead_s_replaces_and_fences(
    fabric: Shaken, way: str | None
) -> None:
    fabric.add_worker("a")
    gate = str(fabric.directory / "gate")
    with Client(fabric.address) as client:
        task = one_at_a(fabric, client, gate)
        fabric.proxies["a"].freeze(way)
        if way != DOWN:
            begun(fabric, "task", 2)
        else:
            pass_time(DEAD_S + 1.0)
        Path(gate).touch()
        assert task.result(PATIENCE_S)[1] == fabric.ran("task")[-1].pid
        fabric.proxies["a"].thaw()
        wait_until(lambda: fabric.number(client, "a"), PATIENCE_S, "it is back")
        assert client.submit(piece, fabric.audit, "x", workers="a").result(PATIENCE_S)[0] == "x"
    assert not fabric.ran_twice()


@pytest.mark.slow
@pytest.mark.skipif("FAULT_SECONDS" not in os.environ, reason="a minute: `make faults` runs it")
@pytest.mark.parametrize("where", ["client", "worker"])
def test_row_20_a_half_open_connection_is_found_and_replaced(
    slow_fabric: Shaken, where: str
) -> None:
    fabric = slow_fabric
    fabric.add_worker("a")
    proxy = fabric.front if where == "client" else fabric.proxies["a"]
    gate = str(fabric.directory / "gate")
    with Client(fabric.front.address) as client:
        client.wait_for_workers(1, timeout=PATIENCE_S)
        kept = client.submit(piece, fabric.audit, "kept", nbytes=1_000_000)
        running = client.submit(piece, fabric.audit, "running", gate)
        begun(fabric, "running")
        proxy.abandon()
        Path(gate).touch()
        behind = client.map(piece, [fabric.audit] * 50, [f"{n}" for n in range(50)])
        assert running.result(90)[1] == fabric.ran("running")[0].pid
        assert [name for name, _, _ in client.gather(behind)] == [f"{n}" for n in range(50)]
        assert len(kept.result(PATIENCE_S)[2]) == 1_000_000
    assert len(fabric.executions()) == 52 and not fabric.ran_twice()
