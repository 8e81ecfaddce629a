"""The one place where the time is read; machines get it as an argument."""

from __future__ import annotations

from time import monotonic
from typing import Protocol


class Clock(Protocol):
    """Anything that tells seconds since some fixed moment and never runs backwards."""

    def __call__(self) -> float: ...


now_s: Clock = monotonic
"""Monotonic seconds: wall-clock jumps, daylight saving and NTP steps leave it alone."""
