"""Payloads of the rows by which the broker itself ends a task, as messages.Results defines them.

The broker never unpickles, so the errors that it makes are texts; the client turns them into
exceptions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from msgpack import packb, unpackb


def text_payload(text: str) -> bytes:
    """For LOST and UNFIT."""
    payload: bytes = packb([text])
    return payload


def killed_payload(text: str, attempts: Sequence[str]) -> bytes:
    """For KILLED."""
    payload: bytes = packb([text, list(attempts)])
    return payload


def stored_payload(nbytes: int, holders: Iterable[tuple[int, str]]) -> bytes:
    """For STORED: the size, and (worker number, data address) of each holder."""
    payload: bytes = packb([nbytes, [list(holder) for holder in holders]])
    return payload


def read_text(payload: bytes) -> str:
    """The text of a DIED row; a placeholder when the worker sent something else."""
    try:
        parts: Any = unpackb(payload)
        return str(parts[0])
    except Exception:  # a worker's free-form payload must not hurt the broker
        return "no details"
