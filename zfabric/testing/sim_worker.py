"""A worker in virtual time: the real supervisor and session, simulated slots, store and dials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zfabric import messages as m
from zfabric import wire
from zfabric.config import Settings
from zfabric.core.explain import explain
from zfabric.core.output import OutputBook
from zfabric.core.session import Session
from zfabric.core.supervisor import Supervisor
from zfabric.core.supervisor_effects import (
    AgeOfRow,
    FetchValue,
    ForgetFunctions,
    FreeValues,
    KeepValue,
    KillRow,
    PeekSlot,
    SendRows,
    StartSlot,
    StopSlot,
    TakeBack,
)
from zfabric.errors import InternalError
from zfabric.testing import sim_slots
from zfabric.testing.links import Weather
from zfabric.testing.sim_net import NEVER, Agenda, Dial, Listener, Node
from zfabric.testing.sim_slots import SimSlot, SimValue

HELLO_S = 0.5
RETRY_S = 0.005

DISK_S = 0.05
"""What a value takes to go to disk."""


class SimWorker(Node):
    """One worker process. directory: workers by their numbers, for whoever wants their values."""

    def __init__(
        self,
        agenda: Agenda,
        name: str,
        n_slots: int,
        broker: Callable[[], Listener | None],
        settings: Settings,
        weather: Weather,
        directory: dict[int, SimWorker],
        resources: dict[str, float] | None = None,
        room: int = 0,
    ) -> None:
        """room: values in memory; 0: any. With more than that it is full until its disk, which
        takes one at a time, has the others."""
        super().__init__(agenda)
        self.name = name
        self.settings = settings
        self.dial = Dial(self, broker, weather)
        self.directory = directory
        self.store: dict[int, SimValue] = {}
        self.number = 0
        self._n_started = 0
        self.fetches_fail = 0.0
        """Chance that a fetch finds nobody."""
        self._n_slots = n_slots
        self._resources = resources or {}
        self._room = room
        self._previous = 0
        self.n_rejoined = 0
        self._begin(agenda.now)
        self.wake(agenda.now)

    def _new_session(self, now: float) -> None:
        self.welcomed = False
        self.session = Session(self.agenda.rng.getrandbits(62) + 1, settings=self.settings, now=now)
        self._leave_directory()
        self._acked = 0
        self._tick_at = now

    def _rejoin(self, now: float) -> None:
        self._previous = self.session.token
        self.n_rejoined += 1
        self._new_session(now)

    def _begin(self, now: float) -> None:
        self._new_session(now)
        self.machine = Supervisor(self._n_slots, settings=self.settings, now=now)
        self.slots: dict[int, SimSlot] = {}
        self._ended: list[tuple[float, Supervisor, FetchValue]] = []
        self._n_in_memory = 0
        self._disk_at = NEVER
        self._output = OutputBook()

    # --- the process --------------------------------------------------------------------------

    def die(self) -> None:
        """kill -9."""
        self.alive = False
        self.dial.cut()
        self._leave_directory()

    def _leave_directory(self) -> None:
        # After a restart of the broker the number may be somebody else's already.
        if self.directory.get(self.number) is self:
            del self.directory[self.number]

    def put(self, id_: int, value: SimValue) -> None:
        """Somebody puts a value into the store."""
        self.store[id_] = value
        self.machine.value_put(id_, value.nbytes)

    def turn(self, now: float) -> float:
        self._receive(now)
        self._read_slots(now)
        self._end_fetches(now)
        if now >= self._disk_at:
            self._spill(now)
        if now >= self._tick_at:
            self._tick(now)
        self._act(now)
        self._check_devices()
        if self.machine.failure:
            raise InternalError(self.machine.failure)
        self._speak(now)
        return self._wake_at(now)

    def _wake_at(self, now: float) -> float:
        wake = min(self._tick_at, self._disk_at, self.dial.due())
        wake = min(wake, self.machine.wake_at(now) or NEVER)
        for slot in self.slots.values():
            wake = min(wake, slot.due())
        for at, _, _ in self._ended:
            wake = min(wake, at)
        if self.session.has_unsent:
            wake = min(wake, now + RETRY_S)
        return wake

    def _tick(self, now: float) -> None:
        session, settings = self.session, self.settings
        gap = now - self._tick_at
        if gap > 2 * settings.beat_s:
            session.last_heard = min(now, session.last_heard + gap)
        self._tick_at = now + HELLO_S
        if not self.welcomed:
            if not session.has_unsent:
                session.post(
                    m.Hello(
                        m.WORKER, self.name, "1", "3", "host", 1, slots=self._n_slots,
                        resources=self._resources, data_address=self.name,
                        previous=self._previous,
                    )
                )  # fmt: skip
            return
        session.load = (self.machine.n_rows, self.machine.n_running)
        self._tick_at = min(self._tick_at, session.tick(now))
        if now - session.last_heard > settings.dead_s:
            session.last_heard = now
            session.reconnected()

    # --- the broker ---------------------------------------------------------------------------

    def _receive(self, now: float) -> None:
        session = self.session
        while (frames := self.dial.recv(now)) is not None:
            if not frames:
                if self.welcomed:
                    session.reconnected()
                continue
            header, message = wire.decode(frames)
            if header.token != session.token:
                continue
            if session.receive(header, message, now, len(frames[1])):
                self._on_message(header, message, now)
                session = self.session
        if session.acked != self._acked:
            self._acked = session.acked
            self.machine.acked(self._acked)

    def _on_message(self, header: wire.Header, message: Any, now: float) -> None:
        machine, kind = self.machine, type(message)
        if kind is m.Welcome:
            if self.welcomed and message.number != self.number:
                self._rejoin(now)
            elif not self.welcomed:
                self.welcomed = True
                self.session.epoch = header.epoch
                self.number = message.number
                self.directory[self.number] = self
                self._tick_at = now
                if self._previous:
                    for part in self.machine.rejoin(now):
                        self.session.post(part)
        elif kind is m.Refuse:
            if self.welcomed and message.code in ("unknown", "epoch", "closing", "protocol"):
                if message.code == "protocol":
                    raise InternalError(f"the broker says that we broke the protocol: {message}")
                self._rejoin(now)
            elif not self.welcomed and message.code == "unknown":
                self._new_session(now)
            elif not self.welcomed:
                raise InternalError(f"refused: {message}")
        elif not self.welcomed:
            pass
        elif kind is m.Run:
            machine.run(message)
        elif kind is m.Recall:
            machine.recall(message.ids)
        elif kind is m.Drop:
            machine.drop(message.ids)
        elif kind is m.Free:
            machine.free(message.ids)
        elif kind is m.Forget:
            machine.forget(message.fns)
        elif kind is m.Give:
            machine.give(message)
        elif kind is m.Explain:
            self.session.post(explain(machine, message, now))
        else:
            raise InternalError(f"a worker got {message}")

    def _speak(self, now: float) -> None:
        session, machine = self.session, self.machine
        if self.welcomed:
            output = self._output.take(now)
            if output is not None:
                session.post(output)
            for message in machine.messages(now):
                seq = session.post(message)
                if type(message) is m.Done:
                    machine.done_posted(message, seq)
        while (frames := session.next_frames()) is not None:
            if not self.dial.send(frames, now):
                break
            session.sent()

    # --- slots and store ----------------------------------------------------------------------

    def _read_slots(self, now: float) -> None:
        machine = self.machine
        for number, slot in list(self.slots.items()):
            for event in slot.read(now):
                if type(event) is tuple:
                    statuses, payloads, busy_s, ids = event
                    self._write(number, now)
                    machine.slot_done(number, statuses, payloads, busy_s, now, ids)
                elif event == sim_slots.READY:
                    machine.slot_started(number, now)
                elif event == sim_slots.RESET_DONE:
                    machine.slot_reset(number)
                elif event == sim_slots.BLOCKED:
                    self._peek(number, now)
                    machine.slot_blocked(number)
                elif event == sim_slots.UNBLOCKED:
                    machine.slot_unblocked(number)
                else:
                    self._peek(number, now)
                    del self.slots[number]
                    machine.slot_died(number, "SIGSEGV", slot.is_running, now)

    def _write(self, number: int, now: float) -> None:
        """Some tasks write something, a few too much. No dice: that would change all seeds."""
        row = self.machine.row_at(number, 0)
        if row is not None and row[0] % 5 == 0:
            text = b"output of %x\n" % row[0]
            self._output.write(number, *row, text * (20_000 if row[0] % 100 == 0 else 1), now)

    def _peek(self, number: int, now: float) -> None:
        slot = self.slots[number]
        batch = slot.peek()
        if batch is not None:
            statuses, payloads, busy_s, ids = batch
            self.machine.slot_done(number, statuses, payloads, busy_s, now, ids)
        if slot.is_settled(now):
            self.machine.slot_settled(number)

    def _runs(self, number: int, id_: int) -> bool:
        return self.slots[number].is_running and self.machine.first_row(number) == id_

    def _check_devices(self) -> None:
        """No two rows run at a time that need a device for themselves."""
        wanted = self.agenda.on_device
        if wanted:
            running = [slot.running for slot in self.slots.values() if slot.running in wanted]
            if len(running) > 1:
                text = " and ".join(f"{id_:x}" for id_ in running)
                raise InternalError(f"{text} share a device of worker {self.name}")

    def _act(self, now: float) -> None:
        for _ in range(1000):
            effects = self.machine.effects(now)
            if not effects:
                return
            for effect in effects:
                self._perform(effect, now)
        raise InternalError("the supervisor asks for effects without end")

    def _perform(self, effect: Any, now: float) -> None:
        kind = type(effect)
        if kind is SendRows:
            slot = self.slots[effect.slot]
            slot.send_rows(effect.functions, effect.rows, self.store, now)
        elif kind is KeepValue:
            self.store[effect.id] = effect.value
            self._keep(now)
        elif kind is FreeValues:
            for id_ in effect.ids:
                self.store.pop(id_, None)
        elif kind is TakeBack:
            taken = self.slots[effect.slot].take_back(effect.most, now)
            self.machine.taken_back(effect.slot, taken)
        elif kind is PeekSlot:
            self._peek(effect.slot, now)
        elif kind is KillRow:
            self._peek(effect.slot, now)
            if self._runs(effect.slot, effect.id):
                self.slots[effect.slot].kill(now)
        elif kind is AgeOfRow:
            self._peek(effect.slot, now)
            age = self.slots[effect.slot].age_s(now)
            if not self._runs(effect.slot, effect.id):
                age = None
            self.machine.row_age(effect.slot, effect.id, age, now)
        elif kind is FetchValue:
            delay = self.agenda.rng.choice([0.001, 0.02, 0.3])
            self._ended.append((now + delay, self.machine, effect))
        elif kind is ForgetFunctions:
            self.slots[effect.slot].forget(effect.fns)
        elif kind is StartSlot:
            # Several in a row would mean that none can be started, which ends a worker.
            self._n_started += 1
            self.slots[effect.slot] = SimSlot(
                self.agenda.rng, now, self._n_started % 4 == 0, self.agenda.begun
            )
        elif kind is StopSlot:
            del self.slots[effect.slot]
        else:
            raise InternalError(f"an unknown effect {effect}")

    def _keep(self, now: float) -> None:
        """One more value is in memory."""
        if self._room:
            self._n_in_memory += 1
            if self._n_in_memory > self._room and self._disk_at == NEVER:
                self._disk_at = now + DISK_S
                self.machine.set_full(True)

    def _spill(self, now: float) -> None:
        self._n_in_memory -= 1
        is_full = self._n_in_memory > self._room
        self._disk_at = now + DISK_S if is_full else NEVER
        self.machine.set_full(is_full)

    def _end_fetches(self, now: float) -> None:
        for fetch in [f for f in self._ended if f[0] <= now]:
            self._ended.remove(fetch)
            _, _, effect = fetch
            found = None
            if self.agenda.rng.random() >= self.fetches_fail:
                for number, _ in effect.sources:
                    holder = self.directory.get(number)
                    if holder is not None and effect.id in holder.store:
                        found = holder.store[effect.id]
                        break
            if found is None:
                self.machine.fetch_failed(effect.id)
            else:
                self.store[effect.id] = found
                self.machine.value_fetched(effect.id, found.nbytes)
