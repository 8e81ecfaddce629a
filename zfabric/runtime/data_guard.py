"""Keys at the doors of workers, and at whoever dials brokers and workers."""

from __future__ import annotations

import logging

from zfabric.keys import KeyPair
from zfabric.transport import Listener, sodium
from zfabric.transport.curve import ClientKeys, ServerKeys

log = logging.getLogger(__name__)


class DataGuard:
    """Admits at a worker's data door: its pair lives as long as the worker, and the broker says
    whose keys are admitted. Each comes in with its own key, so that revoking one needs no new
    secrets for the others, and no secret is ever handed out."""

    def __init__(self) -> None:
        self._pair = KeyPair.new()
        self._users: dict[bytes, str] = {}
        self.security = ServerKeys(
            self._pair.public, self._pair.secret, self._admit, self._is_admitted
        )

    @property
    def public(self) -> bytes:
        return self._pair.public

    def admit(self, keys: tuple[bytes, ...], listener: Listener | None) -> None:
        """From now on these, and no others."""
        self._users = {key: key.hex() for key in keys}
        if listener is not None:
            listener.evict(self._is_admitted)

    def close(self) -> None:
        self.security.close()

    def _admit(self, key: bytes) -> str:
        return self._users.get(key, "")

    def _is_admitted(self, user: str) -> bool:
        return bytes.fromhex(user) in self._users


def warn_of_slow_encryption() -> None:
    """Say so where large values will wait for libsodium rather than for the network."""
    text = sodium.warning(sodium.speed())
    if text:
        log.warning("%s", text)


def client_keys(broker: bytes, own: KeyPair) -> ClientKeys:
    """For dialling a listener with that public key."""
    return ClientKeys(broker, own.public, own.secret)
