"""What the broker knows of one session, and how long it waits for one that is silent."""

from __future__ import annotations

from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core.direct import DirectSession
from zfabric.core.journal import SavedSession
from zfabric.core.placement import WorkerRecord
from zfabric.core.session import Session

Peer = bytes


class SessionRecord:
    """What the broker knows of one session."""

    __slots__ = (
        "gone_at",
        "hello",
        "is_restored",
        "name",
        "number",
        "peer",
        "peers",
        "resumed",
        "session",
        "user",
    )

    def __init__(
        self, number: int, name: str, hello: m.Hello, session: Session | DirectSession
    ) -> None:
        self.number = number
        self.name = name
        self.hello = hello
        self.session = session
        self.peer: Peer | None = None
        """The connection that its messages go out on; None when that one broke."""
        self.peers: list[Peer] = []
        """The connections that it was heard on and that are not known to be broken."""
        self.gone_at: float | None = None
        self.user = ""
        """Whose key it was opened with; "" where there are no keys."""
        self.is_restored = False
        """It began with a broker before this one."""
        self.resumed = False
        """Its peer goes on with the tasks that it had."""

    @property
    def direct(self) -> bool:
        """Whether it lives in this process."""
        return isinstance(self.session, DirectSession)


def patience(record: SessionRecord, settings: Settings) -> tuple[float, float]:
    """Seconds that a peer may be without a connection, and silent, before it is given up.

    Rows of a worker that was killed should soon run elsewhere, and what it has if it comes
    back later is not lost (core.resync). Users want to find their results when a network
    returns. A client inside a task ends with that, as a rule.
    """
    if record.hello.role == m.WORKER:
        return settings.grace_s, settings.dead_s
    if record.hello.depth:
        return max(settings.grace_s, settings.suspect_s), settings.dead_s
    lease_s = max(settings.grace_s, settings.lease_s)
    return lease_s, max(settings.dead_s, lease_s)


def saved_session(record: SessionRecord, counter: int | None) -> SavedSession:
    """A client's session for the journal. counter: of its ClientRecord."""
    session, hello = record.session, record.hello
    received = session.received if isinstance(session, Session) else 0
    return SavedSession(
        session.token,
        record.number,
        record.name,
        hello.depth,
        hello.run,
        received,
        record.user,
        counter or 0,
    )


def worker_record(number: int, name: str, hello: m.Hello, now: float) -> WorkerRecord:
    """A worker that has just come, for the scheduler."""
    worker = WorkerRecord(
        number,
        name,
        hello.slots,
        threads=hello.threads,
        resources=dict(hello.resources),
        data_address=hello.data_address,
        host=hello.host,
        pid=hello.pid,
        now=now,
    )
    if hello.previous:
        worker.credit = 0  # until it has told what it holds
    return worker
