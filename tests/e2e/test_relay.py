"""Values that can only go through the broker, and lone calls beside them."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import pytest

import zfabric
from benchmarks import relay
from benchmarks.sampler.cells import ready, start
from benchmarks.sampler.network import Namespace, missing

MB = 1_000_000


def test_values_that_the_broker_relays_are_right_and_none_is_dropped() -> None:
    with ExitStack() as stack:
        client = relay.fabric(stack)
        figures = relay.measure(client, 12 * MB, 6 * MB, 0.2, ("a", "b", "c"))
        info = client.info()
    assert info["relays_dropped"] == 0
    assert info["bytes_out"] > 12 * MB  # they did go through it
    assert figures["relaying p50 us"] < 20 * figures["idle p50 us"]


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_workers_that_reach_only_the_broker() -> None:
    """Each in a network of its own: the broker is all that they have in common."""
    with ExitStack() as stack:
        spaces = []
        for number in range(2):
            spaces.append(Namespace(number))
            stack.callback(spaces[-1].close)
        zf = [sys.executable, "-m", "zfabric"]
        broker = start(stack, [*zf, "broker", "--listen", "tcp://0.0.0.0:0", "--insecure"], {})
        port = ready(broker).rpartition(":")[2]
        for name, space in zip(("a", "b"), spaces, strict=True):
            argv = [*zf, "worker", f"tcp://{space.here}:{port}", "-n", "1", "--name", name]
            address = f"tcp://{space.there}:0"
            more = ["--data-address", address, "--insecure"]
            start(stack, space.command([*argv, *more]), {"ZFABRIC_SHARED_MEMORY": "off"})
        local = [*zf, "worker", f"tcp://127.0.0.1:{port}", "-n", "1", "--name", "c"]
        start(stack, local, {"ZFABRIC_SHARED_MEMORY": "off"})
        client = stack.enter_context(zfabric.Client(f"tcp://127.0.0.1:{port}"))
        client.wait_for_workers(3, timeout=60)
        before = client.info()["bytes_out"]
        figures = relay.measure(client, 64 * MB, 32 * MB, 1.0, ("a", "b", "c"))
        info = client.info()
    assert info["bytes_out"] - before > 60 * MB
    assert info["relays_dropped"] == 0
    assert figures["relaying p50 us"] < 5 * figures["computing p50 us"]
