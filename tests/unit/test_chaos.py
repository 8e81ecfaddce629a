"""The chaos proxy and its process faults do what they say, and the same again for the same seed."""

from __future__ import annotations

import itertools
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import psutil
import pytest

from zfabric.testing.chaos import (
    CALM,
    DOWN,
    UP,
    ChaosProxy,
    ProcessFaults,
    Weather,
    plan,
    stopped,
)
from zfabric.testing.chaos.weather import Pipe

WaitUntil = Callable[..., Any]


# --- One direction, without sockets -------------------------------------------------------------


def through(pipe: Pipe, data: bytes, piece: int, now: float = 0.0) -> bytes:
    out = b""
    for start in range(0, len(data), piece):
        pipe.put(data[start : start + piece], now)
        while got := pipe.take(math.inf if pipe.weather.rate == math.inf else now):
            out += got
    return out


def test_calm_weather_changes_nothing() -> None:
    data = bytes(range(256)) * 100
    assert through(Pipe("s", CALM, 0.0), data, 999) == data


def test_flips_follow_the_seed_and_not_the_pieces() -> None:
    data, weather = bytes(50_000), Weather(flip_every=500)
    seen = {through(Pipe("7", weather, 0.0), data, piece) for piece in (1, 77, 4096, 50_000)}
    assert len(seen) == 1
    (flipped,) = seen
    assert 50 < sum(byte != 0 for byte in flipped) < 200
    assert flipped != through(Pipe("8", weather, 0.0), data, 4096)


def test_a_cut_comes_after_the_same_byte_however_the_bytes_come() -> None:
    data, weather = bytes(100_000), Weather(cut_every=10_000)
    lengths = {len(through(Pipe("7", weather, 0.0), data, piece)) for piece in (7, 4096, 100_000)}
    assert len(lengths) == 1
    assert 0 < lengths.pop() < 100_000


def test_delay_keeps_the_order() -> None:
    pipe = Pipe("s", Weather(delay_s=1.0, jitter_s=5.0), 0.0)
    for n in range(20):
        pipe.put(b"%c" % n, n / 10)
    assert pipe.take(0.99) == b""
    assert 1.0 <= pipe.wake_at(0.0) <= 6.0
    assert b"".join(pipe.take(100.0) for _ in range(20)) == bytes(range(20))


def test_the_rate_is_kept() -> None:
    pipe = Pipe("s", Weather(rate=1000.0), 0.0)
    pipe.put(bytes(3000), 0.0)
    n, now = 0, 0.0
    while n < 3000:
        now = max(now + 0.001, pipe.wake_at(now))
        n += len(pipe.take(now))
    assert 2.9 < now < 3.1


def test_what_was_not_sent_comes_first() -> None:
    pipe = Pipe("s", CALM, 0.0)
    pipe.put(b"abcdef", 0.0)
    assert pipe.take(0.0) == b"abcdef"
    pipe.back(b"def")
    pipe.put(b"ghi", 0.0)
    assert pipe.take(0.0) + pipe.take(0.0) == b"defghi"
    assert (pipe.n_in, pipe.n_out) == (9, 9)


def test_impossible_weather() -> None:
    with pytest.raises(ValueError, match="weather"):
        Weather(delay_s=-1.0)
    with pytest.raises(ValueError, match="weather"):
        Weather(rate=0.0)


# --- The proxy ----------------------------------------------------------------------------------


