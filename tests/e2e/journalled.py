"""A broker with a journal and one worker, in processes of their own, to be killed by tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


class Journalled:
    """broker: the process that serves now.  children: all that were started."""

    def __init__(self, directory: Path, **environ: str) -> None:
        """environ: of brokers, besides ours."""
        self._environ = environ
        self.directory = directory
        self.address = f"ipc://{directory}/broker"
        self.children: list[subprocess.Popen[str]] = []
        self.broker = self.start_broker()
        self.start("-m", "zfabric", "worker", self.address, "--slots", "5")

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        """An interpreter with these arguments, and this in its environment."""
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environ},
        )
        self.children.append(child)
        return child

    def start_broker(self) -> subprocess.Popen[str]:
        """One that listens, and goes on where the journal ends."""
        journal = str(self.directory / "journal")
        broker = self.start(
            *("-m", "zfabric", "broker", "--listen", self.address, "--journal", journal),
            **self._environ,
        )
        assert broker.stdout is not None
        assert "zfabric broker at" in broker.stdout.readline()
        return broker

    def kill_broker(self) -> None:
        """kill -9, and wait until it is gone."""
        self.broker.send_signal(signal.SIGKILL)
        self.broker.wait()

    def close(self) -> None:
        """End everything that was started."""
        for child in self.children:
            child.kill()
            child.communicate()
