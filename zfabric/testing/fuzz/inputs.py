"""Makes messages that are wrong in one way or another, from ones that are right, by a seed.

Three kinds: right messages with damaged bytes; right headers with bodies in which a field has
become something else; and bytes that were made up, with lengths that lie.
"""

from __future__ import annotations

from random import Random
from typing import Any

import hypothesis
from hypothesis import given
from msgpack import ExtType, packb, unpackb

from zfabric import messages as m
from zfabric import wire
from zfabric.testing import strategies
from zfabric.wire import PROTOCOL
from zfabric.wire.header import MAGIC

LIES = (
    b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1
    b"\xdf\xff\xff\xff\xff",  # a map of as many
    b"\xc6\xff\xff\xff\xff",  # as many bytes
    b"\xdb\x7f\xff\xff\xff",  # a text of 2 GiB
    b"\xc9\xff\xff\xff\xff\x01",  # an extension of 4 GiB
    b"\xc1",  # never used
    b"\x91" * 600,  # deep
    b"\x81\x90\x90",  # a map with an array for a key
    b"\xa2\xff\xfe",  # no UTF-8
    b"\xcf" + b"\xff" * 8,  # 2**64 - 1
    b"\xd3\x80" + b"\0" * 7,  # -2**63
    b"\xcb\x7f\xf0" + b"\0" * 6,  # infinity
)

STRANGERS = (
    b"",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x55" * 64,  # TLS hello
    b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + b"\0" * 48,  # ZMTP 3.0 greeting
    b"\xff\0\0\0\0\0\0\0\1\x7f\1\5",  # ZMTP 2.0
    b"\1\0\2\0\x7a\xfb",  # ZMTP 1.0
    b"\xff" + b"\xff" * 8 + b"\1",  # a frame of 2**64 - 1 bytes
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x80\x05cos\nsystem\n(S'false'\ntR.",  # a pickle
)

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**63, 2**64 - 1, 1e308, float("nan"), "", "x" * 5000, b"", b"\0" * 7,
    b"\xff" * 64, [], [[]], [[0, [1]]], [[2**63, b""]], {}, {"a": 1}, ExtType(1, b"x"),
    ["\ud800".encode("utf-8", "surrogatepass")],
)  # fmt: skip


def examples(n: int) -> list[m.Message]:
    """At least n right messages, of every kind, always the same."""
    found: list[m.Message] = []

    for kind, strategy in strategies.BY_KIND.items():

        @hypothesis.settings(
            max_examples=n,
            database=None,
            derandomize=True,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @given(strategy)
        def collect(message: Any) -> None:
            found.append(message)

        collect()
        assert type(found[-1]) is kind
    return found


class Inputs:
    """Wrong messages without end; the same ones for the same seed.

    message(): frames of a stranger's.  body(): a message for a session that exists, which may be
    right by accident, as (kind's frames without header, kind number, whether it has a number).
    """

    def __init__(self, seed: int, per_kind: int = 12) -> None:
        self._random = Random(f"{seed}/fuzz")
        self._bodies = [wire.encode_body(message) for message in examples(per_kind)]

    def message(self) -> list[bytes]:
        """Frames with any header."""
        random = self._random
        if random.random() < 0.15:
            return [self.noise() for _ in range(random.randrange(5))]
        body = random.choice(self._bodies)
        header = [
            MAGIC,
            PROTOCOL,
            body.kind,
            random.choice((0, 1, 2, random.getrandbits(63))),
            random.choice((0, 1, random.getrandbits(32))),
            random.choice((0, 1, 2**63 - 1)),
            random.choice((0, 1, 2**63 - 1)),
        ]
        if random.random() < 0.3:
            header[random.randrange(7)] = random.choice(ODD)
        frames = [packb(header), *self._harmed([bytes(frame) for frame in body.frames])]
        return self._damaged(frames) if random.random() < 0.5 else frames

    def body(self) -> tuple[int, bool, list[bytes]]:
        """(kind, whether it is in sequence, frames behind the header)."""
        body = self._random.choice(self._bodies)
        frames = [bytes(frame) for frame in body.frames]
        if self._random.random() < 0.6:
            frames = self._harmed(frames)
        return body.kind, body.sequenced, frames

    def noise(self) -> bytes:
        """Bytes that are no message."""
        random = self._random
        choice = random.random()
        if choice < 0.4:
            return random.choice(STRANGERS)
        if choice < 0.7:
            return b"".join(random.choice(LIES) for _ in range(random.randrange(1, 4)))
        return random.randbytes(random.choice((1, 8, 64, 700)))

    def _harmed(self, frames: list[bytes]) -> list[bytes]:
        """One field of the body is something else."""
        random = self._random
        fields = unpackb(frames[0], strict_map_key=False)
        choice = random.random()
        if choice < 0.6 and fields:
            fields[random.randrange(len(fields))] = random.choice(ODD)
        elif choice < 0.7:
            fields.append(random.choice(ODD))
        elif choice < 0.8 and fields:
            fields.pop()
        elif choice < 0.9:
            raw = packb(fields)
            at = random.randrange(len(raw) + 1)
            return [raw[:at] + random.choice(LIES) + raw[at:], *frames[1:]]
        else:
            return [frames[0], *frames[1:], b"more"]
        return [packb(fields), *frames[1:]]

    def _damaged(self, frames: list[bytes]) -> list[bytes]:
        random = self._random
        which = random.randrange(len(frames))
        frame = frames[which]
        at = random.randrange(len(frame) + 1)
        choice = random.randrange(6)
        if choice == 0 and at < len(frame):
            changed = frame[at] ^ (1 << random.randrange(8))
            frames[which] = frame[:at] + bytes([changed]) + frame[at + 1 :]
        elif choice == 1:
            frames[which] = frame[:at]
        elif choice == 2:
            frames[which] = frame[:at] + self.noise() + frame[at:]
        elif choice == 3:
            del frames[which]
        elif choice == 4:
            frames.insert(which, frame)
        else:
            random.shuffle(frames)
        return frames
