"""The one thread of a client that touches sockets.

User threads queue rows and wake this thread, by an eventfd and only when it sleeps: a flood of
submits costs no system call per call. Each turn it takes in what has arrived, wakes who waits
for it, does what user threads asked for, sends what is queued, and sleeps until something
happens. A lone call leaves at once; a flood fills batches by itself.

What is said and heard is the link's (`client.broker_link`); here is the thread, and how others
reach it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from time import monotonic
from typing import Any

from zfabric.client.alarm import Alarm
from zfabric.client.broker_link import BrokerLink
from zfabric.config import Settings
from zfabric.errors import (
    ClientClosed,
    ConnectFailed,
    ResultTimeout,
    TransportError,
    ZFabricError,
)
from zfabric.keys import Join
from zfabric.runtime.data_thread import DataThread
from zfabric.runtime.dialling import dial_broker
from zfabric.runtime.link_book import LinkBook
from zfabric.runtime.value import Value
from zfabric.transport.contract import Poller
from zfabric.transport.locality import is_same_host

log = logging.getLogger(__name__)

RETRY_S = 0.02
"""Until the next try where the channel took nothing; the poller tells when it is connected, so
this is for one that is full."""

LOOK_S = 0.25
"""A dropped future does not wake this thread; it looks for them that often at least."""

CLOSED_TEXT = "the client was closed before this task ended"


class IoThread:
    """The thread of a client, and what it moves: rows by its link, values by a data thread.

    address: the broker's.  join: keys for it.  depth: 0, or 1 for a client made inside a task.
    """

    def __init__(
        self, address: str, name: str, depth: int, settings: Settings, join: Join | None = None
    ) -> None:
        self.link = BrokerLink(address, name, depth, settings)
        self.submitter = self.link.submitter
        self.questions = self.link.questions
        self.sleeping = False
        """Whether the thread would not notice new rows without `wake`."""
        self.links = LinkBook(settings)
        """What is known of the links that values came and went by."""
        self.tidy: Callable[[], Callable[[], None] | None] = lambda: None
        """A weak reference to what is called at `tidy_at`: the thread may not hold the client."""
        self.tidy_at = inf
        self.at_end: list[Callable[[], object]] = []
        """Called when the thread ends."""
        self._address = address
        self._join = join
        self._settings = settings
        self._calls: deque[Callable[[], object]] = deque()
        self._error: ZFabricError | None = None
        self._closing = False
        self._ended = False
        """The thread takes no more calls; whoever posts one runs it."""
        self._pid = os.getpid()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller: Poller | None = None
        self._thread = threading.Thread(target=self._run, name="zfabric-io", daemon=True)

    # --- user threads -------------------------------------------------------------------------

    def start(self, timeout_s: float) -> None:
        """Begin, and wait for the broker's Welcome.

        Raises ConnectFailed after timeout_s without one, Refused when the broker says no.
        """
        self._thread.start()
        welcomed = self.link.ready.wait(timeout_s)
        if self._error is not None:
            self._thread.join()
            raise self._error
        if not welcomed:
            self.close()
            trouble = self.link.trouble
            text = trouble and f"cannot join the broker at {self._address}: {trouble}"
            raise ConnectFailed(self._address, timeout_s, text)

    def attach(self, run: str, timeout_s: float) -> None:
        """Begin another session, that of a run. Raises Refused, ResultTimeout, ClientClosed; where
        refused, a session without a run has begun."""
        self.link.ready = Alarm()
        self.call(self.link.begin_run, run)
        welcomed = self.link.ready.wait(timeout_s)
        refused, self.link.refused = self.link.refused, None
        if refused is not None:
            raise refused
        if not self.is_open:
            raise ClientClosed(self.submitter.closed_text)
        if not welcomed:
            raise ResultTimeout(
                f"the broker at {self._address} did not answer within {timeout_s:.3g} s"
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
        self.link.release_at = 0.0
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
        request = self.questions.new_number()
        self.questions.answers[request] = (alarm, box)
        try:
            self.call(self.link.put_question, request, what, about, text)
            answered = self._ended or alarm.wait(timeout_s)
        finally:
            self.questions.answers.pop(request, None)
            self.submitter.answered(request)
        if box:
            return box[0]
        if answered:
            raise ClientClosed(self.submitter.closed_text or "the client is closed")
        raise ResultTimeout(
            f"the broker at {self._address} did not answer within {timeout_s:.3g} s"
        )

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
            channel = dial_broker(self._address, self._join, self._settings)
            self._poller = Poller()
            self._poller.add(channel)
            self._poller.add(self._wake_fd)
            self.link.begin(channel)
            while not self._closing:
                self._turn()
            self.link.say_goodbye()
        except ZFabricError as exc:
            self._error = exc
        except BaseException as exc:
            log.exception("the client's I/O thread failed")
            self._error = TransportError(f"the client's I/O thread failed: {exc!r}")
        finally:
            self._end()

    def _end(self) -> None:
        text = str(self._error) if self._error is not None else CLOSED_TEXT
        self.link.wake_up(self.submitter.closed(self.submitter.closed_text or text))
        data, self.link.data = self.link.data, None
        self._ended = True
        self._run_calls()
        self.link.wake_up(self.submitter.closed(self.submitter.closed_text))
        self.questions.wake_all()
        if data is not None:
            data.close()
        for act in self.at_end:
            act()
        self.link.ready()
        self.link.close(linger_s=0.0 if self._error else 1.0)

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

    def _turn(self) -> None:
        assert self._poller is not None
        link = self.link
        now = monotonic()
        link.turn(now)
        while self._calls:
            self._calls.popleft()()
        if now >= self.tidy_at:
            self.tidy_at = inf
            if tidy := self.tidy():
                tidy()
        wake_at = min(link.tick(now), now + LOOK_S)
        if not link.send(now):
            wake_at = min(wake_at, now + RETRY_S)
        if self.submitter.released and link.is_welcomed and not link.stuck:
            wake_at = min(wake_at, link.release_at)
        self.sleeping = True
        # From here on a new row wakes us; this looks for those that came just before.
        if link.readable or self._calls or self._closing or link.has_rows():
            self.sleeping = False
            wake_at = 0.0
        for ready in self._poller.wait(max(0.0, wake_at - monotonic()) if wake_at else 0.0):
            if ready == self._wake_fd:
                self.sleeping = False
                try:
                    os.eventfd_read(self._wake_fd)
                except BlockingIOError:
                    pass
            else:
                link.readable = True
        self.sleeping = False

    @property
    def data(self) -> DataThread | None:
        """Moves values; begins when first asked for. Only for this thread, which gets its
        callbacks too; None when this thread has ended."""
        if self.link.data is None and not self._ended:
            self.link.data = DataThread(
                self.post,
                self.link.post_relay,
                own=self._join and self._join.own,
                settings=self._settings,
                links=self.links,
                relay_is_local=is_same_host(self._address),
                allocate=Value.private,
            )
        return self.link.data
