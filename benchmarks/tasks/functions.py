"""What the tasks do. In a module of their own, so that every peer's workers can import them."""

from __future__ import annotations


def nop(x: object = None) -> None:
    """Nothing."""


def increment(x: int) -> int:
    """One link of a chain."""
    return x + 1


def add(a: int, b: int) -> int:
    """One node of a tree."""
    return a + b


def small(x: int) -> dict[str, object]:
    """A result of about 150 bytes as a pickle."""
    return {"index": x, "name": "a small result", "values": [x, x + 1, x + 2], "text": "." * 64}
