"""The one thread of a client that touches sockets.

User threads queue rows and wake this thread, by an eventfd and only when it sleeps: a flood of
submits costs no system call per call. Each turn it takes in what has arrived, wakes who waits
for it, does what user threads asked for, sends what is queued, and sleeps until something
happens. A lone call leaves at once; a flood fills batches by itself.
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
import random
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from time import monotonic
from typing import Any

from zfabric import ids, wire
from zfabric import messages as m
from zfabric.client.alarm import Alarm
from zfabric.config import Settings
from zfabric.core.session import Session
from zfabric.core.submitter import Outcome, Submitter
from zfabric.errors import (
    ClientClosed,
    ConnectFailed,
    Refused,
    RemoteProtocolError,
    ResultTimeout,
    TransportError,
    ZFabricError,
)
from zfabric.keys import Join
from zfabric.messages import (
    CLIENT,
    Answer,
    Bye,
    Hello,
    Inventory,
    LinksTold,
    Locked,
    Message,
    Output,
    Refuse,
    Relay,
    Release,
    Reply,
    Results,
    Unlock,
    Welcome,
)
from zfabric.runtime.data_thread import DataThread
from zfabric.runtime.dialling import dial_broker
from zfabric.runtime.link_book import LinkBook
from zfabric.runtime.store import Value
from zfabric.transport.contract import REFUSED_KEY, Channel, Poller
from zfabric.transport.locality import is_same_host
from zfabric.wire.header import decode_header

log = logging.getLogger(__name__)

HELLO_S = 0.5
"""Between two Hellos that nobody answered."""

RETRY_S = 0.02
"""Until the next try where the channel took nothing; the poller tells when it is connected, so
this is for one that is full."""

RESUME_S = 0.1
"""Seconds over which clients spread their coming back to a broker that has restarted."""

LOOK_S = 0.25
"""A dropped future does not wake this thread; it looks for them that often at least."""

RELEASE_S = 0.02
"""Between two Releases of a few futures. One per call would be half of all messages where calls
are made one by one, and each would go before the next call."""

RELEASE_AT_ONCE = 64
"""Dropped futures that do not wait for that."""

RECEIVE_AT_ONCE = 64
"""Messages per turn, so that a flood of results does not keep new calls from leaving."""

LONE_ROWS = 8
"""Results of so few rows are answers to lone calls: behind them the socket is empty, as a rule,
and finding that out costs as much as a message. The poller looks there anyway."""

CLOSED_TEXT = "the client was closed before this task ended"


class IoThread:
    """A client's link with its broker: the machine, the session, the channel and the thread.

    address: the broker's.  join: keys for it.  depth: 0, or 1 for a client made inside a task.
    sleeping: whether the thread would not notice new rows without `wake`.
    """

    def __init__(
        self, address: str, name: str, depth: int, settings: Settings, join: Join | None = None
    ) -> None:
        self.run = ""
        """The named run that it holds, or attaches to."""
        self._refused: Refused | None = None
        """Why it could not attach to the run that it was to attach to later on."""
        self._attaching = False
        self.address = address
        self._join = join
        self.name = name
        self.settings = settings
        self.submitter = Submitter(settings)
        self.sleeping = False
        self.welcome: Welcome | None = None
        self.n_garbage = 0
        """Messages that were dropped because they made no sense."""
        self.links = LinkBook(settings)
        """What is known of the links that values came and went by."""
        self._data: DataThread | None = None
        self.broker_ended: Callable[[], str] | None = None
        """Tells how a broker of our own ended, "" while it runs; None: it is not ours."""
        self.on_output: Callable[[Output], object] | None = None
        """Called in the thread with what tasks wrote; quick, never raising."""
        self.tidy: Callable[[], Callable[[], None] | None] = lambda: None
        """A weak reference to what is called at `tidy_at`: the thread may not hold the client."""
        self.tidy_at = inf
        self.at_end: list[Callable[[], object]] = []
        """Called when the thread ends."""
        self._depth = depth
        self._calls: deque[Callable[[], object]] = deque()
        self.lock_era = 0
        """Rises whenever the broker has forgotten our locks."""
        self._answers: dict[int, tuple[Alarm, list[bytes]]] = {}
        self.lock_requests: dict[int, tuple[Alarm, list[tuple[bool, int]]]] = {}
        """Who waits for Locked, and where what it says is put: (held, lock_era)."""
        self._requests = itertools.count(1)
        self._ready = Alarm()
        self._error: ZFabricError | None = None
        self._closing = False
        self._ended = False
        """The thread takes no more calls; whoever posts one runs it."""
        self._cut = False
        """The connection broke, and nothing has arrived since."""
        self._readable = True
        """The poller reported the channel, or not all of it was read."""
        self._release_at = 0.0
        self._pid = os.getpid()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._channel: Channel | None = None
        self._poller: Poller | None = None
        self._thread = threading.Thread(target=self._run, name="zfabric-io", daemon=True)

    # --- user threads -------------------------------------------------------------------------

    def start(self, timeout_s: float) -> None:
        """Begin, and wait for the broker's Welcome.

        Raises ConnectFailed after timeout_s without one, Refused when the broker says no.
        """
        self._thread.start()
        welcomed = self._ready.wait(timeout_s)
        if self._error is not None:
            self._thread.join()
            raise self._error
        if not welcomed:
            self.close()
            trouble = self._channel.trouble if self._channel is not None else ""
            text = trouble and f"cannot join the broker at {self.address}: {trouble}"
            raise ConnectFailed(self.address, timeout_s, text)

    def attach(self, run: str, timeout_s: float) -> None:
        """Begin another session, that of a run. Raises Refused, ResultTimeout, ClientClosed; where
        refused, a session without a run has begun."""
        self._ready = Alarm()
        self.call(self._begin_run, run)
        welcomed = self._ready.wait(timeout_s)
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused
        if not self.is_open:
            raise ClientClosed(self.submitter.closed_text)
        if not welcomed:
            raise ResultTimeout(
                f"the broker at {self.address} did not answer within {timeout_s:.3g} s"
            )

    def wake(self) -> None:
        """Let the thread notice what was queued."""
        self.sleeping = False
        try:
            os.eventfd_write(self._wake_fd, 1)
        except BlockingIOError:  # 2**64 wake-ups that nobody read: it is awake enough
            pass

    def release_now(self) -> None:
        """Let dropped futures be released without delay."""
        self._release_at = 0.0
        self.wake()

    def is_this_thread(self) -> bool:
        """Whether the caller runs in it."""
        return threading.current_thread() is self._thread

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args) in the I/O thread, where nothing else happens meanwhile; its result.

        Raises ClientClosed when the thread has ended.
        """
        if threading.current_thread() is self._thread:
            return function(*args)
        alarm = Alarm()
        box: list[Any] = []

        def run() -> None:
            try:
                box.append(function(*args))
            except BaseException as exc:
                box.append(exc)
                box.append(None)
            finally:
                alarm()

        self._calls.append(run)
        self.wake()
        while not alarm.wait(1.0):
            if not self._thread.is_alive() and not box:
                raise ClientClosed(self.submitter.closed_text or "the client is closed")
        if len(box) == 2:
            raise box[0]
        return box[0]

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """function(*args) in the I/O thread, soon; nobody waits for it.

        Here and now when that thread has ended: `data` is None then.
        """
        self._calls.append(lambda: function(*args))
        if self._ended:  # set before the thread's last look at the queue, so one of us sees it
            self._run_calls()
        else:
            self.wake()

    def ask(
        self, what: str, timeout_s: float | None = None, about: Sequence[int] = (), text: str = ""
    ) -> bytes:
        """The broker's answer (msgpack) to a question. Raises ResultTimeout, ClientClosed."""
        alarm = Alarm()
        box: list[bytes] = []
        request = next(self._requests)
        self._answers[request] = (alarm, box)
        try:
            self.call(self._put_question, request, what, about, text)
            answered = self._ended or alarm.wait(timeout_s)
        finally:
            self._answers.pop(request, None)
            self.submitter.answered(request)
        if box:
            return box[0]
        if answered:
            raise ClientClosed(self.submitter.closed_text or "the client is closed")
        raise ResultTimeout(f"the broker at {self.address} did not answer within {timeout_s:.3g} s")

    def _put_question(self, request: int, what: str, about: Sequence[int], text: str) -> None:
        self.submitter.ask(request, what, about, text)
        self._put_queries()

    def _put_queries(self) -> None:
        """What is answered although the broker takes no work now."""
        if self._welcomed:
            for query in self.submitter.queries():
                self._session.post(query)

    def new_request(self) -> int:
        """A number for a question whose answer nobody waits for."""
        return next(self._requests)

    def close(self, text: str = CLOSED_TEXT, timeout_s: float = 3.0) -> None:
        """Say goodbye, end what is pending, end the thread. May be called twice."""
        if os.getpid() != self._pid:
            return  # the thread and the sockets stayed in the process that forked
        self.submitter.closed_text = self.submitter.closed_text or text
        self._closing = True
        self.wake()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    @property
    def is_open(self) -> bool:
        """Whether calls can still be made."""
        return not self.submitter.closed_text

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._channel = dial_broker(self.address, self._join, self.settings)
            self._poller = Poller()
            self._poller.add(self._channel)
            self._poller.add(self._wake_fd)
            self._begin_session()
            while not self._closing:
                self._turn()
            self._say_goodbye()
        except ZFabricError as exc:
            self._error = exc
        except BaseException as exc:
            log.exception("the client's I/O thread failed")
            self._error = TransportError(f"the client's I/O thread failed: {exc!r}")
        finally:
            self._end()

    def _end(self) -> None:
        text = str(self._error) if self._error is not None else CLOSED_TEXT
        self._wake_up(self.submitter.closed(self.submitter.closed_text or text))
        data, self._data = self._data, None
        self._ended = True
        self._run_calls()
        self._wake_up(self.submitter.closed(self.submitter.closed_text))
        for alarm, _ in [*self._answers.values(), *self.lock_requests.values()]:
            alarm()
        if data is not None:
            data.close()
        for act in self.at_end:
            act()
        self._ready()
        if self._channel is not None:
            self._channel.close(linger_s=0.0 if self._error else 1.0)

    def _run_calls(self) -> None:
        calls = self._calls
        while True:
            try:
                call = calls.popleft()
            except IndexError:
                return
            call()

    def __del__(self) -> None:
        # Not earlier: a user thread may be about to write to it, and the number is soon reused.
        os.close(self._wake_fd)

    def _begin_session(self) -> None:
        now = monotonic()
        self.lock_era += 1
        self._session = Session(ids.new_token(), settings=self.settings, now=now)
        self._welcomed = False
        self._resuming = False
        self._hello_at = now
        self._turn_at = now
        self._heard_from = now

    def _begin_run(self, run: str) -> None:
        if self._welcomed:
            self._session.post(Bye("it attaches to a run"))
            self._send(self._turn_at)
        self.run = run
        self._attaching = True
        self._begin_session()

    def _turn(self) -> None:
        assert self._poller is not None
        now = monotonic()
        if now - self._turn_at > self.settings.suspect_s:
            # We slept (SIGSTOP, a suspended laptop): the broker's silence proves nothing.
            self._heard_from = now
        self._turn_at = now
        if self._welcomed and self.submitter.rows:
            self._send(now)  # a lone call leaves before anything else is looked at
        if self._readable:
            self._receive(now)
        while self._calls:
            self._calls.popleft()()
        if now >= self.tidy_at:
            self.tidy_at = inf
            if tidy := self.tidy():
                tidy()
        if self._welcomed:
            wake_at = min(self._session.tick(now), now + LOOK_S)
            self._watch_broker(now)
            if self._cut:
                self._look_after_own_broker()
        else:
            wake_at = self._say_hello(now)
        if not self._send(now):
            wake_at = min(wake_at, now + RETRY_S)
        if self.submitter.released and self._welcomed and not self._stuck:
            wake_at = min(wake_at, self._release_at)
        self.sleeping = True
        # From here on a new row wakes us; this looks for those that came just before.
        if self._readable or self._calls or self._closing or self._has_rows():
            self.sleeping = False
            wake_at = 0.0
        for ready in self._poller.wait(max(0.0, wake_at - monotonic()) if wake_at else 0.0):
            if ready is self._channel:
                self._readable = True
            elif ready == self._wake_fd:
                self.sleeping = False
                try:
                    os.eventfd_read(self._wake_fd)
                except BlockingIOError:
                    pass
        self.sleeping = False

    def _has_rows(self) -> bool:
        return self._welcomed and bool(self.submitter.rows) and not self._stuck

    # --- sending ------------------------------------------------------------------------------

    _stuck = False
    """The last send was not taken, or the window is full: more rows change nothing."""

    def _send(self, now: float) -> bool:
        """Send what the window and the channel take. False: try again soon."""
        assert self._channel is not None
        session, send = self._session, self._channel.send
        submitter = self.submitter
        releasing = now >= self._release_at or len(submitter.released) >= RELEASE_AT_ONCE
        self._stuck = False
        while True:
            frames = session.next_frames()
            if frames is None:
                if not self._welcomed:
                    return True
                if not submitter.has_work(releasing):
                    return True
                if session.is_full:
                    self._stuck = True  # an ack will wake us
                    return True
                message = submitter.next_message(releasing)
                if message is None:
                    self._stuck = submitter.is_held_up  # Results will wake us
                    return True
                if type(message) is Release:
                    self._release_at = now + RELEASE_S
                session.post(message)
                continue
            if not send(frames):
                self._stuck = True
                return False
            session.sent()

    @property
    def data(self) -> DataThread | None:
        """Moves values; begins when first asked for. Only for this thread, which gets its
        callbacks too; None when this thread has ended."""
        if self._data is None and not self._ended:
            self._data = DataThread(
                self.post,
                self._post_relay,
                own=self._join and self._join.own,
                settings=self.settings,
                links=self.links,
                relay_is_local=is_same_host(self.address),
                allocate=Value.private,
            )
        return self._data

    def _post_relay(self, peer: int, frames: list[Any]) -> None:
        """Send frames to another session by way of the broker."""
        self._session.post(Relay(peer, tuple(frames)))

    def _check_key(self) -> None:
        """Raises Refused when the last dial was turned down for its key: it has been revoked, and
        whoever waits hears that."""
        if self._channel is not None and self._channel.trouble == REFUSED_KEY:
            text = f"the broker at {self.address} turned us down: {REFUSED_KEY}"
            self._wake_up(self.submitter.session_lost(text))
            raise Refused("key", text)

    def _say_hello(self, now: float) -> float:
        self._check_key()
        if now >= self._hello_at:
            if not self._session.has_unsent:
                greeting = hello(self.name, self._depth)._replace(run=self.run)
                if self._resuming:
                    greeting = greeting._replace(
                        previous=self._session.token, acked=self._session.acked
                    )
                self._session.post(greeting)
            self._hello_at = now + HELLO_S
        return self._hello_at

    def _say_goodbye(self) -> None:
        if self._welcomed:
            self._wake_up(self.submitter.closed(self.submitter.closed_text))
            self._session.post(Bye("closed"))
            self._send(monotonic())

    # --- receiving ----------------------------------------------------------------------------

    def _receive(self, now: float) -> None:
        """Take in what has arrived, or some of it."""
        assert self._channel is not None
        recv, session = self._channel.recv, self._session
        for _ in range(RECEIVE_AT_ONCE):
            frames = recv()
            if frames is None:
                break
            if not frames:
                self._on_cut(now)
                continue
            try:
                header, message = wire.decode(frames)
                if header.token != session.token:
                    continue
                fresh = session.receive(header, message, now, len(frames[1]))
            except RemoteProtocolError as exc:
                self._on_garbage(frames, exc)
                session = self._session
                continue
            self._cut = False
            if fresh:
                if type(message) is Results:
                    self._wake_up(self.submitter.results(message))
                    if len(message.ids) < LONE_ROWS:
                        break
                else:
                    self._take(header, message)
                    session = self._session
        else:
            return  # there may be more
        self._readable = False

    def _on_garbage(self, frames: list[bytes], error: RemoteProtocolError) -> None:
        """A stranger's bytes are dropped. What the broker says in our session would come again
        for ever, as the sequence cannot go on without it: that session is over."""
        self.n_garbage += 1
        try:
            ours = decode_header(bytes(frames[0])).token == self._session.token
        except RemoteProtocolError:
            ours = False
        if not ours:
            log.warning("dropped a message from %s: %s", self.address, error)
            return
        from zfabric import __version__

        broker = self.welcome.zfabric if self.welcome is not None else "unknown"
        text = (
            f"the broker at {self.address} sends what this client cannot read ({error}); zfabric"
            f" is {__version__} here and {broker} at the broker: install the same on both sides"
        )
        if not self._welcomed:
            raise RemoteProtocolError(error.reason, text)
        self._lose_session(text, goodbye=f"unreadable: {error.reason}")

    def _on_cut(self, now: float) -> None:
        log.debug("the connection to %s broke; redialling", self.address)
        if self._welcomed:
            # Before that a Beat would be the first that the broker hears of us, and it refuses
            # sessions that it does not know.
            self._session.reconnected()
            self._put_queries()
        self._hello_at = now
        self._cut = True

    def _take(self, header: wire.Header, message: Message) -> None:
        if type(message) is Answer or type(message) is Reply:
            waiting = self._answers.get(message.request)
            if waiting is not None:
                waiting[1].append(message.payload)
                waiting[0]()
        elif type(message) is Locked:
            wanting = self.lock_requests.get(message.request)
            if wanting is not None:
                wanting[1].append((message.held, self.lock_era))
                wanting[0]()
            elif message.held:
                # Nobody waits for it: an Acquire that a restarted broker got once more. Kept, the
                # lock would be locked for as long as this session lasts.
                self.submitter.say(Unlock(message.request))
        elif type(message) is Output:
            self.submitter.wrote(message)
            if self.on_output is not None:
                self.on_output(message)
        elif type(message) is Relay:
            self._take_relay(message)
        elif type(message) is m.Alarm:
            self._take_alarm(message.text)
        elif type(message) is Welcome:
            self._take_welcome(header, message)
        elif type(message) is Refuse:
            self._take_refuse(message)
        elif type(message) is Bye:
            self._lose_session(f"the broker at {self.address} shut down ({message.reason})")

    def _take_alarm(self, text: str) -> None:
        if self.submitter.alarmed(text):
            if text:
                log.warning(
                    "the broker at %s takes no work now: %s; what is submitted waits here",
                    self.address,
                    text,
                )
            else:
                log.warning("the broker at %s takes work again", self.address)
        self._put_queries()

    def _take_relay(self, relay: Relay) -> None:
        if not relay.frames:
            if self._data is not None:
                self._data.gone(relay.peer)
            return
        try:
            message = wire.decode(relay.frames)[1]
        except RemoteProtocolError as exc:  # the worker's fault, not the broker's
            self.n_garbage += 1
            log.warning("dropped what worker %d sent: %s", relay.peer, exc)
            return
        if type(message) is LinksTold:
            waiting = self._answers.get(message.request)
            if waiting is not None:
                waiting[1].append(message.payload)
                waiting[0]()
        elif self._data is not None:
            self._data.relayed(relay.peer, message)

    def _take_welcome(self, header: wire.Header, message: Welcome) -> None:
        if self._welcomed:
            # The answer to a Hello that we repeated. Where that lay about until the lease was
            # over, the broker began a session without any of our tasks.
            if self.welcome is not None and message.number != self.welcome.number:
                text = f"the broker at {self.address} took the client for dead"
                self._lose_session(text, "it begins anew")
            return
        self._welcomed = True
        self._session.epoch = header.epoch
        self.welcome = message
        if self._resuming:
            self._resuming = False
            self._session.go_on()
            for part in [*self.submitter.inventory(), *self.submitter.ask_again()]:
                self._session.post(part)
            for alarm, _ in self.lock_requests.values():
                alarm()  # Locked may have been lost with that broker: it is asked for anew
            log.info("client %s goes on at %s", message.name, self.address)
            return
        self.submitter.welcomed(message.number, message.counter)
        self._attaching = False
        if message.resumed:
            # Ends of its tasks may come: who asks for its futures is told of those before.
            self._session.post(Inventory([], [], [], [], 1))
        log.info("client %s is session %d at %s", message.name, message.number, self.address)
        self._ready()

    def _take_refuse(self, message: Refuse) -> None:
        if message.code == "epoch":
            if self._welcomed:
                # The broker restarted and has its journal: with the same token, after which what
                # it has not written down goes out again. Not all clients at the same moment.
                self._welcomed = False
                self._resuming = True
                self._session.pause()
                self._hello_at = monotonic() + random.uniform(0.0, RESUME_S)
            return
        if message.code == "run" and self._attaching:
            self._refused = Refused(message.code, message.text)
            self._attaching = False
            self.run = ""
            self._begin_session()
            return
        if message.code != "unknown":
            raise Refused(message.code, message.text)
        if not (self._welcomed or self._resuming):
            # The broker took us in, and gave us up before we heard of it.
            self._begin_session()
            return
        self._lose_session(
            f"the broker at {self.address} no longer knows this client: it was restarted, or it "
            f"took the client for dead ({message.text})"
        )

    def _watch_broker(self, now: float) -> None:
        self._check_key()
        dead_s = self.settings.dead_s + self.settings.lease_s
        if now - max(self._heard_from, self._session.last_heard) > dead_s:
            self._lose_session(f"the broker at {self.address} was silent for {dead_s:.3g} s")

    def _look_after_own_broker(self) -> None:
        """A broker of another host may come back; a child of this process will not."""
        text = self.broker_ended() if self.broker_ended is not None else ""
        if text:
            self._wake_up(self.submitter.session_lost(text))
            raise TransportError(text)

    def _lose_session(self, text: str, goodbye: str = "") -> None:
        """goodbye: what to tell a broker that still knows the session."""
        log.warning("%s; what was pending is lost, connecting anew", text)
        awaited = self.submitter.session_lost(text)
        if goodbye:
            self._session.post(Bye(goodbye))
            self._send(self._turn_at)
        for alarm, _ in [*self._answers.values(), *self.lock_requests.values()]:
            alarm()
        self._begin_session()
        self._wake_up(awaited)

    def _wake_up(self, awaited: list[Outcome]) -> None:
        """Call each waiter. After the whole batch, so that who wakes finds all of it."""
        for outcome in awaited:
            waiters, outcome.waiters = outcome.waiters, None
            for waiter in waiters or ():
                try:
                    waiter(outcome)
                except Exception:
                    log.exception("a waiter of task %x failed", outcome.id)

    # Only called through `call`: what user threads want done to outcomes.

    def cancel(self, outcomes: list[Outcome]) -> None:
        """End the pending ones here and at the broker."""
        self._wake_up(self.submitter.cancel(outcomes))


def hello(name: str, depth: int) -> Hello:
    """How a client of this process introduces itself."""
    from zfabric import __version__

    return Hello(
        role=CLIENT,
        name=name,
        zfabric=__version__,
        python=platform.python_version(),
        host=socket.gethostname(),
        pid=os.getpid(),
        depth=depth,
    )
