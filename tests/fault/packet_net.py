"""Hosts made of network namespaces, and a wire between them that does to packets what wires do.

Each host has a TUN device whose other end is here: a thread reads every packet and passes it on to
the host that it is for, or does not, by the rule for that pair of hosts and that direction. So a
partition of two hosts among several, a direction of it, loss, delay, a new order, doubles and
damage need no kernel module. Needs root, `ip` and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple

_TUNSETIFF = 0x400454CA
_TUN_WITHOUT_HEADER = 0x1001
_IP_HEADER = 20


class Way(NamedTuple):
    """One direction between two hosts. loss, double, damage: probabilities of a packet.
    delay_s, jitter_s: seconds; jitter is drawn per packet, so that packets overtake one another.
    rate: bytes per second, 0: any."""

    loss: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    double: float = 0.0
    damage: float = 0.0
    rate: float = 0.0


CLEAR = Way()
CUT = Way(loss=1.0)


class PacketNetwork:
    """Hosts by name; "here" is this process's own namespace.

    address: IPv4 address by name.  counts: packets "passed", "lost", "doubled", "damaged".
    """

    def __init__(self, *hosts: str, seed: int = 0) -> None:
        self.counts: Counter[str] = Counter()
        self.address: dict[str, str] = {}
        self._tag = f"{os.getpid() % 100_000}"
        self._namespaces: list[str] = []
        self._fds: dict[bytes, int] = {}
        self._hosts = ("here", *hosts)
        self._raw: dict[str, bytes] = {}
        self._ways: dict[tuple[bytes, bytes], Way] = {}
        self._free_at: dict[tuple[bytes, bytes], float] = {}
        self._late: list[tuple[float, int, int, bytes]] = []
        self._n_late = 0
        self._random = random.Random(seed)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="packet-net", daemon=True)
        try:
            for number, host in enumerate(self._hosts, 1):
                self._add(number, host)
        except BaseException:
            self._remove()
            raise
        self._thread.start()

    def _add(self, number: int, host: str) -> None:
        pid = os.getpid()
        raw = bytes([10, 64 + pid // 256 % 64, pid % 256, number])
        device = f"zft{self._tag}-{number}"
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._fds[raw], self._raw[host] = fd, raw
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TUN_WITHOUT_HEADER))
        ip = ["ip"]
        if host != "here":
            namespace = f"zft{self._tag}-{host}"
            _run("ip", "netns", "add", namespace)
            self._namespaces.append(namespace)
            _run("ip", "link", "set", device, "netns", namespace)
            ip += ["-n", namespace]
            _run(*ip, "link", "set", "lo", "up")
        self.address[host] = ".".join(map(str, raw))
        _run(*ip, "addr", "add", f"{self.address[host]}/24", "dev", device)
        _run(*ip, "link", "set", device, "up")

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs another one at a host."""
        return list(argv) if host == "here" else [*self._enter(host), *argv]

    def _enter(self, host: str) -> list[str]:
        return ["ip", "netns", "exec", f"zft{self._tag}-{host}"]

    def set(self, source: str, target: str, way: Way) -> None:
        """What packets from one host to another meet from now on."""
        self._ways[self._raw[source], self._raw[target]] = way

    def between(self, one: str, other: str, way: Way) -> None:
        """The same in both directions."""
        self.set(one, other, way)
        self.set(other, one, way)

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._remove()

    def _remove(self) -> None:
        for fd in self._fds.values():
            os.close(fd)  # and its device is gone
        for namespace in self._namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
        os.close(self._stop)

    def _run(self) -> None:
        poll = select.poll()
        for fd in [*self._fds.values(), self._stop]:
            poll.register(fd, select.POLLIN)
        while True:
            wait_ms = None
            if self._late:
                wait_ms = max(0.0, self._late[0][0] - monotonic()) * 1000
            for fd, _ in poll.poll(wait_ms):
                if fd == self._stop:
                    return
                for _ in range(64):
                    try:
                        packet = os.read(fd, 65536)
                    except OSError:
                        break
                    self._take(packet)
            now = monotonic()
            while self._late and self._late[0][0] <= now:
                _, _, fd, packet = heapq.heappop(self._late)
                self._pass(fd, packet)

    def _take(self, packet: bytes) -> None:
        pair = source, target = packet[12:16], packet[16:20]
        if packet[0] >> 4 != 4 or target not in self._fds or source not in self._fds:
            return
        way, rng = self._ways.get(pair, CLEAR), self._random
        if rng.random() < way.loss:
            self.counts["lost"] += 1
            return
        if len(packet) > 60 and rng.random() < way.damage:
            self.counts["damaged"] += 1
            at = rng.randrange(_IP_HEADER, len(packet))
            packet = packet[:at] + bytes([packet[at] ^ 1 << rng.randrange(8)]) + packet[at + 1 :]
        times = 1
        if rng.random() < way.double:
            self.counts["doubled"] += 1
            times = 2
        for _ in range(times):
            wait_s = way.delay_s + way.jitter_s * rng.random()
            if way.rate:
                now = monotonic()
                begin = max(now, self._free_at.get(pair, 0.0))
                self._free_at[pair] = begin + len(packet) / way.rate
                wait_s += self._free_at[pair] - now
                if begin - now > 1.0:  # a queue has an end
                    self.counts["lost"] += 1
                    continue
            if not wait_s:
                self._pass(self._fds[target], packet)
                continue
            self._n_late += 1
            heapq.heappush(
                self._late, (monotonic() + wait_s, self._n_late, self._fds[target], packet)
            )

    def _pass(self, fd: int, packet: bytes) -> None:
        self.counts["passed"] += 1
        try:
            os.write(fd, packet)
        except OSError:  # full, or down: lost, as packets are
            self.counts["lost"] += 1


def missing() -> str:
    """Why no such network can be made here; "" if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "`ip` is missing (apt install iproute2)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun is missing"
    name = f"zfprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made.stderr.strip()


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(argv)}: {done.stderr.strip()}")
