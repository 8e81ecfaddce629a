"""The commands: `zfabric broker | worker | demo | status | why | runs | replay | keys`.

One file per command. Each parses its options and hands plain arguments to the room that does the
work; that room is imported when the command runs, so `zfabric --help` stays quick.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """The console script. Ends the process with the command's exit status."""
    from zfabric.cli.group import run

    _open_what_is_closed()
    run()


def _open_what_is_closed() -> None:
    """Some service managers start processes without standard streams. What is written to them is
    then for nobody, and no socket may take their place."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is fd
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))
