"""Key files that nobody else can read, the directory of keys, and ways to say how to join."""

from __future__ import annotations

import os
import pickle
import stat
import traceback
from pathlib import Path

import pytest
from click.testing import CliRunner

from zfabric.cli import group
from zfabric.errors import ConfigError, UsageError
from zfabric.keys import Join, KeyPair, KeyRing, default_directory, resolve
from zfabric.keys.files import read_secret, write_secret
from zfabric.keys.join import PREFIX


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    ring = KeyRing.create(tmp_path / "keys")
    ring.add("worker", "worker")
    ring.add("client", "client")
    return ring


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_files_are_for_their_owner_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        ring = KeyRing.create(tmp_path / "deep" / "keys")
        ring.add("w", "worker")
        ring.join("w", "tcp://h:1").write(ring.join_path("w"))
    finally:
        os.umask(before)
    assert mode(ring.directory) == 0o700
    assert {mode(path) for path in ring.directory.iterdir()} == {0o600}
    assert {p.name for p in ring.directory.iterdir()} == {"broker.key", "w.key", "w.join"}


@pytest.mark.parametrize("bits", [0o644, 0o640, 0o604, 0o620, 0o602])
def test_a_file_open_to_others_is_refused(ring: KeyRing, bits: int) -> None:
    (ring.directory / "worker.key").chmod(bits)
    with pytest.raises(ConfigError, match=r"open to others.*chmod 600"):
        ring.members()
    (ring.directory / "broker.key").chmod(bits)
    with pytest.raises(ConfigError, match="open to others"):
        KeyRing(ring.directory)


def test_a_directory_open_to_others_is_refused(ring: KeyRing) -> None:
    ring.directory.chmod(0o750)
    with pytest.raises(ConfigError, match=r"open to others.*chmod 700"):
        KeyRing(ring.directory)


def test_an_empty_directory_open_to_others_holds_no_key_that_could_be_known(
    ring: KeyRing, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    empty.chmod(0o755)
    with pytest.raises(ConfigError, match=r"open to others and empty: chmod 700"):
        KeyRing(empty)


def test_links_and_other_kinds_of_files_are_refused(ring: KeyRing, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(ring.directory)
    with pytest.raises(ConfigError, match="no directory"):
        KeyRing(tmp_path / "link")
    (ring.directory / "other.key").symlink_to(ring.directory / "worker.key")
    with pytest.raises(ConfigError, match="link"):
        ring.members()
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="regular"):
        read_secret(tmp_path / "pipe")


def test_another_owner_is_refused(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(ConfigError, match="belongs to user"):
        KeyRing(ring.directory)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"role": "worker"}', b"\xff\xfe", b"[" * 60_000]
)
def test_what_is_no_key_is_one_clear_error(ring: KeyRing, content: bytes) -> None:
    path = ring.directory / "worker.key"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        ring.members()


def test_nothing_is_overwritten(ring: KeyRing) -> None:
    before = (ring.directory / "broker.key").read_bytes()
    with pytest.raises(ConfigError, match="there already"):
        KeyRing.create(ring.directory)
    with pytest.raises(ConfigError, match="there already"):
        ring.add("worker", "client")
    assert (ring.directory / "broker.key").read_bytes() == before
    write_secret(ring.directory / "x", {"a": 1}, replace=True)
    write_secret(ring.directory / "x", {"a": 2}, replace=True)
    assert read_secret(ring.directory / "x") == {"a": 2}


@pytest.mark.parametrize("name", ["", "broker", "../x", "a/b", ".hidden", "a b", "x" * 65, "é"])
def test_names_cannot_leave_the_directory(ring: KeyRing, name: str) -> None:
    with pytest.raises(ConfigError):
        ring.add(name, "worker")
    with pytest.raises(ConfigError):
        ring.revoke(name)


