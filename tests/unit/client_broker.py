"""A broker and worker in one thread, as small as the client's tests allow.

It runs each call as soon as its dependencies have ended, unless it is told to hold calls back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import msgpack

from zfabric import messages as m
from zfabric import wire
from zfabric.codec.arguments import load_call
from zfabric.codec.exceptions import dump_exception
from zfabric.codec.functions import load_function
from zfabric.codec.serialise import dumps, loads_inline, pack
from zfabric.core.session import Session
from zfabric.errors import ChannelClosed
from zfabric.transport.contract import Poller
from zfabric.transport.registry import listen


class FakeBroker:
    """Serves clients at `address` until closed.

    hold: keep calls instead of running them, until `hold` is False and `stir` is called.
    refuse: (code, text) for every Hello.  silent: answer nothing.  workers: what info tells.
    seen: every message taken in, per type name.
    """

    def __init__(self, address: str) -> None:
        self.hold = False
        self.silent = False
        self.unfit = False
        self.keep_seen = True
        self.refuse: tuple[str, str] | None = None
        self.settling = False
        self.workers: list[dict[str, Any]] = [
            {"name": "w1", "number": 99, "slots": 2, "memory": 0, "data_address": ""}
        ]
        self.seen: dict[str, list[Any]] = {}
        self.released: set[int] = set()
        self.sessions: dict[int, Session] = {}
        self.values: dict[int, tuple[int, bytes]] = {}
        self.n_run = 0
        self._peers: dict[int, bytes] = {}
        self._functions: dict[int, Callable[..., Any]] = {}
        self._waiting: dict[int, tuple[int, int, bytes, list[int]]] = {}
        self._owner: dict[int, int] = {}
        self._numbers = 100
        self._todo: list[Callable[[], None]] = []
        self._stop = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._listener = listen(address)
        self.address = self._listener.address
        self._thread = threading.Thread(target=self._run, name="fake-broker", daemon=True)
        self._thread.start()

    def stir(self, action: Callable[[], None] = lambda: None) -> None:
        """Do something in the broker's thread, then look at the held calls again."""
        self._todo.append(action)
        os.eventfd_write(self._wake_fd, 1)

    def forget_clients(self) -> None:
        """As a restarted broker: it knows no session any more."""
        self.stir(self.sessions.clear)

    def close(self) -> None:
        self._stop = True
        self.stir()
        self._thread.join(5)
        os.close(self._wake_fd)

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        poller = Poller()
        poller.add(self._listener)
        poller.add(self._wake_fd)
        while not self._stop:
            poller.wait(0.2)
            try:
                os.eventfd_read(self._wake_fd)
            except BlockingIOError:
                pass
            while self._todo:
                self._todo.pop(0)()
            while (got := self._listener.recv()) is not None:
                peer, frames = got
                if frames and not self.silent:
                    header, message = wire.decode(frames)
                    self._take(peer, header, message)
            self._run_ready()
            for token, session in self.sessions.items():
                session.tick(monotonic())
                while (out := session.next_frames()) is not None:
                    if not self._say(self._peers[token], out):
                        break
                    session.sent()
        self._listener.close(0.2)

    def _say(self, peer: bytes, frames: Any) -> bool:
        with suppress(ChannelClosed):
            return self._listener.send(peer, frames)
        return False

    def _take(self, peer: bytes, header: wire.Header, message: Any) -> None:
        if self.keep_seen:
            self.seen.setdefault(type(message).__name__, []).append(message)
        token = header.token
        self._peers[token] = peer
        if isinstance(message, m.Hello) and self.refuse:
            self._say(peer, wire.encode(m.Refuse(*self.refuse), token))
            return
        session = self.sessions.get(token)
        if session is None:
            if not isinstance(message, m.Hello):
                self._say(peer, wire.encode(m.Refuse("unknown", "restarted"), token))
                return
            session = self.sessions[token] = Session(token, 7, now=monotonic())
            self._numbers += 1
            session.receive(header, message, monotonic())
            session.post(m.Welcome(self._numbers, message.name, "0", 4096, 1.0, 30.0))
            return
        if not session.receive(header, message, monotonic()):
            return
        if isinstance(message, m.Bye):
            del self.sessions[token]
        elif isinstance(message, m.Submit):
            self._submit(token, message)
        elif isinstance(message, m.Release):
            self.released.update(message.ids)
            needed = {dep for row in self._waiting.values() for dep in row[3]}
            for task in set(message.ids) - needed:
                self._waiting.pop(task, None)
        elif isinstance(message, m.Cancel):
            for task in message.ids:
                if self._waiting.pop(task, None):
                    self._settle(task, m.CANCELLED, b"")
        elif isinstance(message, m.Retry):
            self._retry(message)
        elif isinstance(message, m.Ask) and message.what == "cancel_waiting":
            for task in message.about:
                if self._waiting.pop(task, None):
                    self._settle(task, m.CANCELLED, b"")
        elif isinstance(message, m.Ask):
            tasks = {"waiting": len(self._waiting), "ready": 0, "running": 0}
            answer = {"workers": self.workers, "tasks": tasks, "settling": self.settling}
            session.post(m.Answer(message.request, msgpack.packb(answer)))

    def _submit(self, token: int, message: m.Submit) -> None:
        for fid, _name, blob in message.functions:
            self._functions[fid] = load_function(blob)
        deps = dict(message.deps)
        self._rows = getattr(self, "_rows", {})
        for row, (task, fn, payload) in enumerate(
            zip(message.ids, message.fns, message.payloads, strict=True)
        ):
            self._owner[task] = token
            self._waiting[task] = (task, fn, payload, list(deps.get(row, ())))
            if self.keep_seen:
                self._rows[task] = self._waiting[task]
        if self.unfit:
            for task in message.ids:
                del self._waiting[task]
                text = "no worker has GPU=1; the workers have: w1 (slots 2)"
                self._settle(task, m.UNFIT, msgpack.packb([text]))

    def _retry(self, message: m.Retry) -> None:
        for task in message.ids:
            self.values.pop(task, None)
            self._waiting[task] = self._rows[task]

    def _run_ready(self) -> None:
        if self.hold:
            return
        done: dict[int, tuple[list[int], bytearray, list[bytes]]] = {}
        progress = True
        while progress:
            progress = False
            for task, fn, payload, deps in list(self._waiting.values()):
                if not all(dep in self.values for dep in deps):
                    continue
                progress = True
                del self._waiting[task]
                status, blob = self._outcome(fn, payload, deps)
                if deps or self.keep_seen:
                    self.values[task] = (status, blob)
                self.n_run += 1
                columns = done.setdefault(self._owner[task], ([], bytearray(), []))
                columns[0].append(task)
                columns[1].append(status)
                columns[2].append(blob)
        for token, (tasks, statuses, payloads) in done.items():
            if token in self.sessions:
                self.sessions[token].post(m.Results(tasks, bytes(statuses), payloads))

    def _outcome(self, fn: int, payload: bytes, deps: list[int]) -> tuple[int, bytes]:
        values = []
        for dep in deps:
            status, blob = self.values[dep]
            if status != m.VALUE:
                return status, blob
            values.append(loads_inline(blob))
        try:
            args, kwargs = load_call(payload, values)
            return m.VALUE, pack(dumps(self._functions[fn](*args, **kwargs)))
        except BaseException as exc:
            return m.ERROR, dump_exception(exc)

    def _settle(self, task: int, status: int, payload: bytes) -> None:
        self.values[task] = (status, payload)
        token = self._owner[task]
        self.sessions[token].post(m.Results([task], bytes([status]), [payload]))


@contextmanager
def fake_broker(folder: Path) -> Iterator[FakeBroker]:
    """A broker on a socket file in `folder`."""
    broker = FakeBroker(f"ipc://{folder}/broker")
    try:
        yield broker
    finally:
        broker.close()
