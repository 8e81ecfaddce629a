"""What a broker tells people of itself: pictures of a fabric without progress, and what it has
heard of late."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core.dump import picture
from zfabric.core.scheduler import Scheduler
from zfabric.core.watchdog import Watchdog
from zfabric.core.why import Silence

RECENT = 512
"""Messages whose kinds and first ids are remembered for a report."""


class Report:
    """Keeps the last messages, and looks whether the fabric gets on."""

    def __init__(self, scheduler: Scheduler, settings: Settings, now: float) -> None:
        self.stalls: list[dict[str, Any]] = []
        """Pictures of the state at each stall that was noticed since they were last taken."""
        self._scheduler = scheduler
        self._watchdog = Watchdog(settings, now)
        self._recent: deque[tuple[float, str, str, Sequence[int]]] = deque(maxlen=RECENT)
        self._started = now

    def heard(self, now: float, name: str, message: m.Message) -> None:
        """A message of that peer was let through."""
        ids: Sequence[int] = getattr(message, "ids", ())
        self._recent.append((now, name, type(message).__name__, ids[:4]))

    def look(self, now: float, asleep_s: float, silent_s: Silence) -> str:
        """A warning when the fabric stands still, else ""; then there is a picture of it, too."""
        stall = self._watchdog.look(self._scheduler, now, asleep_s)
        if stall:
            self.stalls.append(self._picture(stall, now, silent_s))
        return stall

    def times(self, now: float) -> dict[str, float]:
        """Seconds that it has been running, and without progress."""
        return {
            "stalled_s": round(self._watchdog.stalled_s(now), 3),
            "uptime_s": round(now - self._started, 3),
        }

    def _picture(self, stall: str, now: float, silent_s: Silence) -> dict[str, Any]:
        began = self._started
        recent = [
            (round(at - began, 6), f"{name}: {kind} {' '.join(f'{id_:x}' for id_ in ids)}")
            for at, name, kind, ids in self._recent
        ]
        state = picture(self._scheduler, silent_s)
        return {"stall": stall, "at_s": round(now - began, 3), "recent": recent, **state}