def test_members_and_their_changes(ring: KeyRing) -> None:
    stamp = ring.stamp()
    assert [(m.name, m.role) for m in ring.members()] == [
        ("client", "client"),
        ("worker", "worker"),
    ]
    ring.add("alice", "client")
    assert ring.stamp() != stamp
    ring.join("alice", "tcp://h:1").write(ring.join_path("alice"))
    ring.revoke("alice")
    assert ring.stamp() == stamp
    assert not ring.join_path("alice").exists()
    (ring.directory / "client.key").chmod(0o640)
    assert ring.stamp() != stamp
    with pytest.raises(ConfigError, match="no key named"):
        ring.revoke("alice")


def test_a_join_is_the_same_by_line_and_by_file(ring: KeyRing, tmp_path: Path) -> None:
    join = ring.join("worker", "tcp://[::1]:8787")
    join.write(tmp_path / "x.join")
    for text in (join.token(), join.token() + "\n", str(tmp_path / "x.join")):
        address, found = resolve(text)
        assert found is not None
        assert (address, found.role, found.name) == ("tcp://[::1]:8787", "worker", "worker")
        assert found.broker == ring.broker.public
        assert found.own.secret == join.own.secret
    (tmp_path / "x.join").chmod(0o644)
    with pytest.raises(ConfigError, match="open to others"):
        resolve(str(tmp_path / "x.join"))


def test_a_plain_address_has_no_keys(tmp_path: Path) -> None:
    assert resolve("tcp://h:1") == ("tcp://h:1", None)
    assert resolve("localhost") == ("localhost", None)
    path = tmp_path / "broker.json"
    path.write_text('{"address": "tcp://h:2"}')
    path.chmod(0o644)
    assert resolve(str(path)) == ("tcp://h:2", None)
    with pytest.raises(ConfigError, match="no such file"):
        resolve(str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError):
        resolve(str(tmp_path))


def test_a_spoilt_line_is_refused_without_showing_it(ring: KeyRing) -> None:
    token = ring.join("worker", "tcp://h:1").token()
    for bad in (
        token[:-20],
        token.replace("@tcp", "@ipc"),
        PREFIX,
        token.replace(":worker:", ":x:"),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve(bad)
        assert token[40:80] not in "".join(traceback.format_exception(caught.value))


def test_secrets_are_in_no_text(ring: KeyRing) -> None:
    join: Join = ring.join("worker", "tcp://h:1")
    secret = join.own.secret
    for thing in (join, join.own, ring, ring.member("worker")):
        assert secret.hex() not in repr(thing) + str(thing)
        assert repr(secret) not in repr(thing)
    for thing in (join, join.own):
        with pytest.raises(UsageError, match="never pickled"):
            pickle.dumps(thing)
    with pytest.raises(ConfigError):
        KeyPair(b"short", secret)


def test_the_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZFABRIC_KEYS", "~/else")
    assert default_directory() == Path.home() / "else"
    monkeypatch.delenv("ZFABRIC_KEYS")
    assert default_directory() == Path.home() / ".zfabric" / "keys"


def test_the_command_makes_lists_and_revokes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZFABRIC_KEYS", str(tmp_path / "keys"))

    def run(*words: str) -> str:
        result = CliRunner().invoke(group.cli, ["keys", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "zfabric broker --host 0.0.0.0" in run("init")
    run("add", "alice", "--role", "client")
    listed = run("list")
    assert [line.split()[:2] for line in listed.splitlines()] == [
        ["broker", "broker"],
        ["alice", "client"],
        ["client", "client"],
        ["worker", "worker"],
    ]
    ring = KeyRing(tmp_path / "keys")
    for member in ring.members():
        assert member.own.secret.hex() not in listed
    token = run("join", "alice", "--address", "tcp://h:1").strip()
    assert resolve(token)[0] == "tcp://h:1"
    run("revoke", "alice")
    assert "alice" not in run("list")
    with pytest.raises(ConfigError, match="no key named"):
        run("join", "alice", "--address", "tcp://h:1")
