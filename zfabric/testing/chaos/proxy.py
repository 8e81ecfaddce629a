"""A TCP proxy between two peers of a test, that does to their connections what networks do.

    with ChaosProxy("tcp://127.0.0.1:8787", seed=7) as proxy:
        client = zfabric.Client(proxy.address)
        proxy.cut()                              # both ends see a reset
        proxy.freeze()                           # nobody sees anything; thaw() ends it
        proxy.abandon()                          # half-open: connected for ever, never answered
        proxy.weather = Weather(delay_s=0.1, jitter_s=0.05, rate=125_000)

One thread and a selector. Each method returns when what it says is so.
"""

from __future__ import annotations

import math
import os
import selectors
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import Any

from zfabric.testing.chaos.weather import CALM, DOWN, PIECE, UP, Pipe, Weather

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 seconds: close() sends a reset in place of a farewell."""


class _Link:
    """One connection through the proxy: two sockets, a pipe each way."""

    def __init__(self, near: socket.socket, far: socket.socket, up: Pipe, down: Pipe) -> None:
        self.near = near
        self.far = far
        self.up = up
        self.down = down
        self.far_is_open = False
        """The dial to the target has succeeded."""
        self.abandoned = False

    def breaks(self, end: socket.socket) -> None:
        """Nothing comes from that end any more, and what goes there vanishes."""
        pipe = self.up if end is self.near else self.down
        pipe.ended = pipe.broken = True

    def ways(self) -> tuple[tuple[socket.socket, Pipe, socket.socket], ...]:
        return (self.near, self.up, self.far), (self.far, self.down, self.near)


class ChaosProxy:
    """Listens on a free port of this host and passes everything on to a target.

    target: `tcp://host:port`, or `host:port`.  seed: of all that is left to chance.
    counts: "connections", "cut", "refused", "flips", "up" and "down" (bytes that went through).
    Raises ValueError for a target that is none.
    """

    def __init__(self, target: str, *, seed: int = 0, weather: Weather = CALM) -> None:
        self._family, self._target = _resolved(target)
        self._seed = seed
        self._weather = weather
        self._links: list[_Link] = []
        self._number = 0
        self._refusing = False
        self._frozen: set[str] = set()
        self._cut_after: dict[str, int] = {}
        self._past: Counter[str] = Counter()
        self._calls: list[tuple[Callable[[], object], threading.Event]] = []
        self._lock = threading.Lock()
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._listener.setblocking(False)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="chaos-proxy", daemon=True)
        self._thread.start()

    # --- what tests do ------------------------------------------------------------------------

    @property
    def weather(self) -> Weather:
        """What bytes go through from now on, in all connections and both directions."""
        return self._weather

    @weather.setter
    def weather(self, weather: Weather) -> None:
        def change() -> None:
            self._weather = weather
            for link in self._links:
                link.up.set_weather(weather)
                link.down.set_weather(weather)

        self._call(change)

    @property
    def counts(self) -> Counter[str]:
        """What has happened so far."""
        found: list[Counter[str]] = []

        def add() -> None:
            total = Counter(self._past)
            for link in self._links:
                total.update(_counts(link))
            found.append(total)

        self._call(add)
        return found[0]

    @property
    def n_open(self) -> int:
        """Connections that are open now."""
        return len(self._links)

    def cut(self) -> int:
        """Reset all connections; returns how many. New ones are taken."""
        found: list[int] = []

        def cut() -> None:
            found.append(len(self._links))
            for link in list(self._links):
                self._drop(link, "cut")

        self._call(cut)
        return found[0]

    def cut_after(self, nbytes: int, direction: str = DOWN) -> None:
        """Cut each connection, and each that will come, when so many bytes more went through it:
        after any byte of a message, header or handshake. -1 takes that back for those to come."""
        _check(direction)

        def change() -> None:
            if nbytes < 0:
                self._cut_after.pop(direction, None)
                return
            self._cut_after[direction] = nbytes
            for link in self._links:
                pipe = link.up if direction == UP else link.down
                pipe.cut_after(nbytes)

        self._call(change)

    def freeze(self, direction: str | None = None) -> None:
        """Pass nothing on, in one direction or both; connections stay open, and new ones hang."""
        self._set_frozen({UP, DOWN} if direction is None else {_check(direction)} | self._frozen)

    def thaw(self) -> None:
        """Pass on again, what was held back first."""
        self._set_frozen(set())

    def abandon(self) -> None:
        """Leave both ends of all connections half-open: the bytes of either vanish, and neither is
        ever told. New connections work."""

        def abandon() -> None:
            for link in self._links:
                link.abandoned = True

        self._call(abandon)

    def refuse(self) -> None:
        """Reset new connections at once, until `accept`; open ones stay."""
        self._call(lambda: setattr(self, "_refusing", True))

    def accept(self) -> None:
        """Take new connections again."""
        self._call(lambda: setattr(self, "_refusing", False))

    def close(self) -> None:
        """Reset everything and end the thread. Closing twice is fine."""
        with self._lock:
            self._closing = True
            self._ring()
        self._thread.join()

    def __enter__(self) -> ChaosProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- the thread ---------------------------------------------------------------------------

    def _call(self, act: Callable[[], object]) -> None:
        """Run it in the thread, between two turns."""
        done = threading.Event()
        with self._lock:
            if self._wake < 0:
                raise RuntimeError("this proxy is closed")
            self._calls.append((act, done))
            self._ring()
        while not done.wait(0.5):
            if not self._thread.is_alive():
                raise RuntimeError("this proxy was closed meanwhile")

    def _ring(self) -> None:
        """With the lock: else the thread could end, and its descriptor be somebody else's."""
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        try:
            while not self._closing:
                now = monotonic()
                wake = min((self._wake_at(link, now) for link in self._links), default=math.inf)
                timeout = None if wake == math.inf else max(0.0, wake - now)
                for key, _ in self._selector.select(timeout):
                    if key.fileobj is self._listener:
                        self._take_in(monotonic())
                    elif key.fileobj == self._wake:
                        os.eventfd_read(self._wake)
                with self._lock:
                    calls, self._calls = self._calls, []
                for act, done in calls:
                    act()
                    done.set()
                for link in list(self._links):
                    self._move(link, monotonic())
        finally:
            for link in list(self._links):
                self._drop(link, "closed")
            self._selector.close()
            self._listener.close()
            with self._lock:
                os.close(self._wake)
                self._wake = -1

    def _take_in(self, now: float) -> None:
        try:
            near, _ = self._listener.accept()
        except OSError:
            return
        if self._refusing:
            self._past["refused"] += 1
            _reset(near)
            return
        try:
            far = socket.socket(self._family)
        except OSError:  # no descriptor is left
            self._past["refused"] += 1
            _reset(near)
            return
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far.connect_ex(self._target)
        self._number += 1
        pipes = []
        for direction in (UP, DOWN):
            pipe = Pipe(f"{self._seed}/{self._number}/{direction}", self._weather, now)
            pipe.frozen = direction in self._frozen
            if direction in self._cut_after:
                pipe.cut_after(self._cut_after[direction])
            pipes.append(pipe)
        link = _Link(near, far, *pipes)
        self._links.append(link)
        self._past["connections"] += 1
        self._selector.register(near, selectors.EVENT_READ, link)
        self._selector.register(far, selectors.EVENT_WRITE, link)

    def _move(self, link: _Link, now: float) -> None:
        """Everything that can be read, is due and can be sent; then watch for the rest."""
        if not link.far_is_open and not self._has_connected(link):
            return
        full = set()
        for source, pipe, target in link.ways():
            self._read(link, source, pipe, now)
            back = link.down if pipe is link.up else link.up
            while data := pipe.take(now):
                if link.abandoned or back.broken:
                    continue
                try:
                    sent = target.send(data)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    link.breaks(target)
                    continue
                if sent < len(data):
                    pipe.back(data[sent:])
                    full.add(target)
                    break
            if pipe.is_cut:
                self._drop(link, "cut")
                return
            if pipe.frozen or link.abandoned:
                continue
            if pipe.ended and pipe.is_empty and back.ended and back.is_empty:
                self._drop(link, "closed")
                return
            if pipe.ended and pipe.is_empty and not pipe.told:
                pipe.told = True
                with suppress(OSError):
                    target.shutdown(socket.SHUT_WR)  # it may go on to answer
        if not link.abandoned and any(p.broken and not p.frozen for p in (link.up, link.down)):
            self._drop(link, "closed")
            return
        for source, pipe, _ in link.ways():
            wanted = selectors.EVENT_READ if pipe.has_room else 0
            self._watch(source, link, wanted | (selectors.EVENT_WRITE if source in full else 0))

    def _has_connected(self, link: _Link) -> bool:
        if link.far.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            link.far_is_open = True
            link.breaks(link.far)  # refused, or accepted and reset; told when nothing is frozen
            return True
        try:
            link.far.getpeername()
        except OSError:
            return False  # not yet
        link.far_is_open = True
        return True

    def _read(self, link: _Link, source: socket.socket, pipe: Pipe, now: float) -> None:
        """Take in what one end says."""
        while pipe.has_room:
            try:
                data = source.recv(PIECE)
            except BlockingIOError:
                return
            except OSError:
                link.breaks(source)
                return
            if not data:
                pipe.ended = True
            else:
                pipe.put(data, now)

    def _watch(self, end: socket.socket, link: _Link, events: int) -> None:
        known: Any = self._selector.get_map().get(end)
        if known is None:
            if events:
                self._selector.register(end, events, link)
        elif not events:
            self._selector.unregister(end)
        elif known.events != events:
            self._selector.modify(end, events, link)

    def _wake_at(self, link: _Link, now: float) -> float:
        if not link.far_is_open:
            return math.inf
        blocked = self._selector.get_map()
        found = math.inf
        for _, pipe, target in link.ways():
            key: Any = blocked.get(target)
            if key is None or not key.events & selectors.EVENT_WRITE:
                found = min(found, pipe.wake_at(now))
        return found

    def _set_frozen(self, frozen: set[str]) -> None:
        def change() -> None:
            self._frozen = frozen
            for link in self._links:
                link.up.frozen = UP in frozen
                link.down.frozen = DOWN in frozen

        self._call(change)

    def _drop(self, link: _Link, why: str) -> None:
        if link not in self._links:
            return
        self._links.remove(link)
        self._past.update(_counts(link))
        self._past[why] += 1
        for end in (link.near, link.far):
            self._watch(end, link, 0)
            if why == "closed":
                end.close()
            else:
                _reset(end)


def _resolved(target: str) -> tuple[int, Any]:
    scheme, _, place = target.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme not in ("", "tcp") or not host or not port.isdigit():
        raise ValueError(f"a chaos proxy's target is tcp://host:port, not {target!r}")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, OverflowError) as exc:
        raise ValueError(f"a chaos proxy cannot find its target {target!r}: {exc}") from exc
    family, _, _, _, address = min(found, key=lambda item: item[0] != socket.AF_INET)
    return family, address


def _reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.close()


def _counts(link: _Link) -> dict[str, int]:
    return {
        "up": link.up.n_out,
        "down": link.down.n_out,
        "flips": link.up.flips + link.down.flips,
    }


def _check(direction: str) -> str:
    if direction not in (UP, DOWN):
        raise ValueError(f'a direction is "up" or "down", not {direction!r}')
    return direction
