"""The worker's process: one thread between the broker, the slots and the store.

What is decided about rows is decided in `core.supervisor`; this loop moves messages, frames and
descriptors, and never runs user code itself (thread slots excepted, knowingly).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import random
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

from zfabric import __version__, wire
from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core.direct import DirectSession
from zfabric.core.explain import explain
from zfabric.core.session import Session
from zfabric.core.supervisor import Supervisor
from zfabric.core.supervisor_effects import (
    Effect,
    FetchValue,
    FreeValues,
    KeepValue,
    SendRows,
)
from zfabric.errors import (
    ChannelClosed,
    ConfigError,
    RemoteProtocolError,
    TransportError,
)
from zfabric.ids import new_token
from zfabric.keys import Join, resolve
from zfabric.runtime.binding import reachable
from zfabric.runtime.data_address import listen_for_data
from zfabric.runtime.data_guard import DataGuard, warn_of_slow_encryption
from zfabric.runtime.data_thread import DataThread
from zfabric.runtime.dialling import dial_broker, with_key
from zfabric.runtime.host_memory import resident, usual_limit
from zfabric.runtime.lifecycle import (
    StopRequest,
    allow_many_descriptors,
    freeze_garbage,
    tell_ready,
)
from zfabric.runtime.link_book import LinkBook
from zfabric.runtime.slot_keeper import SlotKeeper
from zfabric.runtime.spill import SpillFiles, why_unsafe
from zfabric.runtime.store import Store
from zfabric.runtime.value import Value
from zfabric.transport import Channel, Poller
from zfabric.transport.contract import REFUSED_KEY
from zfabric.transport.locality import is_same_host

log = logging.getLogger(__name__)

DRAIN = 64
"""Messages taken in per turn at most; each may bring thousands of rows."""

HELLO_S = 0.5

RETRY_S = 0.005
"""When to try a full link again."""

RETRY_DIAL_S = 0.02
"""When to look again whether the broker can be reached."""

NO_ANSWER_S = 5.0
"""After which to say that nothing answers; see USERS.md on first contacts."""

LOAD_S = 1.0

SOON_S = 0.001
"""How long a turn may wait for the slots alone: what epoll can count."""

START_OVER_S = 0.3

REJOIN_S = 0.2
"""Seconds over which workers spread their coming back to a broker that has restarted."""

_OUTPUT = wire.encode_body(m.Output((), (), (), ())).kind


class Worker:
    """Everything that one worker process is made of.

    Slots start as soon as it is made. run() returns when it was asked to stop, or cannot go on.
    """

    def __init__(
        self,
        address: str,
        n_slots: int,
        kind: str,
        name: str,
        resources: dict[str, float],
        data_address: str | None,
        settings: Settings,
        stop: StopRequest,
        ready_fd: int | None = None,
        *,
        insecure: bool = False,
        memory_limit: int = 0,
        share: int = 1,
        join: Join | None = None,
        direct: DirectSession | None = None,
        poller: Poller | None = None,
    ) -> None:
        """insecure, memory_limit, share: see serve.  join: keys for the broker.  direct,
        poller: of a broker in this very process, whose loop this worker shares."""
        self._address = address
        self._join = join
        self._guard = None if join is None else DataGuard()
        self._n_slots = n_slots
        self._kind = kind
        self._name = name
        self._resources = resources
        self._settings = settings
        self._stop = stop
        self._ready_fd = ready_fd
        now = monotonic()
        self._memory_limit = settings.memory_limit or usual_limit() // share
        self._store = Store(
            self._memory_limit, SpillFiles(settings.spill_directory), self._store_changed
        )
        self._machine = self._new_machine(now, now)
        self._crew = SlotKeeper(
            kind,
            self._machine,
            self._store,
            settings,
            way_in=address if join is None else join.token(),
            name=name,
            memory_limit=memory_limit,
            on_unreadable=self._look_at_store,
            call_soon=self._call_soon,
        )
        self._session: Session | DirectSession = direct or Session(
            new_token(), settings=settings, now=now
        )
        self._started = now
        self._said_no_answer = False
        self._said_trouble = ""
        self._refused = ""
        self._welcomed = False
        self._previous = 0
        """The token of the session that this one goes on from."""
        self._untold: list[wire.Body] = []
        """What tasks wrote that the session before had no answer to."""
        self._number = 0
        self._acked = 0
        self._hello_at = now
        self._load_at = now
        self._tick_at = now
        self.act(now)
        self._channel: Channel | None = None
        if direct is None:
            self._channel = dial_broker(address, join, settings)
        self._listener = listen_for_data(address, data_address, settings, insecure, self._guard)
        self._poller = poller or Poller()
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        """From the data thread: what is to be done in this one."""
        self._called_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        if kind == "thread":
            self._crew.output.capture_threads(self._call_soon, monotonic)
        self._data = DataThread(
            self._call_soon,
            self._relay_to,
            own=join and join.own,
            settings=settings,
            links=LinkBook(settings),
            relay_is_local=is_same_host(address),
            store=self._store,
            listener=self._listener,
            on_put=self._machine_value_put,
        )
        self._poller.add(self._crew.fd)
        self._poller.add(self._called_fd)
        if self._channel is not None:
            self._poller.add(self._channel)
            for fd in stop.fds:
                self._poller.add(fd)

    def _new_machine(self, now: float, start_at: float) -> Supervisor:
        return Supervisor(
            self._n_slots,
            settings=self._settings,
            now=now,
            start_at=start_at,
            can_kill=self._kind == "process",
        )

    # --- the loop -----------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until asked to stop. Returns the exit code."""
        freeze_garbage()
        while not self._stop.requested:
            ready = self._poller.wait(self.sleep_s(monotonic()))
            now = monotonic()
            received = self.take_in(ready, now)
            self.act(now)
            if received:
                self.await_answer(now)
            self.speak(now)
            if self.failure:
                log.error("%s", self.failure)
                return 1
        log.info("worker stops: %s", self._stop.requested)
        return 0

    @property
    def failure(self) -> str:
        """Why this worker cannot go on; "" while it can."""
        return self._refused or self._machine.failure

    def take_in(self, ready: Iterable[Any], now: float) -> bool:
        """What the poller found, and what time brought about. Whether the broker spoke."""
        received = False
        crew = self._crew
        if self._calls:  # whoever put a value may have told the broker of it: first things first
            self._run_calls()
        for thing in ready:
            if thing is self._channel:
                self._receive(now)
                received = True
            elif thing == crew.fd:
                crew.read(now)
            elif thing == self._called_fd:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(thing)
                self._run_calls()
            elif isinstance(thing, int):
                self._stop.check(thing)
        if now >= self._tick_at:
            self._tick(now)
        if not crew.output.is_quiet:
            crew.output.resume(self._machine, now)
        if now >= crew.look_at():
            crew.look_at_memory(now)
        return received

    def _call_soon(self, function: Callable[..., None], *args: Any) -> None:
        """In the data thread: have function(*args) called in this one's next turn."""
        self._calls.append((function, args))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._called_fd, 1)

    def _store_changed(self) -> None:
        self._call_soon(self._look_at_store)

    def _look_at_store(self) -> None:
        for id_ in self._store.lost():
            self._machine.value_lost(id_)
        self._crew.unmap(self._store.left())
        self._machine.set_full(self._store.is_full)

    def _run_calls(self) -> None:
        while self._calls:
            function, args = self._calls.popleft()
            function(*args)

    def await_answer(self, now: float) -> bool:
        """Where the rows are so few and short that their results are due at once, wait for them
        and take them in. Whether there are any."""
        if not self._machine.answers_soon(SOON_S) or not self._crew.waits(SOON_S):
            return False
        now = monotonic()
        self._crew.read(now)
        self.act(now)
        return True

    def sleep_s(self, now: float) -> float:
        wake = self._tick_at
        machine_at = self._machine.wake_at(now)
        if machine_at is not None and machine_at < wake:
            wake = machine_at
        wake = min(wake, self._crew.look_at())
        if not self._crew.output.is_quiet:
            wake = min(wake, self._crew.output.wake_at(now, self._welcomed))
        if self._session.has_unsent:
            wake = min(wake, now + (RETRY_S if self._welcomed else RETRY_DIAL_S))
        return max(0.0, wake - now)

    def _tick(self, now: float) -> None:
        """What time alone brings about."""
        session, settings = self._session, self._settings
        gap = now - self._tick_at
        if gap > 2 * settings.beat_s and self._channel is not None:
            session.last_heard = min(now, session.last_heard + gap)  # it was we who were silent
        self._tick_at = now + HELLO_S
        if not self._welcomed:
            self._greet(now)
        elif self._channel is not None and self._channel.trouble == REFUSED_KEY:
            self._refused = f"the broker at {self._address} turned this worker down: {REFUSED_KEY}"
        else:
            if now >= self._load_at:
                self._load_at = now + LOAD_S
                session.load = self._load()
            self._tick_at = min(self._tick_at, session.tick(now))
            if now - session.last_heard > settings.dead_s:
                # It may sleep, or be cut off. Nothing is given up: it will tell what it knows.
                log.warning("the broker was silent for %g s", settings.dead_s)
                session.last_heard = now
                session.reconnected()
        self._crew.reap()

    def close(self) -> None:
        """Say good-bye, kill the slots, leave nothing behind."""
        if self._welcomed and self._channel is not None:
            now = monotonic()
            self._machine.leave()
            self.act(now)
            try:
                self.speak(now)
                self._session.post(m.Bye(self._stop.requested or self._machine.failure))
                self._send()
            except TransportError:
                pass
        if self._channel is not None:
            self._channel.close(linger_s=0.5)
        self._data.close()
        if self._guard is not None:
            self._guard.close()
        self._crew.close()
        self._store.close()

    # --- the broker ---------------------------------------------------------------------------

    def _greet(self, now: float) -> None:
        trouble = self._channel.trouble if self._channel is not None else ""
        if trouble == REFUSED_KEY:
            self._refused = f"the broker at {self._address} turned this worker down: {trouble}"
            return
        if trouble and trouble != self._said_trouble:
            self._said_trouble = trouble
            log.warning("cannot join %s: %s. %s", self._address, trouble, self._next_step())
        if not trouble and not self._said_no_answer and now - self._started >= NO_ANSWER_S:
            self._said_no_answer = True
            log.warning(
                "nothing answers at %s after %.0f s; did you start `zfabric broker`, and is this "
                "its address? Still trying.",
                self._address,
                NO_ANSWER_S,
            )
        if not self._session.has_unsent:
            self._session.post(self.hello())

    def _next_step(self) -> str:
        """What to do where the handshake with the broker fails."""
        if self._join is None:
            return (
                "If it has keys, a worker needs one, too: `zfabric worker ~/.zfabric/keys/"
                "worker.join`, or the line for workers that the broker printed. Still trying."
            )
        return "Compare the join file with the broker's `zfabric keys list`. Still trying."

    def hello(self) -> m.Hello:
        """What this worker has to offer."""
        return m.Hello(
            m.WORKER,
            self._name,
            __version__,
            platform.python_version(),
            socket.gethostname(),
            os.getpid(),
            slots=self._n_slots,
            threads=self._kind == "thread",
            resources=self._resources,
            data_address=self._data_address(),
            previous=self._previous,
        )

    def _data_address(self) -> str:
        if self._listener is None:
            return ""
        address = reachable(self._listener.address)
        has_key = self._guard is not None and address.startswith("tcp://")
        if has_key and self._guard:
            address = with_key(address, self._guard.public)
        return f"{address} {self._data.door}".rstrip()

    def _receive(self, now: float) -> None:
        channel = self._channel
        assert channel is not None
        for _ in range(DRAIN):
            frames = channel.recv()
            if frames is None:
                break
            if not frames:
                if self._welcomed:
                    log.info("the connection to the broker broke; dialling again")
                    self._session.reconnected()
                continue
            try:
                header, message = wire.decode(frames)
                if header.token != self._session.token:
                    continue
                if self._session.receive(header, message, now, len(frames[1])):
                    self.on_message(header, message, now)
            except RemoteProtocolError as exc:
                # It would be sent again for ever: the sequence cannot go on without it.
                self._session.post(m.Bye(f"unreadable: {exc.reason}"))
                self._send()
                self._start_over(f"the broker sends what this worker cannot read ({exc})", now)
                break
        if self._session.acked != self._acked:
            self.acked(self._session.acked)

    def acked(self, seq: int) -> None:
        """The broker has all messages up to this number."""
        self._acked = seq
        self._machine.acked(seq)

    def on_message(self, header: wire.Header, message: m.Message, now: float) -> None:
        machine, kind = self._machine, type(message)
        if kind is m.Welcome:
            self._on_welcome(header, message, now)
        elif kind is m.Refuse:
            self._on_refuse(message, now)
        elif not self._welcomed:
            pass
        elif kind is m.Run:
            machine.run(message)  # type: ignore[arg-type]
        elif kind is m.Recall:
            machine.recall(message.ids)  # type: ignore[union-attr]
        elif kind is m.Drop:
            machine.drop(message.ids)  # type: ignore[union-attr]
        elif kind is m.Free:
            machine.free(message.ids)  # type: ignore[union-attr]
        elif kind is m.Give:
            machine.give(message)  # type: ignore[arg-type]
        elif kind is m.Forget:
            machine.forget(message.fns)  # type: ignore[union-attr]
        elif kind is m.Admit:
            if self._guard is not None:
                keys = tuple(message.keys)  # type: ignore[union-attr]
                self._guard.admit(keys, None)
                self._data.run(self._guard.admit, keys, self._listener)
        elif kind is m.Explain:
            self._session.post(explain(machine, message, now))  # type: ignore[arg-type]
        elif kind is m.Relay:
            self._on_relay(message)
        elif kind is m.Bye:
            self._rejoin("the broker said good-bye", now)

    def _on_welcome(self, header: wire.Header, message: Any, now: float) -> None:
        if self._welcomed:
            # The answer to a Hello that was said twice. Where that lay about until the broker had
            # given us up, it began a session of which only our token is right.
            if message.number != self._number:
                self._rejoin("the broker had given this worker up", now)
            return
        self._welcomed = True
        self._number = message.number
        self._session.epoch = header.epoch
        self._name = message.name
        if address := self._data_address():
            self._data.serves_at(message.number, address)
        self._crew.configure(self._name, message.inline_limit)
        log.info("worker %s joined %s with %d slots", self._name, self._address, self._n_slots)
        self._tick_at = now
        if self._previous:
            for part in self._machine.rejoin(now):
                self._session.post(part)
            self._session.repost(self._untold)
        self._untold = []
        tell_ready(self._ready_fd, self._name)
        self._ready_fd = None

    def _on_refuse(self, message: Any, now: float) -> None:
        if message.code in ("unknown", "epoch", "closing", "protocol"):
            if self._welcomed and message.code == "protocol":
                self._start_over(message.text, now)
            elif self._welcomed:
                self._rejoin(message.text, now)
            elif message.code == "unknown":
                # The broker took us in, and gave us up before we heard of it.
                self._new_session(now)
        else:
            self._refused = f"the broker at {self._address} refused this worker: {message.text}"

    def _rejoin(self, why: str, now: float) -> None:
        """The broker does not know us any more: rows go on, values stay, and we say so."""
        log.info("%s; joining again", why)
        self._previous = self._session.token
        self._untold += self._session.unacked(_OUTPUT)
        self._new_session(now)
        # Not all workers at the same moment.
        self._tick_at = now + random.uniform(0.0, REJOIN_S)

    def _new_session(self, now: float) -> None:
        self._welcomed = False
        self._session = Session(new_token(), settings=self._settings, now=now)
        self._acked = 0
        self._started = self._tick_at = now
        self._said_no_answer = False

    def _start_over(self, why: str, now: float) -> None:
        """We and the broker do not understand each other: as a new worker, without rows and
        values."""
        log.warning("%s; joining again as a new worker", why)
        self._previous = 0
        self._new_session(now)
        # Where a whole fabric stops, our own end is on its way: no slots for so short a time.
        self._machine = self._new_machine(now, now + START_OVER_S)
        self._crew.reset(self._machine)
        self._data.reset()
        self._store.clear()

    def speak(self, now: float) -> None:
        session, machine = self._session, self._machine
        if self._welcomed:
            if not self._crew.output.is_quiet:
                output = self._crew.output.message(session, now)
                if output is not None:
                    session.post(output)
            for message in machine.messages(now):
                seq = session.post(message)
                if type(message) is m.Done:
                    machine.done_posted(message, seq)
        if session.has_unsent:
            self._send()

    def _send(self) -> None:
        assert self._channel is not None
        session, send = self._session, self._channel.send
        while (frames := session.next_frames()) is not None:
            if not send(frames):
                break
            session.sent()

    def _load(self) -> tuple[int, ...]:
        machine = self._machine
        memory = resident("self") + self._crew.memory_nbytes()
        return (
            machine.n_rows,
            machine.n_running,
            self._n_slots,
            self._store.n_values,
            self._store.nbytes,
            memory,
            self._store.spilled_nbytes,
            self._memory_limit,
            int(self._store.is_full),
            int(bool(self._store.trouble)),
            self._store.shared_nbytes,
        )

    # --- values -------------------------------------------------------------------------------

    def _relay_to(self, number: int, frames: list[Any]) -> None:
        self._session.post(m.Relay(number, tuple(frames)))

    def _on_relay(self, relay: Any) -> None:
        if not relay.frames:
            self._data.gone(relay.peer)
            return
        try:
            _, message = wire.decode(relay.frames)
        except RemoteProtocolError:
            return
        self._data.relayed(relay.peer, message)

    def _machine_value_put(self, id_: int, nbytes: int) -> None:
        self._machine.value_put(id_, nbytes)

    def _fetch(self, effect: FetchValue) -> None:
        machine = self._machine

        def on_end(value: Value | None) -> None:
            if machine is not self._machine:
                return
            if value is None:
                log.warning("value %d could not be fetched from any holder", effect.id)
                machine.fetch_failed(effect.id)
            else:
                self._store.put(effect.id, value)
                machine.value_fetched(effect.id, value.nbytes)

        self._data.fetch(effect.id, effect.nbytes, effect.sources, on_end)

    # --- what the machine asks for ------------------------------------------------------------

    def act(self, now: float) -> None:
        """Do what the machine asks for, until it asks for nothing more."""
        while effects := self._machine.effects(now):
            for effect in effects:
                self._perform(effect, now)

    def _perform(self, effect: Effect, now: float) -> None:
        if isinstance(effect, SendRows):
            self._crew.send_rows(effect, now)
        elif isinstance(effect, KeepValue):
            assert isinstance(effect.value, Value)
            self._store.put(effect.id, effect.value)
        elif isinstance(effect, FreeValues):
            self._store.free(effect.ids)
            self._crew.unmap(effect.ids)
        elif isinstance(effect, FetchValue):
            self._fetch(effect)
        else:
            self._crew.perform(effect, now)


