"""A second host made of a network namespace, behind a link of a chosen speed. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

MBIT = 1_000_000


class Namespace:
    """One network namespace, joined with ours by a veth pair; `close` removes both."""

    def __init__(self, number: int = 0) -> None:
        """number: of several that one process makes; none of them reaches another."""
        # A network of its own, so that two runs do not meet.
        net = f"10.{137 + (os.getpid() // 250 + number) % 100}.{os.getpid() % 250}"
        self.here, self.there = f"{net}.1", f"{net}.2"
        self.name = f"zfbench{os.getpid()}-{number}"
        self._ours, self._theirs = f"zfa{os.getpid()}-{number}", f"zfb{os.getpid()}-{number}"
        _run("ip", "netns", "add", self.name)
        try:
            _run(
                *("ip", "link", "add", self._ours, "type", "veth"),
                *("peer", "name", self._theirs, "netns", self.name),
            )
            _run("ip", "addr", "add", f"{self.here}/24", "dev", self._ours)
            _run("ip", "link", "set", self._ours, "up")
            inside = ("ip", "-n", self.name)
            _run(*inside, "addr", "add", f"{self.there}/24", "dev", self._theirs)
            _run(*inside, "link", "set", self._theirs, "up")
            _run(*inside, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def throttle(self, mbit: int) -> None:
        """Both directions carry that many Mbit/s from now on."""
        # A bucket of two timer ticks: less would make the kernel's clock the narrow place.
        burst = max(64 * 1024, mbit * MBIT // 8 // 100)
        tbf = ("tbf", "rate", f"{mbit}mbit", "burst", str(burst), "latency", "100ms")
        _run("tc", "qdisc", "replace", "dev", self._ours, "root", *tbf)
        inside = ("ip", "netns", "exec", self.name)
        _run(*inside, "tc", "qdisc", "replace", "dev", self._theirs, "root", *tbf)

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs another one inside."""
        return ["ip", "netns", "exec", self.name, *argv]

    def close(self) -> None:
        subprocess.run(["ip", "link", "del", self._ours], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


def missing() -> str:
    """Why no namespace can be made here; "" if it can."""
    if os.geteuid() != 0:
        return "throttled links need root (network namespaces); only loopback is measured"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is missing (apt install iproute2); only loopback is measured"
    return ""


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(argv)}: {done.stderr.strip()}")
