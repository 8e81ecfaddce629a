"""The directory of a fabric's keys: the broker's own, and one file per key that it admits.

    ~/.zfabric/keys/          0700
        broker.key            the broker's pair
        worker.key            a key with the role "worker", named worker
        client.key
        worker.join           how to join with it: written when the broker listens

A key is revoked by taking its file away, which a running broker notices by the directory's times.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from zfabric.errors import ConfigError
from zfabric.keys.files import check_directory, make_directory, read_secret, write_secret
from zfabric.keys.join import ROLES, Join
from zfabric.keys.pair import KeyPair, key_bytes

BROKER = "broker"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Member(NamedTuple):
    """A key that the broker admits."""

    name: str
    role: str
    own: KeyPair


class KeyRing:
    """The keys of one fabric, as their directory says now."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError where the directory or the broker's key is missing or open to
        others."""
        self.directory = directory
        check_directory(directory)
        self.broker = _pair(directory / f"{BROKER}.key", BROKER)

    @classmethod
    def create(cls, directory: Path) -> KeyRing:
        """A new one, with a broker's key and nothing else. Raises ConfigError for one that is
        there."""
        make_directory(directory)
        _write(directory / f"{BROKER}.key", BROKER, BROKER)
        return cls(directory)

    def add(self, name: str, role: str) -> Member:
        """Make a key that is admitted from now on. Raises ConfigError for a name in use."""
        if not _NAME.fullmatch(name) or name == BROKER:
            raise ConfigError(
                f"{name!r} cannot be a key's name: letters, digits and ._- only, and not {BROKER}"
            )
        if role not in ROLES:
            raise ConfigError(f"the role of a key is client or worker, not {role!r}")
        _write(self._path(name), name, role)
        return self.member(name)

    def revoke(self, name: str) -> None:
        """Admit it no longer. Raises ConfigError when there is no such key."""
        path = self._path(name)
        if name == BROKER or not _NAME.fullmatch(name) or not path.exists():
            raise ConfigError(f"there is no key named {name!r} in {self.directory}")
        path.unlink()
        path.with_suffix(".join").unlink(missing_ok=True)

    def member(self, name: str) -> Member:
        """The key of that name. Raises ConfigError."""
        if not _NAME.fullmatch(name) or not self._path(name).exists():
            raise ConfigError(f"there is no key named {name!r} in {self.directory}")
        return _member(self._path(name))

    def members(self, broken: list[str] | None = None) -> list[Member]:
        """All that are admitted, by name.

        broken: gets a text for each file that will not do; without it, that raises ConfigError.
        """
        found = []
        for path in self._paths():
            try:
                found.append(_member(path))
            except ConfigError as exc:
                if broken is None:
                    raise
                broken.append(str(exc))
        return found

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Changes whenever a key comes, goes or changes, its mode and owner included. Raises
        OSError."""
        return tuple(
            sorted(
                (entry.name, (found := entry.stat(follow_symlinks=False)).st_ctime_ns, found.st_ino)
                for entry in os.scandir(self.directory)
                if entry.name.endswith(".key")
            )
        )

    def join(self, name: str, address: str) -> Join:
        """How to join with that key. Raises ConfigError."""
        member = self.member(name)
        return Join(address, member.role, member.name, self.broker.public, member.own)

    def join_path(self, name: str) -> Path:
        """Where a running broker writes how to join with that key."""
        return self._path(name).with_suffix(".join")

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.key"

    def _paths(self) -> Iterator[Path]:
        for path in sorted(self.directory.glob("*.key")):
            if not path.name.startswith(".") and path.stem != BROKER:
                yield path


def default_directory() -> Path:
    """$ZFABRIC_KEYS, else ~/.zfabric/keys."""
    named = os.environ.get("ZFABRIC_KEYS")
    return Path(named).expanduser() if named else Path.home() / ".zfabric" / "keys"


def _write(path: Path, name: str, role: str) -> None:
    pair = KeyPair.new()
    content = {"name": name, "role": role, "public": pair.public.hex(), "secret": pair.secret.hex()}
    write_secret(path, content)


def _pair(path: Path, role: str) -> KeyPair:
    content = read_secret(path)
    if content.get("role") != role:
        raise ConfigError(f"{path} holds no {role}'s key")
    return KeyPair(key_bytes(content.get("public")), key_bytes(content.get("secret")))


def _member(path: Path) -> Member:
    content = read_secret(path)
    role = content.get("role")
    if role not in ROLES:
        raise ConfigError(f"{path}: the role of a key is client or worker")
    pair = KeyPair(key_bytes(content.get("public")), key_bytes(content.get("secret")))
    return Member(path.stem, str(role), pair)
