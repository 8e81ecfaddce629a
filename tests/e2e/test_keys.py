"""A fabric with keys: joining by file, by line and by environment; roles; revoking; one port."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zfabric
from zfabric.config import Settings
from zfabric.errors import ConnectFailed, Refused, TaskCancelled, ZFabricError
from zfabric.keys import KeyRing
from zfabric.keys.join import read_file
from zfabric.runtime.dialling import dial_broker

WaitUntil = Callable[..., Any]


class KeyedFabric:
    """`zfabric broker --keys` and workers, as processes."""

    def __init__(self, directory: Path, wait_until: WaitUntil) -> None:
        self.ring = KeyRing.create(directory / "keys")
        self.ring.add("worker", "worker")
        self.ring.add("client", "client")
        self.wait_until = wait_until
        self.logs = directory
        self.processes: list[subprocess.Popen[bytes]] = []
        self.command("broker", "--port", "0", "--keys", str(self.ring.directory))
        self.wait_until(lambda: all(self.path(n).exists() for n in ("client", "worker")), 20)
        self.address = read_file(self.path("client"))[0]

    def path(self, name: str) -> Path:
        return self.ring.join_path(name)

    def command(
        self, *words: str, stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        log = self.logs / f"{len(self.processes)}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "zfabric", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, **(env or {})},
            )
        assert process.stdin is not None
        process.stdin.write(stdin)
        process.stdin.close()
        self.processes.append(process)
        return process

    def worker(self, *words: str) -> subprocess.Popen[bytes]:
        return self.command("worker", str(self.path("worker")), "-n", "1", *words)

    def log(self, process: subprocess.Popen[bytes]) -> str:
        return (self.logs / f"{self.processes.index(process)}.log").read_text()

    def client(self, name: str = "client", **options: Any) -> zfabric.Client:
        return zfabric.Client(str(self.path(name)), **options)

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            process.wait(10)


@pytest.fixture
def fabric(tmp_path: Path, wait_until: WaitUntil, leaves_nothing: None) -> Iterator[KeyedFabric]:
    fabric = KeyedFabric(tmp_path, wait_until)
    yield fabric
    fabric.close()


def inner() -> int:
    return int(zfabric.get_client().submit(pow, 2, 5).result(20))


def holder(n: int) -> bytes:
    return bytes(n)


def test_who_has_a_key_works_as_usual(fabric: KeyedFabric, monkeypatch: pytest.MonkeyPatch) -> None:
    fabric.worker("--name", "one")
    token = fabric.ring.join("worker", fabric.address).token()
    fabric.command("worker", "-", "-n", "1", "--name", "two", stdin=token.encode() + b"\n")
    with fabric.client() as client:
        client.wait_for_workers(2, timeout=20)
        assert sum(client.gather(client.map(abs, range(-50, 0)))) == 1275
        assert client.submit(inner).result(20) == 32
        # Large values go between the workers, to the client and from it, by keyed data doors.
        for door in client.info()["workers"]:
            assert door["data_address"].startswith("tcp://127.0.0.1:")
            assert "?key=" in door["data_address"]
        one = client.submit(holder, 3_000_000, workers="one")
        two = client.submit(holder, 3_000_001, workers="two")
        assert client.submit(len, one, workers="two").result(20) == 3_000_000
        assert len(two.result(20)) == 3_000_001
        assert client.submit(len, client.scatter(bytes(2_000_000))).result(20) == 2_000_000
        for text in (repr(client), str(client.info()), fabric.log(fabric.processes[0])):
            assert token[-160:-40] not in text
    monkeypatch.setenv("ZFABRIC_ADDRESS", fabric.ring.join("client", fabric.address).token())
    with zfabric.Client() as client:
        assert client.address == fabric.address
        assert client.submit(pow, 2, 3).result(20) == 8


def test_values_go_through_the_one_port_where_nothing_else_is_open(fabric: KeyedFabric) -> None:
    for name in ("one", "two"):
        fabric.worker("--name", name, "--data-address", "")
    with fabric.client() as client:
        client.wait_for_workers(2, timeout=20)
        one = client.submit(holder, 3_000_000, workers="one")
        assert client.submit(len, one, workers="two").result(20) == 3_000_000
        assert len(one.result(20)) == 3_000_000
        assert all(worker["data_address"] == "" for worker in client.info()["workers"])


def test_who_has_none_does_not_come_in(fabric: KeyedFabric, tmp_path: Path) -> None:
    with pytest.raises(ConnectFailed, match="one side has keys and the other has none"):
        zfabric.Client(fabric.address, timeout=2)
    foreign = KeyRing.create(tmp_path / "foreign")
    foreign.add("client", "client")
    with pytest.raises(ConnectFailed, match="another broker"):
        zfabric.Client(foreign.join("client", fabric.address).token(), timeout=2)
    stranger = fabric.ring.join("client", fabric.address)
    stranger.own = foreign.member("client").own
    with pytest.raises(Refused, match="not admitted there"):
        zfabric.Client(stranger.token(), timeout=10)
    with fabric.client() as client:  # nothing of that is left there
        assert client.info()["clients"] == 1


def test_a_worker_without_a_key_is_told_what_to_do(fabric: KeyedFabric) -> None:
    process = fabric.command("worker", fabric.address, "-n", "1")
    fabric.wait_until(lambda: "Still trying" in fabric.log(process), 30)
    text = fabric.log(process)
    assert "zfabric worker ~/.zfabric/keys/worker.join" in text
    assert "nothing answers" not in text and process.poll() is None


def test_a_clients_key_makes_no_worker(fabric: KeyedFabric) -> None:
    process = fabric.command("worker", str(fabric.path("client")))
    assert process.wait(20) == 2
    assert "a worker joins with a worker's key" in fabric.log(process)
    # Nor does a lie about the role help: the broker goes by the key.
    lie = fabric.ring.join("client", fabric.address)
    lie.role = "worker"
    process = fabric.command("worker", "-", stdin=lie.token().encode() + b"\n")
    assert process.wait(20) == 1
    assert "no key to be a worker with" in fabric.log(process)


def test_a_revoked_key_ends_its_sessions(fabric: KeyedFabric) -> None:
    fabric.worker()
    fabric.ring.add("spare", "worker")
    fabric.ring.add("alice", "client")
    fabric.wait_until(fabric.path("alice").exists, 10)
    spare = fabric.command("worker", str(fabric.path("spare")), "-n", "1", "--name", "spare")
    token = fabric.ring.join("alice", fabric.address).token()
    with fabric.client() as client, fabric.client("alice") as alice:
        client.wait_for_workers(2, timeout=20)
        pending = alice.submit(pow, 2, 3, workers="nobody")
        fabric.ring.revoke("alice")
        fabric.ring.revoke("spare")
        with pytest.raises((TaskCancelled, ZFabricError), match="revoked"):
            pending.result(10)
        assert spare.wait(20) == 1
        assert "revoked" in fabric.log(spare)
        with pytest.raises(Refused, match="not admitted there"):
            zfabric.Client(token, timeout=10)
        fabric.wait_until(lambda: len(client.workers()) == 1)
        assert client.submit(pow, 2, 4).result(20) == 16


def test_a_revoked_key_is_heard_no_more_on_a_connection_that_stands(fabric: KeyedFabric) -> None:
    """Garbage that arrives is counted by the broker; what is not read cannot be."""
    fabric.ring.add("alice", "client")
    fabric.wait_until(fabric.path("alice").exists, 10)
    settings = Settings()
    channel = dial_broker(fabric.address, fabric.ring.join("alice", fabric.address), settings)
    junk = [b"no header of ours", b"and no message"]

    def heard(client: zfabric.Client) -> int:
        errors = client.info()["errors"]
        return sum(n for name, n in errors.items() if name.startswith("bad:"))

    def is_heard(client: zfabric.Client) -> bool:
        channel.recv()
        channel.send(junk)
        return heard(client) > 0

    try:
        with fabric.client() as client, fabric.client("alice") as alice:
            fabric.wait_until(lambda: is_heard(client), 20)
            fabric.ring.revoke("alice")
            fabric.wait_until(lambda: not alice._io.is_open, 20)
            before = [heard(client) for _ in range(20)][-1]
            for _ in range(20):
                channel.recv()
                channel.send(junk)
                after = heard(client)
            assert after == before
    finally:
        channel.close()


def test_a_key_revoked_while_the_broker_is_away(fabric: KeyedFabric, free_port: int) -> None:
    words = ("broker", "--port", str(free_port), "--keys", str(fabric.ring.directory))
    fabric.path("client").unlink()
    broker = fabric.command(*words)
    fabric.wait_until(fabric.path("client").exists, 20)
    worker = fabric.worker()
    with zfabric.Client(str(fabric.path("client"))) as client:
        client.wait_for_workers(1, timeout=20)
        pending = client.submit(pow, 2, 3, workers="nobody", must_fit=False)
        client.info()
        broker.kill()
        broker.wait()
        fabric.ring.revoke("client")
        fabric.ring.revoke("worker")
        fabric.command(*words)
        with pytest.raises(ZFabricError, match="not admitted there"):
            pending.result(20)
    assert worker.wait(20) == 1
    assert "not admitted there" in fabric.log(worker)


def test_files_open_to_others_start_nothing(fabric: KeyedFabric) -> None:
    fabric.path("worker").chmod(0o644)
    process = fabric.worker()
    assert process.wait(20) == 2
    assert "open to others" in fabric.log(process)
    (fabric.ring.directory / "worker.key").chmod(0o640)
    process = fabric.command("broker", "--port", "0", "--keys", str(fabric.ring.directory))
    assert process.wait(20) == 2
    assert "open to others" in fabric.log(process)


def test_beyond_this_host_the_usual_keys_are_taken(
    fabric: KeyedFabric, tmp_path: Path, free_port: int
) -> None:
    env = {"ZFABRIC_KEYS": str(tmp_path / "usual")}
    words = ("broker", "--host", "0.0.0.0", "--port", str(free_port))
    process = fabric.command(*words, env=env)
    assert process.wait(20) == 2
    assert "zfabric keys init" in fabric.log(process)
    assert fabric.command("keys", "init", env=env).wait(20) == 0
    fabric.command(*words, env=env)
    path = tmp_path / "usual" / "client.join"
    fabric.wait_until(path.exists, 20)
    with zfabric.Client(str(path)) as client:
        assert client.address.endswith(f":{free_port}")
        assert client.info()["clients"] == 1
