"""Child processes of a test or benchmark, ended without leaving one behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

PATIENCE_S = 10.0


def end(processes: Sequence[subprocess.Popen[Any]], patience_s: float = PATIENCE_S) -> None:
    """Ask all with SIGTERM, in the order given, also those that are stopped; kill each that has not
    ended after `patience_s`. Their pipes are closed."""
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            process.terminate()
    for process in processes:
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(OSError):  # what was still to be written, to one that has ended
                    pipe.close()
