"""The integers and tokens that name things, as types that cannot be mixed up.

A task id carries the number of the session that submitted it in its upper 23 bits and that
session's own counter in the lower 40 (63 in all, so that a signed field holds it). So a client
makes ids without asking anybody, and the broker sees whose task it is without a look-up. A value
has the id of the task that makes it.
"""

from __future__ import annotations

import os
from typing import NewType

TaskId = NewType("TaskId", int)
"""One call and the value it makes: `session << 40 | counter`, 64 bits, never used twice."""

SessionNumber = NewType("SessionNumber", int)
"""A client or worker as the broker counts them, from a random number on: 1 .. 2**23 - 1."""

SessionToken = NewType("SessionToken", int)
"""The 63 random bits that a peer puts in each message to say which session it speaks for."""

FunctionId = NewType("FunctionId", int)
"""The first 8 bytes of a function blob's BLAKE2b hash: equal blobs travel once."""

COUNTER_BITS = 40
SESSION_BITS = 23
MAX_SESSION = (1 << SESSION_BITS) - 1
MAX_COUNTER = (1 << COUNTER_BITS) - 1

TRY_BITS = 20
"""Attempts of one task under one broker have numbers of so many bits; above them is counted how
often a broker with a journal was started, so that none is given twice."""


def task_id(session: int, counter: int) -> TaskId:
    """The id of a session's `counter`-th task. Raises ValueError outside of either range."""
    if not 0 < session <= MAX_SESSION or not 0 <= counter <= MAX_COUNTER:
        raise ValueError(f"session {session} or counter {counter} does not fit a task id")
    return TaskId(session << COUNTER_BITS | counter)


def session_of(task: int) -> SessionNumber:
    """The session that submitted a task."""
    return SessionNumber(task >> COUNTER_BITS)


def counter_of(task: int) -> int:
    """A task's place in its session's own order of submission."""
    return task & MAX_COUNTER


def try_of(attempt: int) -> int:
    """An attempt's number for people: counted since the broker was started."""
    return attempt & (1 << TRY_BITS) - 1


def new_token() -> SessionToken:
    """63 fresh random bits, never 0 (0 on the wire means: no session yet)."""
    return SessionToken(int.from_bytes(os.urandom(8), "little") >> 1 or 1)
