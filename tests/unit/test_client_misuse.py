"""Each misuse gets one message that says what to do."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import threading
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from tests.unit.client_broker import FakeBroker
from zfabric.client import Client, as_completed, fire_and_forget, get_client, progress, wait
from zfabric.client.waiting import warn_without_workers
from zfabric.errors import (
    ClientClosed,
    ConfigError,
    ConnectFailed,
    NoWorkerFits,
    Refused,
    ResultTimeout,
    Unserialisable,
    UsageError,
)


def add(a: Any, b: Any = 1) -> Any:
    return a + b


async def coroutine() -> int:
    return 1


def test_nobody_listens(tmp_path: Path) -> None:
    began = monotonic()
    with pytest.raises(ConnectFailed, match="did you start `zfabric broker`") as caught:
        Client(f"ipc://{tmp_path}/nobody", timeout=0.2)
    assert caught.value.address.endswith("nobody") and monotonic() - began < 3
    with pytest.raises(ConnectFailed):
        Client("tcp://127.0.0.1:1", timeout=0.2)


def test_a_silent_broker(broker: FakeBroker) -> None:
    broker.silent = True
    with pytest.raises(ConnectFailed):
        Client(broker.address, timeout=0.2)


def test_a_refusal_is_told_at_once(broker: FakeBroker) -> None:
    broker.refuse = ("version", "           here  there\nzfabric    1     2")
    began = monotonic()
    with pytest.raises(Refused, match="here  there") as caught:
        Client(broker.address, timeout=30)
    assert caught.value.code == "version" and monotonic() - began < 5


def test_addresses_and_options_that_make_no_sense(broker: FakeBroker) -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        Client("tpc://127.0.0.1:1")
    with pytest.raises(ConfigError, match="slots would start a local fabric"):
        Client(broker.address, slots=2)
    with pytest.raises(ConfigError, match="inline_limit"):
        Client(broker.address, inline_limits=3)
    with pytest.raises(ConfigError, match="address=7"):
        Client(7)
    with pytest.raises(ConfigError, match="'process' or 'thread'"):
        Client(kind="fibre")
    with pytest.raises(ConfigError, match="contradict"):
        Client(kind="process", processes=False)


def test_the_result_of_a_call_instead_of_a_function(client: Client) -> None:
    with pytest.raises(UsageError, match=r"submit\(f, x\) instead of submit\(f\(x\)\)"):
        client.submit(add(1))
    with pytest.raises(UsageError, match="given 2, of type int"):
        client.submit(add(1), key="k")
    with pytest.raises(UsageError, match=r"map\(f, x\)"):
        client.map(7, [1])
    with pytest.raises(TypeError):
        client.submit(add(1))


def test_a_coroutine_object_and_a_future_instead_of_a_function(client: Client) -> None:
    with pytest.raises(UsageError, match=r"submit\(coroutine, \.\.\.\)"):
        client.submit(coroutine())
    with pytest.raises(UsageError, match="futures go among the arguments"):
        client.submit(client.submit(add, 1))


def test_awaiting_a_client(client: Client) -> None:
    async def main() -> None:
        await client  # type: ignore[misc]

    with pytest.raises(TypeError, match="await"):
        asyncio.run(main())


def test_an_argument_that_cannot_be_sent(client: Client, broker: FakeBroker) -> None:
    n_submits = len(broker.seen.get("Submit", []))
    with pytest.raises(Unserialisable, match=r"args\[1\]\['db'\]") as caught:
        client.submit(add, 1, {"db": threading.Lock()})
    assert "lock" in caught.value.type_name
    client.info()
    assert len(broker.seen.get("Submit", [])) == n_submits
    assert client._submitter.outcomes == {}


def test_a_future_of_another_client(client: Client, broker: FakeBroker) -> None:
    with Client(broker.address) as other:
        theirs = other.submit(add, 1)
        with pytest.raises(UsageError, match="another client"):
            client.submit(add, theirs)
        with pytest.raises(UsageError, match="another client"):
            client.map(add, [1, theirs])
        with pytest.raises(UsageError, match="another client"):
            client.cancel(theirs)


def test_a_released_future_as_an_argument(
    client: Client, broker: FakeBroker, wait_until: Any
) -> None:
    future = client.submit(add, 1)
    future.result(10)
    future.release()
    wait_until(lambda: future.task_id in broker.released)
    with pytest.raises(UsageError, match="released"):
        client.submit(add, future)


def test_a_future_that_is_pickled(client: Client) -> None:
    import pickle

    with pytest.raises(UsageError, match="by itself"):
        pickle.dumps(client.submit(add, 1))


def test_after_close(broker: FakeBroker) -> None:
    client = Client(broker.address)
    future = client.submit(add, 1)
    assert future.result(10) == 2
    client.close()
    client.close()
    assert future.result() == 2  # what had arrived stays
    for call in (
        lambda: client.submit(add, 1),
        lambda: client.submit(add, 1, key="k"),
        lambda: client.map(add, [1]),
        lambda: client.map(add, [1], b=2),
        lambda: client.scatter([1]),
        lambda: client.cancel([]),
        client.info,
    ):
        with pytest.raises(ClientClosed, match="^this client is closed; make a new Client$"):
            call()
    assert "closed" in repr(client)
    assert "finished" in repr(future)


def test_other_things_where_futures_belong(client: Client) -> None:
    for call in (
        lambda: list(as_completed([1])),
        lambda: as_completed().add(1),  # type: ignore[arg-type]
        lambda: wait([client.submit(pow, 2, 3), "abc"]),  # type: ignore[list-item]
        lambda: client.cancel(None),
        lambda: progress({"a": 1}),
        lambda: fire_and_forget(1),
    ):
        with pytest.raises(UsageError, match=r"takes (a future|futures), .*not an object of type"):
            call()
    assert client.gather([1, client.submit(pow, 2, 3)]) == [1, 8]


def test_after_fork(client: Client) -> None:
    assert client.submit(add, 1).result(10) == 2
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            client.submit(add, 1)
        except BaseException as exc:
            os.write(write, f"{type(exc).__name__}: {exc}".encode())
        os._exit(0)
    os.waitpid(pid, 0)
    text = os.read(read, 10_000).decode()
    os.close(read)
    os.close(write)
    assert text.startswith("ClientClosed") and "os.fork()" in text and "in the child" in text
    assert client.submit(add, 2).result(10) == 3


def test_no_workers(broker: FakeBroker) -> None:
    broker.workers = []
    broker.hold = True
    with Client(broker.address, no_worker_warning_s=0.02) as client:
        future = client.submit(add, 1)
        with (
            pytest.warns(UserWarning, match=f"start one with `zfabric worker {broker.address}`"),
            pytest.raises(ResultTimeout),
        ):
            future.result(0.5)
        with pytest.raises(ResultTimeout):
            future.result(0.1)  # said once, not at each wait
        with pytest.raises(ResultTimeout, match="0 of 2 workers"):
            client.wait_for_workers(2, timeout=0.05)


def test_workers_that_are_busy_are_no_reason_to_warn(broker: FakeBroker) -> None:
    broker.hold = True
    with Client(broker.address, no_worker_warning_s=0.02) as client:
        with pytest.raises(ResultTimeout):
            client.submit(add, 1).result(0.2)
        client.wait_for_workers(1, timeout=5)


def test_impossible_resources(client: Client, broker: FakeBroker) -> None:
    broker.unfit = True
    with pytest.raises(NoWorkerFits, match="no worker has GPU=1; the workers have: w1"):
        client.submit(add, 1, resources={"GPU": 1}).result(10)


def test_options_that_make_no_sense(client: Client) -> None:
    with pytest.raises(UsageError, match="retries=-1"):
        client.submit(add, 1, retries=-1)
    with pytest.raises(UsageError, match="priority='high'"):
        client.submit(add, 1, priority="high")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="resources="):
        client.submit(add, 1, resources={"GPU": "two"})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="workers="):
        client.submit(add, 1, workers=[7])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="'raise' or 'skip'"):
        client.gather([], errors="ignore")
    with pytest.raises(UsageError, match="max_inflight=0"[:12]):
        client.map(add, [1], max_inflight=0)


def test_a_map_that_never_ends(client: Client) -> None:
    with pytest.raises(UsageError, match="max_inflight="):
        client.map(add, itertools.count())
    with pytest.raises(UsageError, match="iterate over"):
        client.map(add)


def test_get_client(client: Client, broker: FakeBroker) -> None:
    assert get_client() is client
    with Client(broker.address) as other:
        assert get_client() is other
    assert get_client() is client
    client.close()
    with pytest.raises(UsageError, match="no open client"):
        get_client()


@pytest.mark.parametrize(
    "options",
    [
        {"key": "k" * 5000},
        {"retries": 2**40},
        {"priority": 2**40},
        {"resources": {"GPU": 1e300}},
        {"resources": {"GPU": float("nan")}},
        {"resources": {f"r{n}": 1 for n in range(65)}},
        {"workers": ["w" * 5000]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_wire_does_not_take_is_refused_by_submit(client: Any, options: Any) -> None:
    """At the broker it would end the session, and with it everything that is pending."""
    with pytest.raises(UsageError):
        client.submit(abs, -1, **options)


def test_an_option_of_the_client_with_a_slip_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean slots"):
        Client(slot=2)
    with pytest.raises(ConfigError, match="did you mean max_deaths"):
        Client(max_death=2)


def test_a_client_cannot_be_sent(client: Client) -> None:
    with pytest.raises(UsageError, match=r"use zfabric\.get_client\(\)"):
        pickle.dumps(client)


def test_resources_that_are_no_mapping(client: Client) -> None:
    with pytest.raises(UsageError, match="it is like {'GPU': 1}"):
        client.submit(add, 1, resources=["GPU"])


def test_with_on_a_closed_client(broker: FakeBroker) -> None:
    client = Client(broker.address)
    client.close()
    with pytest.raises(ClientClosed), client:
        pass


def test_the_warning_about_workers_is_at_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="no workers") as caught:
        warn_without_workers("tcp://127.0.0.1:1")
    assert caught[0].filename == __file__
