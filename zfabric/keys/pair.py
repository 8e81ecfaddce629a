"""A Curve25519 pair, as CURVE wants it. Its secret shows in no text that is made of it."""

from __future__ import annotations

from typing import Any

from zfabric.errors import ConfigError, UsageError

KEY_BYTES = 32


class KeyPair:
    """public, secret: 32 bytes each."""

    __slots__ = ("public", "secret")

    def __init__(self, public: bytes, secret: bytes) -> None:
        """Raises ConfigError when one has not 32 bytes."""
        if len(public) != KEY_BYTES or len(secret) != KEY_BYTES:
            raise ConfigError("a key has 32 bytes; this one was cut off or is none")
        self.public = public
        self.secret = secret

    @classmethod
    def new(cls) -> KeyPair:
        """A fresh one, from the system's randomness."""
        import zmq
        from zmq.utils import z85

        public, secret = zmq.curve_keypair()
        return cls(z85.decode(public), z85.decode(secret))

    def __repr__(self) -> str:
        return f"<KeyPair {fingerprint(self.public)}>"

    def __reduce__(self) -> Any:
        raise UsageError("a key is never pickled; hand on the path of its file")


def fingerprint(public: bytes) -> str:
    """The first 8 bytes in hex: enough for people to tell keys apart."""
    return public[:8].hex()


def key_bytes(text: object) -> bytes:
    """The 32 bytes of a key in hex. Raises ConfigError, without the text in it."""
    try:
        key = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError("a key is 64 hex digits; this one was cut off or is none")
    return key
