"""Keys at the broker's door: which are admitted, and what happens when that changes.

The directory of keys is looked at twice a second, by the times of its files. A revoked key's
sessions end then, its connections are heard no more, and workers close their data doors to it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from zfabric.config import Settings
from zfabric.core.admission import Admission, user_text
from zfabric.core.broker import BrokerMachine
from zfabric.errors import ConfigError
from zfabric.keys import KeyRing, Member, default_directory
from zfabric.keys.pair import fingerprint
from zfabric.runtime.binding import is_loopback, split_tcp
from zfabric.runtime.data_guard import warn_of_slow_encryption
from zfabric.transport import Listener, zap
from zfabric.transport.curve import ServerKeys

log = logging.getLogger(__name__)

LOOK_S = 0.5


class BrokerGuard:
    """Admits those whose keys are in the ring.

    Make the listener with `security=guard.security`, then call `watch`; close it after the
    listener.
    """

    def __init__(self, ring: KeyRing) -> None:
        """Raises ConfigError where one of the keys cannot be read."""
        self.ring = ring
        self._stamp = ring.stamp()
        self._users = _by_key(ring.members())
        self._look_at = 0.0
        self._address = ""
        self._listener: Listener | None = None
        self._machine: BrokerMachine | None = None
        self.security = ServerKeys(
            ring.broker.public, ring.broker.secret, self._admit, self._is_admitted
        )

    def admission(self, listener: Listener, settings: Settings) -> Admission:
        """For the machine behind this listener."""
        self._listener = listener
        return Admission(listener.user_of, settings.sessions_per_key)

    def watch(self, machine: BrokerMachine, address: str, now: float) -> None:
        """Tell the machine who is admitted, and those how to join at this address."""
        self._machine = machine
        self._address = address
        warn_of_slow_encryption()
        self._tell(now)

    def look(self, now: float) -> float:
        """See whether keys came or went. Call it often; it looks twice a second. Returns when to
        call it again at the latest."""
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look(now)
        return self._look_at

    def _look(self, now: float) -> None:
        if zap.supervise():
            log.error("the service that admits keys had ended; started it again")
        try:
            stamp = self.ring.stamp()
        except FileNotFoundError:
            stamp = ()
        except OSError as exc:
            log.error("the keys cannot be looked at, those known stay: %s", exc)
            return
        if stamp == self._stamp:
            return
        self._stamp = stamp
        broken: list[str] = []
        self._users = _by_key(self.ring.members(broken))
        for text in broken:
            log.error("not admitted: %s", text)
        log.info("keys changed: %d are admitted", len(self._users))
        self._tell(now)

    def first_of_each_role(self) -> dict[str, str]:
        """The name of a key to join with, by role; the key named like its role if there is one."""
        found: dict[str, str] = {}
        for user in sorted(self._users.values(), reverse=True):
            role, name, _ = user.split(":")
            if found.get(role) != role:
                found[role] = name
        return found

    def evict(self) -> None:
        """Hear no more of those that were revoked; call it when they have been told."""
        if self._listener is not None:
            self._listener.evict(self._is_admitted)

    def close(self) -> None:
        self.security.close()

    def _tell(self, now: float) -> None:
        assert self._machine is not None
        self._machine.admit(frozenset(self._users.values()), tuple(self._users), now)
        for user in self._users.values():
            name = user.split(":")[1]
            try:
                self.ring.join(name, self._address).write(self.ring.join_path(name))
            except ConfigError as exc:
                log.error("%s", exc)

    def _admit(self, key: bytes) -> str:
        return self._users.get(key, "")

    def _is_admitted(self, user: str) -> bool:
        return user in self._users.values()


def ring_for(address: str, directory: str | None, insecure: bool) -> KeyRing | None:
    """The keys for a broker that listens at this address; None where it does without.

    directory: asked for by name.  Else those of $ZFABRIC_KEYS or ~/.zfabric/keys, where they are,
    for an address beyond this host. insecure: only those asked for.
    Raises ConfigError.
    """
    if directory is not None:
        if not address.startswith("tcp://"):
            raise ConfigError(f"keys go with tcp:// addresses, and {address} is none")
        return KeyRing(Path(directory))
    if insecure or not address.startswith("tcp://"):
        return None
    parts = split_tcp(address)
    usual = default_directory()
    if parts is None or is_loopback(parts[1]) or not usual.exists():
        return None
    return KeyRing(usual)


def _by_key(members: list[Member]) -> dict[bytes, str]:
    return {
        member.own.public: user_text(member.role, member.name, fingerprint(member.own.public))
        for member in members
    }
