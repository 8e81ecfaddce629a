"""What a broker answers to a Hello."""

from __future__ import annotations

from zfabric import messages as m
from zfabric.ids import MAX_SESSION
from zfabric.wire import PROTOCOL, Header


def why_not(
    header: Header, hello: m.Hello, *, version: str, python: str, next_number: int
) -> m.Refuse | None:
    """Why there can be no such session; None: it may begin.

    version, python: the broker's.  next_number: that the session would have.
    """
    if header.version != PROTOCOL or (
        hello.python.split(".")[:2] != python.split(".")[:2] and python
    ):
        rows = (
            ("", "broker", hello.role),
            ("protocol", str(PROTOCOL), str(header.version)),
            ("zfabric", version, hello.zfabric),
            ("python", python, hello.python),
        )
        table = "\n".join(f"  {what:<10}{ours:<14}{theirs}" for what, ours, theirs in rows)
        return m.Refuse(
            "version",
            "the broker and this "
            f"{hello.role} do not fit together; install the same zfabric and Python "
            f"(major.minor) on both sides:\n{table}",
        )
    if header.token == 0 or (hello.role == m.WORKER and hello.slots < 1):
        return m.Refuse("hello", "a session needs a token, and a worker at least one slot")
    if next_number > MAX_SESSION:
        return m.Refuse("full", "this broker has had all the sessions it can number; restart it")
    return None
