"""Which session a key may hold. A broker without keys has no Admission, and takes everybody.

A user is a text `role:name:fingerprint`, made by whoever checks keys; two keys never share one.
A session belongs to the user that opened it: its token alone, overheard or guessed, is worth
nothing to another key. Whoever holds a worker's key may also be a client, since tasks submit tasks;
the other way round it would let clients read what is meant for workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from zfabric import messages as m

Peer = bytes

REVOKED = (
    "this key is not admitted (any more): it was revoked, or never added;"
    " `zfabric keys list` where the broker runs shows those that are"
)


class Admission:
    """identify: whose key a connection came in with.  users: those that are admitted now.

    keys: the public keys that workers admit at their data doors: all that are admitted here.
    """

    def __init__(self, identify: Callable[[Peer], str], max_sessions: int) -> None:
        self.identify = identify
        self.users: frozenset[str] = frozenset()
        self.keys: tuple[bytes, ...] = ()
        self._max_sessions = max_sessions
        self._sessions: Counter[str] = Counter()

    def admit(self, users: frozenset[str], keys: Sequence[bytes]) -> bool:
        """From now on these. Whether that is a change."""
        if (users, tuple(keys)) == (self.users, self.keys):
            return False
        self.users, self.keys = users, tuple(keys)
        return True

    def why_not(self, user: str, role: str) -> m.Refuse | None:
        """Why this user gets no session in that role."""
        if user not in self.users:
            return m.Refuse("key", REVOKED)
        own = role_of(user)
        if own != m.WORKER and own != role:
            return m.Refuse("role", f"this is a {own}'s key, and no key to be a {role} with")
        if self._sessions[user] >= self._max_sessions:
            return m.Refuse(
                "sessions",
                f"this key has {self._max_sessions} sessions, and more are not allowed; give its"
                " holders keys of their own, or start the broker with ZFABRIC_SESSIONS_PER_KEY=...",
            )
        return None

    def opened(self, user: str) -> None:
        """A session of this user began."""
        self._sessions[user] += 1

    def ended(self, user: str) -> None:
        """A session of this user ended."""
        self._sessions[user] -= 1
        if not self._sessions[user]:
            del self._sessions[user]


def user_text(role: str, name: str, mark: str) -> str:
    """The user of a key.  mark: what tells this key from others of that name."""
    return f"{role}:{name}:{mark}"


def role_of(user: str) -> str:
    return user.partition(":")[0]
