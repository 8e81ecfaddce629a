"""How to join a fabric that has keys: its address, its broker's public key, a pair of one's own.

It comes as a file (mode 0600), or as one line of text, which is a secret all the same: it belongs
into a file, a pipe or the environment rather than on a command line, where `ps` shows it.
"""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zfabric.errors import ConfigError, UsageError
from zfabric.keys.files import read_private, read_secret, write_secret
from zfabric.keys.pair import KEY_BYTES, KeyPair, fingerprint, key_bytes

PREFIX = "zfabric-join:"

ROLES = ("client", "worker")


class Join:
    """address: of the broker, tcp.  broker: its public key.  role, name, own: of the key here."""

    __slots__ = ("address", "broker", "name", "own", "role")

    def __init__(self, address: str, role: str, name: str, broker: bytes, own: KeyPair) -> None:
        self.address = address
        self.role = role
        self.name = name
        self.broker = broker
        self.own = own

    def __repr__(self) -> str:
        return f"<Join {self.address} as {self.role} {self.name} {fingerprint(self.own.public)}>"

    def __reduce__(self) -> Any:
        raise UsageError("a key is never pickled; hand on the path of the join file")

    def token(self) -> str:
        """One line that says it all. A secret."""
        keys = self.broker + self.own.public + self.own.secret
        text = base64.urlsafe_b64encode(keys).decode()
        return f"{PREFIX}{self.role}:{self.name}:{text}@{self.address}"

    def write(self, path: Path) -> None:
        """Into a file, 0600, in the place of one that may be there."""
        content = {
            "address": self.address,
            "role": self.role,
            "name": self.name,
            "broker": self.broker.hex(),
            "public": self.own.public.hex(),
            "secret": self.own.secret.hex(),
        }
        write_secret(path, content, replace=True)


def resolve(text: str) -> tuple[str, Join | None]:
    """What a user gave as the address of a fabric, as (address, keys or None).

    text: an address, a join line, or the path of a join file or connection file.
    Raises ConfigError; the text of a join line is in no error.
    """
    if text.startswith(PREFIX):
        join = parse_token(text.strip())
        return join.address, join
    if "://" in text:
        return text, None
    path = Path(text).expanduser()
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError):
        if "/" in text or text.endswith((".join", ".json")):
            raise ConfigError(f"{text} is no address, and there is no such file") from None
        return text, None  # the transports say what is wrong with it
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{text} is neither an address nor a regular file")
    return read_file(path)


def read_file(path: Path) -> tuple[str, Join | None]:
    """The same of a file, also of one that holds a join line; one without keys may be open to
    others."""
    content = _plain(path)
    if content is None:
        raw = read_private(path)
        if raw.startswith(PREFIX.encode()):
            join = parse_token(raw.decode("ascii", "replace").strip())
            return join.address, join
        content = read_secret(path)
    address = content.get("address")
    if not isinstance(address, str) or "://" not in address:
        raise ConfigError(f"{path} names no address; it is no join or connection file")
    if "secret" not in content:
        return address, None
    return address, _from_fields(path, address, content)


def parse_token(text: str) -> Join:
    """A join line. Raises ConfigError."""
    head, at, address = text.removeprefix(PREFIX).partition("@")
    role, _, rest = head.partition(":")
    name, _, keys = rest.partition(":")
    try:
        raw = base64.b64decode(keys.encode(), altchars=b"-_", validate=True)
    except ValueError:
        raw = b""
    if not at or role not in ROLES or not name or len(raw) != 3 * KEY_BYTES:
        raise ConfigError("this join line was cut off or changed; copy all of it") from None
    broker, public, secret = (raw[n : n + KEY_BYTES] for n in range(0, len(raw), KEY_BYTES))
    _check_address(address)
    return Join(address, role, name, broker, KeyPair(public, secret))


def _from_fields(path: Path, address: str, content: Mapping[str, Any]) -> Join:
    role, name = content.get("role"), content.get("name")
    if role not in ROLES or not isinstance(name, str):
        raise ConfigError(f"{path} is no join file: it has no role or name")
    _check_address(address)
    pair = KeyPair(key_bytes(content.get("public")), key_bytes(content.get("secret")))
    return Join(address, role, name, key_bytes(content.get("broker")), pair)


def _check_address(address: str) -> None:
    if not address.startswith("tcp://"):
        raise ConfigError(f"keys go with tcp://, and {address.partition('://')[0]}:// has none")


def _plain(path: Path) -> dict[str, Any] | None:
    """A connection file without secrets; None where it has some, or cannot be read so easily."""
    try:
        if path.stat().st_mode & 0o077 == 0 or os.path.islink(path):
            return None
        import json

        content = json.loads(path.read_bytes()[:65536])
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and "secret" not in content else None
