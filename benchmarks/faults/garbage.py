"""Bytes that nobody should send, at a listening port: strangers, lies about sizes, and noise."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from random import Random

STRANGERS = (
    b"",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x55" * 64,  # a TLS hello
    b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + b"\0" * 48,  # a ZMTP greeting and no more
    b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + b"\0" * 48 + b"\2" + b"\xff" * 8,  # then 2**64 - 1 bytes
    struct.pack("<QQ", 1 << 62, 1 << 62),  # as frame counts and lengths of other protocols
    struct.pack("<QQQ", 2, 8, 8) + b"\xc1" * 16,  # right in shape, with bytes that mean nothing
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x80\x05cos\nsystem\n(S'false'\ntR.",  # a pickle
)


def throw(port: int, n: int, seed: int = 0, held: int = 20) -> int:
    """n connections to 127.0.0.1:port with a stranger's words or noise. The last `held` of them
    stay open and silent until the end. Returns how many were taken."""
    random, taken, silent = Random(seed), 0, []
    for number in range(n):
        kind = random.randrange(len(STRANGERS) + 3)
        if kind < len(STRANGERS):
            data = STRANGERS[kind]
        else:
            data = random.randbytes(random.choice((1, 9, 64, 5000, 100_000)))
        with suppress(OSError):
            peer = socket.create_connection(("127.0.0.1", port), timeout=2.0)
            taken += 1
            if number >= n - held:
                silent.append(peer)
            with suppress(OSError):
                peer.sendall(data)
            if number < n - held:
                peer.close()
    for peer in silent:
        peer.close()
    return taken
