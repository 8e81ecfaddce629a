"""The commands: `zfabric broker | worker | demo | status | why | runs | replay | keys`.

One file per command. Each parses its options and hands plain arguments to the room that does the
work; that room is imported when the command runs, so `zfabric --help` stays quick.
"""

from __future__ import annotations


def main() -> None:
    """The console script. Ends the process with the command's exit status."""
    from zfabric.cli.group import run

    run()
