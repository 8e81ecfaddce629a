"""A client's session with its broker: what is said and heard, all of it in the I/O thread."""

from __future__ import annotations

import logging
import os
import platform
import random
import socket
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from zfabric import ids, wire
from zfabric import messages as m
from zfabric.client.alarm import Alarm
from zfabric.client.questions import Questions
from zfabric.config import Settings
from zfabric.core.session import Session
from zfabric.core.submitter import Outcome, Submitter
from zfabric.errors import Refused, RemoteProtocolError, TransportError
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
from zfabric.transport.contract import REFUSED_KEY, Channel
from zfabric.wire.header import decode_header

log = logging.getLogger(__name__)

HELLO_S = 0.5
"""Between two Hellos that nobody answered."""

RESUME_S = 0.1
"""Seconds over which clients spread their coming back to a broker that has restarted."""

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


class BrokerLink:
    """The machine, the session and the channel of a client.

    address: the broker's.  depth: 0, or 1 for a client made inside a task.
    """

    def __init__(self, address: str, name: str, depth: int, settings: Settings) -> None:
        self.address = address
        self.name = name
        self.settings = settings
        self.submitter = Submitter(settings)
        self.questions = Questions()
        self.ready = Alarm()
        """Goes off when the broker has welcomed us, or will not."""
        self.run = ""
        """The named run that it holds, or attaches to."""
        self.refused: Refused | None = None
        """Why it could not attach to the run that it was to attach to later on."""
        self.welcome: Welcome | None = None
        self.n_garbage = 0
        """Messages that were dropped because they made no sense."""
        self.lock_era = 0
        """Rises whenever the broker has forgotten our locks."""
        self.data: DataThread | None = None
        """What gets the relayed parts of values, if it has begun."""
        self.broker_ended: Callable[[], str] | None = None
        """Tells how a broker of our own ended, "" while it runs; None: it is not ours."""
        self.on_output: Callable[[list[tuple[int, int, bytes]]], object] | None = None
        """Called in the thread with what tasks wrote; quick, never raising."""
        self.release_at = 0.0
        """When dropped futures may be released again."""
        self.stuck = False
        """The last send was not taken, or the window is full: more rows change nothing."""
        self.readable = True
        """The poller reported the channel, or not all of it was read."""
        self.is_cut = False
        """The connection broke, and nothing has arrived since."""
        self.is_welcomed = False
        self._depth = depth
        self._attaching = False
        self._channel: Channel | None = None

    @property
    def trouble(self) -> str:
        """Why there is no connection, where that is known."""
        return self._channel.trouble if self._channel is not None else ""

    def begin(self, channel: Channel) -> None:
        """With a channel that dials the broker. It is closed by `close`."""
        self._channel = channel
        self._begin_session()

    def _begin_session(self) -> None:
        now = monotonic()
        self.lock_era += 1
        self._session = Session(ids.new_token(), settings=self.settings, now=now)
        self.is_welcomed = False
        self._resuming = False
        self._hello_at = now
        self._turn_at = now
        self._heard_from = now

    def begin_run(self, run: str) -> None:
        """Another session, that of a named run."""
        if self.is_welcomed:
            self._session.post(Bye("it attaches to a run"))
            self.send(self._turn_at)
        self.run = run
        self._attaching = True
        self._begin_session()

    def turn(self, now: float) -> None:
        """The first half of a turn: what has arrived is taken in."""
        if now - self._turn_at > self.settings.suspect_s:
            # We slept (SIGSTOP, a suspended laptop): the broker's silence proves nothing.
            self._heard_from = now
        self._turn_at = now
        if self.is_welcomed and self.submitter.rows:
            self.send(now)  # a lone call leaves before anything else is looked at
        if self.readable:
            self._receive(now)

    def tick(self, now: float) -> float:
        """What time alone brings about. Returns when to be called again at the latest."""
        if not self.is_welcomed:
            return self._say_hello(now)
        wake_at = self._session.tick(now)
        self._watch_broker(now)
        if self.is_cut:
            self._look_after_own_broker()
        return wake_at

    def has_rows(self) -> bool:
        """Whether there is something to send that can be sent."""
        return self.is_welcomed and bool(self.submitter.rows) and not self.stuck

    def put_question(self, request: int, what: str, about: Sequence[int], text: str) -> None:
        """Ask the broker."""
        self.submitter.ask(request, what, about, text)
        self._put_queries()

    def _put_queries(self) -> None:
        """What is answered although the broker takes no work now."""
        if self.is_welcomed:
            for query in self.submitter.queries():
                self._session.post(query)

    def cancel(self, outcomes: list[Outcome]) -> None:
        """End the pending ones here and at the broker."""
        self.wake_up(self.submitter.cancel(outcomes))

    def close(self, linger_s: float) -> None:
        """Let go of the channel."""
        if self._channel is not None:
            self._channel.close(linger_s=linger_s)

    # --- sending ------------------------------------------------------------------------------

    def send(self, now: float) -> bool:
        """Send what the window and the channel take. False: try again soon."""
        assert self._channel is not None
        session, send = self._session, self._channel.send
        submitter = self.submitter
        releasing = now >= self.release_at or len(submitter.released) >= RELEASE_AT_ONCE
        self.stuck = False
        while True:
            frames = session.next_frames()
            if frames is None:
                if not self.is_welcomed:
                    return True
                if not submitter.has_work(releasing):
                    return True
                if session.is_full:
                    self.stuck = True  # an ack will wake us
                    return True
                message = submitter.next_message(releasing)
                if message is None:
                    self.stuck = submitter.is_held_up  # Results will wake us
                    return True
                if type(message) is Release:
                    self.release_at = now + RELEASE_S
                session.post(message)
                continue
            if not send(frames):
                self.stuck = True
                return False
            session.sent()

    def post_relay(self, peer: int, frames: list[Any]) -> None:
        """Send frames to another session by way of the broker."""
        self._session.post(Relay(peer, tuple(frames)))

    def _check_key(self) -> None:
        """Raises Refused when the last dial was turned down for its key: it has been revoked, and
        whoever waits hears that."""
        if self._channel is not None and self._channel.trouble == REFUSED_KEY:
            text = f"the broker at {self.address} turned us down: {REFUSED_KEY}"
            self.wake_up(self.submitter.session_lost(text))
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

    def say_goodbye(self) -> None:
        """Tell the broker that we close; what is pending ends."""
        if self.is_welcomed:
            self.wake_up(self.submitter.closed(self.submitter.closed_text))
            self._session.post(Bye("closed"))
            self.send(monotonic())

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
            self.is_cut = False
            if fresh:
                if type(message) is Results:
                    self.wake_up(self.submitter.results(message))
                    if len(message.ids) < LONE_ROWS:
                        break
                else:
                    self._take(header, message)
                    session = self._session
        else:
            return  # there may be more
        self.readable = False

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
        if not self.is_welcomed:
            raise RemoteProtocolError(error.reason, text)
        self._lose_session(text, goodbye=f"unreadable: {error.reason}")

    def _on_cut(self, now: float) -> None:
        log.debug("the connection to %s broke; redialling", self.address)
        if self.is_welcomed:
            # Before that a Beat would be the first that the broker hears of us, and it refuses
            # sessions that it does not know.
            self._session.reconnected()
            self._put_queries()
        self._hello_at = now
        self.is_cut = True

    def _take(self, header: wire.Header, message: Message) -> None:
        if type(message) is Answer or type(message) is Reply:
            self.questions.answered(message.request, message.payload)
        elif type(message) is Locked:
            told = (message.held, self.lock_era)
            if not self.questions.locked(message.request, told) and message.held:
                # Nobody waits for it: an Acquire that a restarted broker got once more. Kept, the
                # lock would be locked for as long as this session lasts.
                self.submitter.say(Unlock(message.request))
        elif type(message) is Output:
            new = self.submitter.wrote(message)
            if new and self.on_output is not None:
                self.on_output(new)
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
            if self.data is not None:
                self.data.gone(relay.peer)
            return
        try:
            message = wire.decode(relay.frames)[1]
        except RemoteProtocolError as exc:  # the worker's fault, not the broker's
            self.n_garbage += 1
            log.warning("dropped what worker %d sent: %s", relay.peer, exc)
            return
        if type(message) is LinksTold:
            self.questions.answered(message.request, message.payload)
        elif self.data is not None:
            self.data.relayed(relay.peer, message)

    def _take_welcome(self, header: wire.Header, message: Welcome) -> None:
        if self.is_welcomed:
            # The answer to a Hello that we repeated. Where that lay about until the lease was
            # over, the broker began a session without any of our tasks.
            if self.welcome is not None and message.number != self.welcome.number:
                text = f"the broker at {self.address} took the client for dead"
                self._lose_session(text, "it begins anew")
            return
        self.is_welcomed = True
        self._session.epoch = header.epoch
        self.welcome = message
        if self._resuming:
            self._resuming = False
            self._session.go_on()
            for part in [*self.submitter.inventory(), *self.submitter.ask_again()]:
                self._session.post(part)
            self.questions.wake_lockers()  # Locked may have been lost with that broker
            log.info("client %s goes on at %s", message.name, self.address)
            return
        self.submitter.welcomed(message.number, message.counter)
        self._attaching = False
        if message.resumed:
            # Ends of its tasks may come: who asks for its futures is told of those before.
            self._session.post(Inventory([], [], [], [], 1))
        log.info("client %s is session %d at %s", message.name, message.number, self.address)
        self.ready()

    def _take_refuse(self, message: Refuse) -> None:
        if message.code == "epoch":
            if self.is_welcomed:
                # The broker restarted and has its journal: with the same token, after which what
                # it has not written down goes out again. Not all clients at the same moment.
                self.is_welcomed = False
                self._resuming = True
                self._session.pause()
                self._hello_at = monotonic() + random.uniform(0.0, RESUME_S)
            return
        if message.code == "run" and self._attaching:
            self.refused = Refused(message.code, message.text)
            self._attaching = False
            self.run = ""
            self._begin_session()
            return
        if message.code != "unknown":
            raise Refused(message.code, message.text)
        if not (self.is_welcomed or self._resuming):
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
            self.wake_up(self.submitter.session_lost(text))
            raise TransportError(text)

    def _lose_session(self, text: str, goodbye: str = "") -> None:
        """goodbye: what to tell a broker that still knows the session."""
        log.warning("%s; what was pending is lost, connecting anew", text)
        awaited = self.submitter.session_lost(text)
        if goodbye:
            self._session.post(Bye(goodbye))
            self.send(self._turn_at)
        self.questions.wake_all()
        self._begin_session()
        self.wake_up(awaited)

    def wake_up(self, awaited: list[Outcome]) -> None:
        """Call each waiter. After the whole batch, so that who wakes finds all of it."""
        for outcome in awaited:
            waiters, outcome.waiters = outcome.waiters, None
            for waiter in waiters or ():
                try:
                    waiter(outcome)
                except Exception:
                    log.exception("a waiter of task %x failed", outcome.id)


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
