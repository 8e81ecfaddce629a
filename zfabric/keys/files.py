"""Files that hold secrets: made 0600 in a 0700 directory, and read only while they are.

pyzmq's own `create_certificates` leaves the secret to the umask, which makes it 0644 nearly
everywhere; hence this. A reader looks at the open descriptor and not at the path, so nobody can
exchange the file between the look and the read.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from zfabric.errors import ConfigError

MAX_BYTES = 64 * 1024


def make_directory(path: Path) -> None:
    """Make it 0700, or check the one that is there. Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"the directory {path} cannot be made: {exc.strerror}") from exc
    check_directory(path)


def check_directory(path: Path) -> None:
    """Raise ConfigError unless it is a directory of this user that nobody else can enter."""
    try:
        found = path.lstat()
    except OSError as exc:
        raise ConfigError(
            f"no keys at {path} ({exc.strerror}); make some: zfabric keys init"
        ) from exc
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path} is no directory (a link to one will not do)")
    _check_owner_and_mode(path, found, "700")


def write_secret(path: Path, content: dict[str, Any], *, replace: bool = False) -> None:
    """A new file with mode 0600, whole or not at all.

    replace: overwrite one that is there; else that raises ConfigError.
    """
    part = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o600)
        try:
            with os.fdopen(fd, "w") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                part.replace(path)
            else:
                os.link(part, path)  # unlike rename, it fails where something is
        finally:
            part.unlink(missing_ok=True)
    except FileExistsError:
        raise ConfigError(f"{path} is there already; it was left as it is") from None
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror}") from exc


def read_secret(path: Path) -> dict[str, Any]:
    """The JSON object in a file that only this user can read.

    Raises ConfigError as `read_private` does, and for other content. No error shows any of it.
    """
    raw = read_private(path)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no key file")
    return content


def read_private(path: Path) -> bytes:
    """The first MAX_BYTES of a file that only this user can read.

    Raises ConfigError for a link, another owner, and any right of group or others.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except OSError as exc:
        why = "it is a link" if path.is_symlink() else exc.strerror
        raise ConfigError(f"the key file {path} cannot be read: {why}") from None
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path} is no regular file")
        _check_owner_and_mode(path, found, "600")
        return file.read(MAX_BYTES)


def _check_owner_and_mode(path: Path, found: os.stat_result, wanted: str) -> None:
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to user {found.st_uid}, not to the one that runs this")
    if found.st_mode & 0o077:
        if stat.S_ISDIR(found.st_mode) and not any(path.iterdir()):
            raise ConfigError(f"{path} is open to others and empty: chmod {wanted} {path}")
        raise ConfigError(
            f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):o}): whoever could read"
            f" it may have the key. If you are sure that nobody did: chmod {wanted} {path}; else"
            " revoke the key and make a new one"
        )
