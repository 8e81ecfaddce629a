"""A client in virtual time: the real submitter and session, and a user who does many things.

The user knows what each task must give, as tasks are digests of their inputs: a value that
arrives is compared, and an end without a value must have a reason that the user knows of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from msgpack import packb, unpackb

from zfabric import messages as m
from zfabric import wire
from zfabric.config import Settings
from zfabric.core.session import Session
from zfabric.core.submitter import PENDING, Outcome, Submitter
from zfabric.errors import InternalError
from zfabric.testing import sim_slots
from zfabric.testing.links import Weather
from zfabric.testing.sim_locks import SimLocks
from zfabric.testing.sim_net import Agenda, Dial, Listener, Node
from zfabric.testing.sim_slots import SimValue, arguments, digest
from zfabric.testing.sim_worker import HELLO_S, RETRY_S, SimWorker

FAILED = frozenset(
    (m.ERROR, m.CANCELLED, m.KILLED, m.LOST, m.UNFIT, m.LATE, m.OVERSIZE, m.UNKNOWN, m.FULL)
)

DURABLE = frozenset((m.VALUE, m.STORED))

MAX_REFUSALS = 40
"""Until a client gives up a run that another one holds: longer than anybody sleeps."""

NO_OPTIONS = m.TaskOptions()


class Call:
    """What the user knows of one task.

    want: the digest that it must have.  may: statuses with which it may end of itself instead.
    """

    __slots__ = ("checked", "deps", "may", "outcome", "want")

    def __init__(self, outcome: Outcome, want: bytes, deps: Sequence[Call], may: set[int]) -> None:
        self.outcome = outcome
        self.want = want
        self.deps = deps
        self.may = may
        self.checked = False


def ancestors(call: Call) -> set[Call]:
    """All calls that it was made from, without itself."""
    seen: set[Call] = set()
    stack = [call]
    while stack:
        deps = [dep for dep in stack.pop().deps if dep not in seen]
        stack.extend(deps)
        seen.update(deps)
    return seen


def reasons(call: Call) -> set[int]:
    """How a call may end without a value: as it says itself, or with one of its inputs."""
    return call.may.union(*(cause.may for cause in ancestors(call)))


class SimClient(Node):
    """One client process with its user."""

    def __init__(
        self,
        agenda: Agenda,
        name: str,
        broker: Callable[[], Listener | None],
        settings: Settings,
        weather: Weather,
        directory: dict[int, SimWorker],
        habits: Sequence[str],
        depth: int = 0,
        run: str = "",
        before: SimClient | None = None,
    ) -> None:
        """run: the named run that it attaches to, "" for none.  before: who held that last."""
        super().__init__(agenda)
        self.run = run
        self.attaching = bool(run)
        self.n_adopted = 0
        self.locks = SimLocks(self)
        self._before = before
        self._refusals = 0
        """How often somebody else held the run since its session was lost, or ever."""
        self._is_fenced = False
        """Its session was lost: another one may hold its run now."""
        self._end_request = 0
        """Of a question that is to end a run, and whether that is its own:"""
        self._ends_own = False
        self._known: dict[int, Call] = {}
        self._told: list[tuple[int, int]] = []
        self._page = 0
        self.name = name
        self.depth = depth
        self.settings = settings
        self.dial = Dial(self, broker, weather)
        self.directory = directory
        self.submitter = Submitter(settings)
        self.calls: list[Call] = []
        self.welcomed = False
        self.fetches_fail = 0.0
        self.n_checked = 0
        self.n_sessions_lost = 0
        self.n_resumed = 0
        self.put_at: set[int] = set()
        """Ids of values that this client has put into stores."""
        self._habits = habits
        self.endless: set[int] = set()
        self.keyed: set[int] = set()
        """Tasks that a run keeps for its next holder."""
        self._asked: dict[int, int] = {}
        """Questions that the broker has not answered: how many tasks each was about."""
        self._requests = 0
        self._salt = 0
        self._not_again: set[int] = set()
        """Tasks that would never end."""
        self._begin(agenda.now)
        self.wake(agenda.now)

    # --- the process --------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        self.session = Session(self.agenda.rng.getrandbits(62) + 1, settings=self.settings, now=now)
        self.welcomed = False
        self.resuming = False
        self._hello_at = now
        self._heard_from = now
        self._turn_at = now

    def die(self) -> None:
        """kill -9."""
        self.alive = False
        self.dial.cut()

    def say_goodbye(self) -> None:
        """The user closes the client."""
        if self.welcomed:
            self.session.post(m.Bye("closed"))
            self._send(self.agenda.now)
        connection = self.dial.connection
        if connection is not None and not connection.broken:
            # Lingering: what was taken still leaves.
            self.agenda.at(self.agenda.now + 1.0, self.dial.cut)
        self.alive = False

    def turn(self, now: float) -> float:
        if now - self._turn_at > self.settings.suspect_s:
            self._heard_from = now
        self._turn_at = now
        self._receive(now)
        if self.welcomed:
            wake = min(self.session.tick(now), now + 0.25)
            if (
                now - max(self._heard_from, self.session.last_heard)
                > self.settings.dead_s + self.settings.lease_s
            ):
                self._lose_session("the broker was silent")
        else:
            if now >= self._hello_at:
                if not self.session.has_unsent:
                    self.session.post(
                        m.Hello(
                            m.CLIENT,
                            self.name,
                            "1",
                            "3",
                            "host",
                            1,
                            depth=self.depth,
                            run=self.run,
                            previous=self.session.token if self.resuming else 0,
                            acked=self.session.acked if self.resuming else 0,
                        )
                    )
                self._hello_at = now + HELLO_S
            wake = self._hello_at
        if not self._send(now):
            wake = min(wake, now + RETRY_S)
        return min(wake, self.dial.due())

    def _send(self, now: float) -> bool:
        session = self.session
        while True:
            frames = session.next_frames()
            if frames is None:
                if not self.welcomed or session.is_full:
                    return True
                message = self.submitter.next_message()
                if message is None:
                    return True
                session.post(message)
                continue
            if not self.dial.send(frames, now):
                return False
            session.sent()

    def _receive(self, now: float) -> None:
        while (frames := self.dial.recv(now)) is not None:
            if not frames:
                if self.welcomed:
                    self.session.reconnected()
                self._hello_at = now
                continue
            header, message = wire.decode(frames)
            if header.token == self.session.token:
                if self.session.receive(header, message, now, len(frames[1])):
                    self._take(header, message)
                self._heard_from = now

    def _take(self, header: wire.Header, message: Any) -> None:
        kind = type(message)
        if kind is m.Results:
            self.submitter.results(message)
        elif kind is m.Output:
            self.submitter.wrote(message)
        elif kind is m.Welcome:
            if self.welcomed and message.number != self.submitter.number:
                self._lose_session("the broker had given this client up")
            elif not self.welcomed:
                self.welcomed = True
                self.session.epoch = header.epoch
                if self.resuming:
                    self.resuming = False
                    self.n_resumed += 1
                    self.session.go_on()
                    for part in [*self.submitter.inventory(), *self.submitter.ask_again()]:
                        self.session.post(part)
                    self.locks.came_back()
                else:
                    self.submitter.welcomed(message.number, message.counter)
                    if self.run:
                        self._attach(message.resumed)
        elif kind is m.Refuse:
            if message.code == "epoch":
                if self.welcomed:
                    self.welcomed = False
                    self.resuming = True
                    self.session.pause()
                    self._hello_at = self.agenda.now
            elif message.code == "unknown" and (self.welcomed or self.resuming):
                self._lose_session(message.text)
            elif message.code == "run" and not self.welcomed:
                self._begin(self.agenda.now)
                self._hello_at = self.agenda.now + HELLO_S
                self._refusals += 1
                if self._is_fenced or self._refusals > MAX_REFUSALS:
                    self.die()
            elif message.code == "unknown":
                self._begin(self.agenda.now)
            else:
                raise InternalError(f"the broker refused client {self.name}: {message}")
        elif kind is m.Answer or kind is m.Reply:
            self._take_answer(message)
        elif kind is m.Alarm:
            self.submitter.alarmed(message.text)
            self._put_queries()
        elif kind is m.Locked:
            self.locks.answered(message)
        else:
            raise InternalError(f"a client got {message}")

    def _put_queries(self) -> None:
        for query in self.submitter.queries():
            self.session.post(query)

    def _take_answer(self, message: m.Answer | m.Reply) -> None:
        self.submitter.answered(message.request)
        if message.request == self._end_request:
            self._end_request = 0
            if self._ends_own and not unpackb(message.payload):
                self.say_goodbye()
            return
        if message.request == self._page:
            self._take_page(unpackb(message.payload))
            return
        if message.request not in self._asked:
            return  # asked twice, as the broker restarted
        stories = unpackb(message.payload)
        if len(stories) != self._asked.pop(message.request):
            raise InternalError(f"client {self.name} did not hear of each task: {stories}")
        for story in stories:
            if not story["reasons"] or not all(text for _, text in story["reasons"]):
                raise InternalError(f"a task without a reason: {story}")

    def _lose_session(self, text: str) -> None:
        self.n_sessions_lost += 1
        self.submitter.session_lost(text)
        for call in self.calls:
            if call.outcome.status == PENDING:
                raise InternalError(f"client {self.name} lost its session, not {call.outcome.id:x}")
        self.calls.clear()
        self._asked.clear()
        self._before = None  # it, too, lost what it had
        self._end_request = 0
        self._is_fenced = bool(self.run)
        self.locks.session_lost()
        self._begin(self.agenda.now)

    # --- a run --------------------------------------------------------------------------------

    def _attach(self, is_old: bool) -> None:
        """The session of a run has begun, and with an old one come its tasks."""
        self.attaching = is_old
        self._told.clear()
        self._refusals = 0
        self._is_fenced = False
        before = self.agenda.holders.get(self.run)
        self._before = before if isinstance(before, SimClient) and before is not self else None
        self._known = {c.outcome.id: c for c in self._before.calls} if self._before else {}
        self.agenda.holders[self.run] = self
        if is_old:
            self.session.post(m.Inventory([], [], [], [], 1))
            self._ask_page("")

    def _ask_page(self, after: str) -> None:
        self._requests += 1
        self._page = self._requests
        self.submitter.ask(self._page, "run", [0], after)

    def _take_page(self, page: Sequence[Sequence[Any]]) -> None:
        """Tasks of the run: those that the user of before still wants are this one's now."""
        self._page = 0
        if page:
            self._told += [(id_, fn) for id_, _, fn in page]
            self._ask_page(str(page[-1][0]))
            return
        self.attaching = False
        before = self._before
        known = self._known
        told = {id_ for id_, _ in self._told}
        if before is not None and self.run not in self.agenda.ended_runs:
            for id_, call in known.items():
                if id_ in before.keyed and call.outcome.status in DURABLE and id_ not in told:
                    raise InternalError(f"run {self.run} lost {id_:x}, which had ended")
        fresh = []
        table = self.submitter.outcomes
        for id_, fn in self._told:
            if id_ in table:
                continue  # submitted since
            outcome = table[id_] = Outcome(id_, fn)
            old = known.get(id_)
            if old is None or before is None or id_ in before.endless:
                self.submitter.released.append(id_)
                continue
            may = old.may | {m.CANCELLED}  # a Retry of one that was cancelled may be lost
            self.calls.append(Call(outcome, old.want, old.deps, may))
            self.keyed.add(id_)
            self._not_again.add(id_)
            fresh.append(id_)
        self.n_adopted += len(fresh)
        if fresh:
            self.submitter.say(m.Inventory(fresh, [0] * len(fresh), [], [], 1))
        self.wake(self.agenda.now)

    def end_run(self, run: str) -> None:
        """The user wants a run to be over: its own, or one that nobody holds."""
        if not self.attaching and not self._end_request:
            self._requests += 1
            self._end_request = self._requests
            self._ends_own = run == self.run
            self.agenda.ended_runs.add(run)
            self.submitter.ask(self._end_request, "end run", [0], run)
            self.wake(self.agenda.now)

    # --- the user -----------------------------------------------------------------------------

    def act(self) -> None:
        """Do one thing of the kind that this user does."""
        if not self.welcomed or self.attaching:
            return
        habit = self.agenda.rng.choice(list(self._habits))
        getattr(self, f"_{habit}")()
        if self.agenda.n_steps % 4 == 0:
            self._ask_why()
        self.wake(self.agenda.now)

    def _ask_why(self) -> None:
        pending = [c.outcome.id for c in self.calls if c.outcome.status == PENDING][-20:]
        if pending:
            self._requests += 1
            self._asked[self._requests] = len(pending)
            self.submitter.ask(self._requests, "why", pending)
            if self.welcomed:
                self._put_queries()

    def call(
        self,
        deps: Sequence[Call] = (),
        *,
        seconds: float | None = None,
        behaviour: int = sim_slots.GOOD,
        large: bool | None = None,
        options: m.TaskOptions | None = None,
    ) -> Call:
        """Submit one task."""
        rng, submitter = self.agenda.rng, self.submitter
        fn = rng.randint(1, 12)
        blob = b"function %d" % fn
        submitter.functions[fn] = (fn, f"f{fn}", blob)
        self._salt += 1
        if seconds is None:
            seconds = rng.choice([0.0, 1e-5, 1e-4, 0.01, 0.2])
        if large is None:
            large = rng.random() < 0.3
        payload = arguments(seconds, behaviour, large, self._salt)
        may = {
            sim_slots.RAISES: {m.ERROR},
            sim_slots.FLAKY: {m.ERROR},
            sim_slots.DIES: {m.KILLED},
            sim_slots.POISON: {m.KILLED},
        }.get(behaviour, set())
        if options is not None and (options.workers or options.resources):
            may |= {m.UNFIT}
        if self.settings.session_bytes < 1 << 30:  # or an input was not taken in
            may |= {m.FULL, m.LOST}
        outcome = submitter.new_outcome(fn)
        made = Call(outcome, digest(blob, payload, [dep.want for dep in deps]), deps, may)
        if self.run and rng.random() < 0.8:
            options = replace(options or NO_OPTIONS, key=f"key {self._salt}")
            self.keyed.add(outcome.id)
        if options is not None and options.resources and self.agenda.on_device is not None:
            self.agenda.on_device.add(outcome.id)
        row = (outcome.id, fn, payload, [dep.outcome.id for dep in deps] or None, options)
        submitter.rows.append(row)
        self.calls.append(made)
        return made

    def _some(self, most: int) -> list[Call]:
        """Different calls that the user still holds. Not endless ones: who waits for such a call,
        and has let go of it, waits for ever, and that is nobody's fault but the user's."""
        rng = self.agenda.rng
        calls = [call for call in self.calls if call.outcome.id not in self.endless]
        return rng.sample(calls, min(len(calls), rng.randint(0, most)))

    def _map(self) -> None:
        for _ in range(self.agenda.rng.randint(1, 12)):
            self.call()

    def _chain(self) -> None:
        last = self._some(1)
        for _ in range(self.agenda.rng.randint(2, 8)):
            last = [self.call(last, seconds=self.agenda.rng.choice([0.0, 1e-5, 0.01]))]

    def _tree(self) -> None:
        level = [self.call() for _ in range(self.agenda.rng.choice([2, 4, 8]))]
        while len(level) > 1:
            level = [self.call(level[i : i + 2]) for i in range(0, len(level), 2)]

    def _fan_in(self) -> None:
        made = [self.call(large=False) for _ in range(self.agenda.rng.randint(5, 25))]
        for _ in range(self.agenda.rng.randint(1, 3)):
            self.call(made)

    def _fan_out(self) -> None:
        root = self.call()
        for _ in range(self.agenda.rng.randint(2, 9)):
            self.call([root])

    def _mixed(self) -> None:
        for _ in range(self.agenda.rng.randint(1, 5)):
            self.call(self._some(4))

    def _raises(self) -> None:
        self.call([self.call(self._some(2), behaviour=sim_slots.RAISES)])

    def _flaky(self) -> None:
        retries = self.agenda.rng.randint(0, 3)
        first = self.call(behaviour=sim_slots.FLAKY, options=m.TaskOptions(retries=retries))
        self.call([first, *(c for c in self._some(2) if c is not first)])

    def _dies(self) -> None:
        behaviour = self.agenda.rng.choice([sim_slots.DIES, sim_slots.POISON])
        self.call([self.call(behaviour=behaviour, seconds=0.01)])

    def _blocks(self) -> None:
        self.call(behaviour=sim_slots.BLOCKS, seconds=self.agenda.rng.choice([0.05, 0.5]))
        self._map()

    def _options(self) -> None:
        rng = self.agenda.rng
        for _ in range(rng.randint(1, 4)):
            self.call(
                self._some(1),
                options=rng.choice(
                    [
                        m.TaskOptions(priority=rng.randint(-2, 2)),
                        m.TaskOptions(resources={"GPU": 1}),
                        m.TaskOptions(workers=("w1",)),
                        m.TaskOptions(key="a name"),
                    ]
                ),
            )

    def _long(self) -> None:
        self.call(seconds=self.agenda.rng.choice([0.5, 2.0]))
        self._map()

    def _endless(self) -> None:
        """Only cancelling it ends it, or letting go of it: the fabric has to kill."""
        options = self.agenda.rng.choice([None, m.TaskOptions(resources={"GPU": 1})])
        call = self.call(seconds=1e6, options=options)
        call.may = call.may | {m.CANCELLED}
        self._not_again.add(call.outcome.id)
        self.endless.add(call.outcome.id)
        session = self.session
        let_go = self.agenda.rng.random() < 0.3

        def end() -> None:
            if self.alive and session is self.session and call in self.calls:
                if let_go:
                    self.drop(call)
                else:
                    self.submitter.cancel([call.outcome])
                self.wake(self.agenda.now)

        self.agenda.at(self.agenda.now + self.agenda.rng.choice([0.0, 0.01, 1.0]), end)

    def _limited(self) -> None:
        """Its time limit ends it, or it ends before."""
        rng = self.agenda.rng
        limits = m.TaskOptions(timeout_s=rng.choice([0.02, 0.4]), retries=rng.choice([0, 1]))
        call = self.call(self._some(1), seconds=rng.choice([0.001, 0.1, 1e6]), options=limits)
        call.may = call.may | {m.LATE}
        self._not_again.add(call.outcome.id)

    def _once(self) -> None:
        """It must never begin twice; see Agenda.begun."""
        rng = self.agenda.rng
        self._salt += 1
        for behaviour in rng.sample([sim_slots.ONCE, sim_slots.ONCE, sim_slots.ONCE_DIES], 2):
            call = self.call(
                self._some(1),
                seconds=rng.choice([0.0, 0.01, 0.5]),
                behaviour=behaviour,
                options=m.TaskOptions(idempotent=False),
            )
            call.may = call.may | {m.UNKNOWN, m.LOST}
            self._not_again.add(call.outcome.id)

    def _release(self) -> None:
        for call in self._some(8):
            self.drop(call)

    def drop(self, call: Call) -> None:
        """The user's future goes."""
        self.calls.remove(call)
        self.submitter.released.append(call.outcome.id)

    def _cancel(self) -> None:
        cancelled = self._some(3)
        for call in cancelled:
            call.may = call.may | {m.CANCELLED}
        self.submitter.cancel([call.outcome for call in cancelled])

    def _retry(self) -> None:
        failed = [
            call
            for call in self.calls
            if call.outcome.status in FAILED and call.outcome.id not in self._not_again
        ]
        self.submitter.retry([call.outcome for call in failed], FAILED)
        causes = {cause for call in self.calls for cause in ancestors(call)}
        for call in failed:
            call.checked = False
            if call not in causes:
                call.may = call.may - {m.CANCELLED}  # that was the attempt before

    def _scatter(self) -> None:
        """Put a value into a worker's store, and tell the broker a little later."""
        rng = self.agenda.rng
        stores = [worker for worker in self.directory.values() if worker.alive]
        if not stores:
            return
        chosen = rng.sample(stores, rng.randint(1, min(2, len(stores))))
        self._salt += 1
        data = digest(b"data", b"%d" % self._salt, ())
        number, session = self.submitter.number, self.session
        outcome = self.submitter.new_outcome(0)
        numbers = [worker.number for worker in chosen]
        for worker in chosen:
            worker.put(outcome.id, SimValue(1 << 20, data))
        self.put_at.add(outcome.id)

        def register() -> None:
            if session is not self.session or not self.alive or number != self.submitter.number:
                return
            message = m.Register([outcome.id], [1 << 20], [numbers])
            holders = [[number, ""] for number in numbers]
            self.submitter.register([outcome], [packb([1 << 20, holders])], message)
            may = {m.LOST}
            if self.settings.session_bytes < 1 << 30:  # a restarted broker says why
                may.add(m.FULL)
            call = Call(outcome, data, (), may)
            self.calls.append(call)
            for _ in range(rng.randint(0, 3)):
                self.call([call])
            self.wake(self.agenda.now)

        self.agenda.at(self.agenda.now + rng.choice([0.0, 0.01, 0.1]), register)

    def _fetch(self) -> None:
        self.fetch([call for call in self._some(4) if call.outcome.status == m.STORED])

    def fetch(self, calls: Sequence[Call]) -> int:
        """Look for stored values where they are said to be; ask again for those that are not.

        Returns how many were not there.
        """
        missing = 0
        for call in calls:
            outcome = call.outcome
            found = None
            holders = unpackb(outcome.payload)[1] if outcome.payload else []
            if self.agenda.rng.random() >= self.fetches_fail:
                for number, _ in holders:
                    worker = self.directory.get(number)
                    if worker is not None and worker.alive and outcome.id in worker.store:
                        found = worker.store[outcome.id]
                        break
            if found is None:
                missing += 1
                self._requests += 1
                self.submitter.locate(outcome, self._requests)
                call.checked = False
            elif found.data != call.want:
                raise InternalError(f"{outcome.id:x} has a wrong value at a worker")
            else:
                call.checked = True
        if missing:
            self.wake(self.agenda.now)
        return missing

    # --- what the user checks -----------------------------------------------------------------

    @property
    def is_answered(self) -> bool:
        """Whether no question is open."""
        is_open = self._asked or self._end_request or self.attaching or self.locks.is_waiting
        return not is_open

    def check(self) -> int:
        """Compare what has ended with what it must be. Returns how many are pending."""
        pending = 0
        for call in self.calls:
            outcome = call.outcome
            status = outcome.status
            if status == PENDING:
                pending += 1
            elif not call.checked and status != m.STORED:
                call.checked = True
                self.n_checked += 1
                if status == m.VALUE:
                    if outcome.payload != call.want:
                        raise InternalError(f"{outcome.id:x} has a wrong value")
                elif status not in reasons(call):
                    text = outcome.payload or b""
                    raise InternalError(
                        f"{outcome.id:x} ended with status {status}, which nothing explains: "
                        f"{text!r}"
                    )
        return pending