def serve(
    address: str,
    *,
    slots: int | None = None,
    kind: str = "process",
    name: str | None = None,
    resources: dict[str, float] | None = None,
    data_address: str | None = None,
    insecure: bool = False,
    memory_limit: int = 0,
    store_limit: int = 0,
    share: int = 1,
    settings: Settings | None = None,
    lifeline_fd: int | None = None,
    ready_fd: int | None = None,
) -> int:
    """Run a worker until SIGTERM, SIGINT or the end of the lifeline. Returns the exit code.

    address: of the broker, or the path of a join file, or a join line.
    slots: rows at a time; default: the cores this process may use.
    kind: "process" or "thread".  name: for people and for workers=; default: host and pid.
    data_address: where others fetch large values; default: chosen by the broker's address,
    "" to have everything relayed.  insecure: that may be one beyond this host.
    memory_limit: bytes that a slot's process may take, whose task is killed else; 0: any.
    store_limit: bytes of values in memory, before they go to disk; 0: the setting memory_limit,
    else the usual share of the host's memory, divided by `share`, the workers on this host.
    ready_fd: gets a line when the broker has said Welcome.
    """
    allow_many_descriptors()
    with StopRequest(lifeline_fd) as stop:
        worker = None
        try:
            settings = settings or Settings.load(memory_limit=store_limit or None)
            unsafe = settings.spill_directory and why_unsafe(settings.spill_directory)
            if unsafe:
                raise ConfigError(unsafe)
            if kind not in ("process", "thread"):
                raise ConfigError(f'the kind of slots is "process" or "thread", not {kind!r}')
            address, join = resolve(address)
            if join is not None and join.role != m.WORKER:
                raise ConfigError(
                    f"this is the {join.role} key {join.name}; a worker joins with a worker's key"
                )
            if join is not None:
                warn_of_slow_encryption()
            worker = Worker(
                address,
                slots or len(os.sched_getaffinity(0)),
                kind,
                name or "",
                resources or {},
                data_address,
                settings,
                stop,
                ready_fd,
                insecure=insecure,
                memory_limit=memory_limit,
                share=share,
                join=join,
            )
            return worker.run()
        except (ConfigError, TransportError) as exc:
            if isinstance(exc, ChannelClosed):
                raise
            log.error("%s", exc)
            return 2
        finally:
            if worker is not None:
                worker.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="zfabric worker: %(message)s")
    sys.exit(serve(**json.loads(sys.argv[1])))
