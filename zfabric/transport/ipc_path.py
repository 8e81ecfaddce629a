"""The file behind an `ipc://` address: who owns it, and what a crash left there."""

from __future__ import annotations

import contextlib
import fcntl
import os

from zfabric.errors import AddressInUse, ConfigError

MAX_PATH = 107
"""Bytes: `sun_path` has 108, one of them for the final NUL."""


def check_path(address: str) -> str:
    """The path in an ipc address. Raises ConfigError where it cannot be one."""
    path = address.partition("://")[2]
    if path.startswith("@"):
        raise ConfigError(
            f"{address}: abstract sockets have no permissions, so that everybody on this host"
            " could connect; use a path in a directory of yours (mode 0700)"
        )
    if len(os.fsencode(path)) > MAX_PATH:
        raise ConfigError(
            f"{address}: the path has {len(os.fsencode(path))} bytes, and the system takes"
            f" {MAX_PATH}; use a shorter directory, such as $XDG_RUNTIME_DIR or /tmp"
        )
    return path


class PathLock:
    """Ownership of a socket's path, as a lock on a file beside it.

    A second bind on the same path succeeds in ZeroMQ and silently takes the first one's peers.
    The lock goes with its process, so that what a crash left behind is in nobody's way.
    """

    def __init__(self, address: str) -> None:
        """Raises AddressInUse if a living listener owns it, ConfigError without a directory."""
        self._socket_path = check_path(address)
        self._path = self._socket_path + ".lock"
        while True:
            try:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as exc:
                raise ConfigError(
                    f"{address}: cannot make {self._path} ({exc.strerror}); the directory must"
                    " exist and be writable"
                ) from exc
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # An earlier owner may have unlinked the file between our open and our lock.
                if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                    self._fd = fd
                    return
            except BlockingIOError:
                os.close(fd)
                raise AddressInUse(
                    address, f"{address} is in use by a living process; choose another path"
                ) from None
            except FileNotFoundError:
                pass
            os.close(fd)

    def release(self) -> None:
        """Remove both files and give the path up. Twice is fine.

        libzmq unlinks a socket's file when it binds over it, but not when it is done with it.
        """
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                for path in (self._socket_path, self._path):  # while locked: they are ours
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
            finally:
                os.close(fd)
