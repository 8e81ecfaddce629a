"""What tasks and values may take of the broker's memory: per session, per key, and together.

Each session's bytes are counted as they come and go (`ClientRecord.nbytes`): what its tasks carry
and came to, the blobs of its functions, and TASK_NBYTES for each record. Sums over sessions are
made anew at each tick; in between a Submit counts at once, and results when the next tick comes.

What does not fit is not taken in, and its rows end at once. Rows that waited would hold up all that
comes behind them in the session: the very Release that would make room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from zfabric.config import Settings
from zfabric.core.tasks import ClientRecord


class Quota:
    """The sums, and what they may be."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.nbytes = 0
        """Of all sessions."""
        self.refused = 0
        """Rows that were not taken in."""
        self._by_user: Counter[str] = Counter()
        self._departed: list[ClientRecord] = []
        """Sessions that ended, some of whose values others still need."""

    def left(self, client: ClientRecord) -> None:
        """A session ended."""
        if client.nbytes > 0:
            self._departed.append(client)

    def recount(self, clients: Iterable[ClientRecord]) -> None:
        """Make the sums anew."""
        self._departed = [client for client in self._departed if client.nbytes > 0]
        by_user: Counter[str] = Counter()
        self.nbytes = 0
        for group in (clients, self._departed):
            for client in group:
                self.nbytes += client.nbytes
                if client.user:
                    by_user[client.user] += client.nbytes
        self._by_user = by_user

    def why_not(self, client: ClientRecord, nbytes: int) -> str:
        """Why so many more bytes cannot be taken from that session; "" when they can."""
        settings = self._settings
        if client.nbytes + nbytes > settings.session_bytes:
            return _text("this session", client.nbytes, "session_bytes", settings.session_bytes)
        if settings.broker_bytes and self.nbytes + nbytes > settings.broker_bytes:
            return _text("all sessions", self.nbytes, "broker_bytes", settings.broker_bytes)
        of_key = self._by_user[client.user] if client.user else 0
        if settings.key_bytes and client.user and of_key + nbytes > settings.key_bytes:
            return _text("the sessions of this key", of_key, "key_bytes", settings.key_bytes)
        self.nbytes += nbytes
        if client.user:
            self._by_user[client.user] += nbytes
        return ""


def _text(whose: str, nbytes: int, setting: str, limit: int) -> str:
    return (
        f"the broker has no room for it: tasks and small values of {whose} take"
        f" {nbytes / 1e6:.1f} of {limit / 1e6:.1f} MB ({setting}). Drop futures that are not needed"
        " any more, submit fewer at a time (map(..., max_inflight=...)), or start the broker with"
        f" a larger ZFABRIC_{setting.upper()}."
    )