class Echo:
    """Says back what it hears, on each connection."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.open: list[socket.socket] = []
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                end, _ = self.listener.accept()
            except OSError:
                return
            self.open.append(end)
            thread = threading.Thread(target=self._echo, args=(end,), daemon=True)
            self.threads.append(thread)
            thread.start()

    def _echo(self, end: socket.socket) -> None:
        try:
            while data := end.recv(65536):
                end.sendall(data)
        except OSError:
            pass
        end.close()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(5)


@pytest.fixture
def proxy(leaves_nothing: None) -> Iterator[ChaosProxy]:
    echo = Echo()
    proxy = ChaosProxy(echo.address, seed=1)
    yield proxy
    proxy.close()
    echo.close()


def dial(proxy: ChaosProxy) -> socket.socket:
    host, _, port = proxy.address.removeprefix("tcp://").rpartition(":")
    end = socket.create_connection((host, int(port)), timeout=5)
    end.settimeout(5)
    return end


def exchange(end: socket.socket, data: bytes) -> bytes:
    sender = threading.Thread(target=end.sendall, args=(data,))
    sender.start()
    got = b""
    while len(got) < len(data) and (more := end.recv(65536)):
        got += more
    sender.join()
    return got


def test_everything_goes_through(proxy: ChaosProxy, wait_until: WaitUntil) -> None:
    data = os.urandom(3_000_000)
    with dial(proxy) as one, dial(proxy) as two:
        assert exchange(one, data) == data
        assert exchange(two, b"x" * 1000) == b"x" * 1000
        assert proxy.counts["up"] == proxy.counts["down"] == 3_001_000
        assert proxy.n_open == 2
    wait_until(lambda: proxy.n_open == 0)
    assert proxy.counts["connections"] == 2


def test_cut_resets_both_ends_and_takes_new_ones(proxy: ChaosProxy) -> None:
    with dial(proxy) as end:
        exchange(end, b"hello")
        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    with dial(proxy) as end:
        assert exchange(end, b"again") == b"again"


@pytest.mark.parametrize("n", [0, 1, 7, 100])
def test_cut_after_any_byte(proxy: ChaosProxy, n: int) -> None:
    proxy.cut_after(n, DOWN)
    got = b""
    try:
        with dial(proxy) as end:
            end.sendall(bytes(200))
            while more := end.recv(4096):
                got += more
    except ConnectionError:
        pass
    assert len(got) <= n  # a reset may overtake the last bytes, on either side
    assert proxy.counts["cut"] == 1
    assert proxy.counts["down"] == n
    proxy.cut_after(-1, DOWN)
    with dial(proxy) as end:
        assert len(exchange(end, bytes(300))) == 300


def test_a_frozen_link_is_silent_and_loses_nothing(proxy: ChaosProxy) -> None:
    with dial(proxy) as end:
        exchange(end, b"hello")
        for direction in (None, UP, DOWN):
            proxy.freeze(direction)
            end.sendall(b"wait")
            end.settimeout(0.05)
            with pytest.raises(TimeoutError):
                end.recv(1)
            end.settimeout(5)
            proxy.thaw()
            assert end.recv(10) == b"wait"


def test_an_abandoned_link_is_open_and_deaf(proxy: ChaosProxy) -> None:
    with dial(proxy) as end:
        exchange(end, b"hello")
        proxy.abandon()
        end.sendall(b"anybody?")
        end.settimeout(0.05)
        with pytest.raises(TimeoutError):
            end.recv(1)
        with dial(proxy) as other:
            assert exchange(other, b"new") == b"new"


def test_refused_connections(proxy: ChaosProxy) -> None:
    with dial(proxy) as end:
        exchange(end, b"hello")
        proxy.refuse()
        with pytest.raises(ConnectionError), dial(proxy) as other:
            other.sendall(b"x")
            if not other.recv(1):
                raise ConnectionError
        assert exchange(end, b"still") == b"still"
        proxy.accept()
        with dial(proxy) as other:
            assert exchange(other, b"y") == b"y"


def test_weather_changes_while_connected(proxy: ChaosProxy) -> None:
    with dial(proxy) as end:
        start = monotonic()
        proxy.weather = Weather(delay_s=0.1)
        assert exchange(end, b"slow") == b"slow"
        assert monotonic() - start >= 0.2
        proxy.weather = Weather(flip_every=10)
        assert exchange(end, bytes(1000)) != bytes(1000)
        assert proxy.counts["flips"] > 10
        proxy.weather = Weather(rate=100_000)
        start = monotonic()
        exchange(end, bytes(20_000))
        assert monotonic() - start >= 0.15


def test_nobody_at_the_target(leaves_nothing: None, free_port: int) -> None:
    with ChaosProxy(f"127.0.0.1:{free_port}") as proxy, dial(proxy) as end:
        try:
            assert end.recv(1) == b""
        except ConnectionError:
            pass
    with pytest.raises(RuntimeError, match="closed"):
        proxy.cut()
    proxy.close()


# --- Processes ----------------------------------------------------------------------------------


def test_the_plan_is_that_of_its_seed() -> None:
    def first(seed: int) -> list[Any]:
        return list(itertools.islice(plan(seed, every_s=1.0), 50))

    assert first(1) == first(1) != first(2)
    assert 25 < first(1)[-1].at_s < 90
    assert {fault.kind for fault in first(1)} == {"kill", "stop"}
    with pytest.raises(ValueError, match="no such kind"):
        next(plan(1, every_s=1.0, kinds=("melt",)))


@pytest.fixture
def sleeper(leaves_nothing: None) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_stopped_goes_on_after(sleeper: subprocess.Popen[bytes], wait_until: WaitUntil) -> None:
    state = psutil.Process(sleeper.pid).status
    with stopped(sleeper.pid):
        wait_until(lambda: state() == psutil.STATUS_STOPPED)
    wait_until(lambda: state() != psutil.STATUS_STOPPED)


def test_faults_happen_and_none_stays_stopped(
    sleeper: subprocess.Popen[bytes], wait_until: WaitUntil
) -> None:
    with ProcessFaults(
        lambda: [sleeper.pid], 1, every_s=0.01, kinds=("stop",), stop_s=(0.01, 0.02)
    ) as faults:
        wait_until(lambda: len(faults.done) >= 5)
    assert all(fault.pid == sleeper.pid for fault in faults.done)
    wait_until(lambda: psutil.Process(sleeper.pid).status() != psutil.STATUS_STOPPED)
    with ProcessFaults(
        lambda: [sleeper.pid] if sleeper.poll() is None else [], 1, every_s=0.01, kinds=("kill",)
    ) as faults:
        assert sleeper.wait(10) == -signal.SIGKILL
        wait_until(lambda: faults.done)


def test_plans_that_cannot_be_are_refused_where_they_are_made() -> None:
    for options in ({"kinds": ("term",)}, {"kinds": ()}, {"every_s": 0.0}, {"stop_s": (2.0, 1.0)}):
        with pytest.raises(ValueError):
            ProcessFaults(list, 1, **{"every_s": 1.0, **options})  # type: ignore[arg-type]


def test_faults_that_cannot_happen_do_not_go_unnoticed() -> None:
    def nobody() -> list[int]:
        raise KeyError("no such fabric")

    with pytest.raises(KeyError), ProcessFaults(nobody, 1, every_s=0.001) as faults:
        faults._thread.join(10.0)


# --- What the weather leaves behind ---------------------------------------------------------------


def test_calm_weather_takes_back_the_cut_that_chance_had_set() -> None:
    pipe = Pipe("7", Weather(cut_every=100), 0.0)
    pipe.set_weather(CALM)
    assert through(pipe, bytes(100_000), 4096) == bytes(100_000)
    pipe.cut_after(5)
    pipe.set_weather(CALM)
    assert len(through(pipe, bytes(100), 100)) == 5


@pytest.mark.parametrize("rate", [0.5, 50.0, 99.0, 5000.0])
def test_the_slowest_link_passes_something(rate: float) -> None:
    pipe = Pipe("7", Weather(rate=rate), 0.0)
    pipe.put(bytes(10_000), 0.0)
    now, n = 0.0, 0
    while now < 20.0:
        now = max(now, pipe.wake_at(now))
        n += len(pipe.take(now))
    assert n == pytest.approx(min(10_000, 20.0 * rate), rel=0.02, abs=1.0)


def test_an_end_that_only_stops_sending_gets_its_answer(leaves_nothing: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            far, _ = server.accept()
            n = 0
            while data := far.recv(65536):
                n += len(data)
            far.sendall(b"%d" % n)
            far.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with ChaosProxy(f"tcp://127.0.0.1:{server.getsockname()[1]}") as proxy:
            with dial(proxy) as near:
                near.sendall(bytes(100))
                near.shutdown(socket.SHUT_WR)
                assert near.recv(100) == b"100"
                assert near.recv(100) == b""
            thread.join()


@pytest.mark.parametrize("backlog", [None, 1])
def test_a_frozen_proxy_does_not_tell_that_a_new_connection_has_failed(
    leaves_nothing: None, wait_until: WaitUntil, backlog: int | None
) -> None:
    """backlog: None: nobody listens; else the target resets what it is about to accept."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if backlog is not None:
            server.listen(backlog)
        with ChaosProxy(f"tcp://127.0.0.1:{server.getsockname()[1]}") as proxy:
            proxy.freeze()
            with dial(proxy) as near:
                wait_until(lambda: proxy.counts["connections"] == 1)
                server.close()
                near.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    near.recv(1)
                assert proxy.n_open == 1
                proxy.thaw()
                wait_until(lambda: proxy.n_open == 0)


def test_a_frozen_link_does_not_tell_that_an_end_is_gone(
    leaves_nothing: None, wait_until: WaitUntil
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with ChaosProxy(f"tcp://127.0.0.1:{server.getsockname()[1]}") as proxy, dial(proxy) as near:
            far, _ = server.accept()
            proxy.freeze()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            far.close()
            near.settimeout(0.3)
            with pytest.raises(TimeoutError):
                near.recv(1)
            assert proxy.n_open == 1
            proxy.thaw()
            near.settimeout(10.0)
            try:
                assert near.recv(1) == b""
            except ConnectionResetError:
                pass
            wait_until(lambda: proxy.n_open == 0)


@pytest.mark.parametrize(
    "target", ["ipc:///x", "tcp://host", "tcp://:1", "tcp://h:1/x", "tcp://nohost.invalid:9"]
)
def test_a_target_that_cannot_be_one_is_named(target: str) -> None:
    with pytest.raises(ValueError, match=target.replace("/", ".")):
        ChaosProxy(target)
