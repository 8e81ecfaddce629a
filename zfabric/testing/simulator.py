"""A whole fabric in virtual time, driven by one seed.

One broker, some workers and clients, all with their real machines, over links that lose, delay
and repeat; processes are killed, stopped and started again; users submit all kinds of graphs,
release, cancel, retry, scatter, take locks, and go on with the runs of users who are gone. After
each step the scheduler's table is counted again (`core.invariants`), and locks are compared with
what clients were told of them. When the faults stop, everything must end, with the right value or
for a reason that the user knows of; when the users let go of everything, nothing may be left.

    python -m zfabric.testing.simulator 17          # one seed, with what happened
    python -m zfabric.testing.simulator 0 2000 -j 2 # many, with two processes

The same seed gives the same run. A seed that fails is printed; see tests/sim.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from zfabric.config import Settings
from zfabric.core import invariants, placer
from zfabric.core.broker import BrokerMachine
from zfabric.core.journal import Entry
from zfabric.core.session_record import SessionRecord
from zfabric.core.submitter import PENDING
from zfabric.errors import InternalError, ZFabricError
from zfabric.ids import MAX_SESSION
from zfabric.messages import STORED
from zfabric.testing import sim_locks
from zfabric.testing.links import Weather
from zfabric.testing.sim_client import SimClient
from zfabric.testing.sim_net import NEVER, Agenda, Listener, Node
from zfabric.testing.sim_worker import SimWorker

HABITS = (
    "map chain tree fan_in fan_out mixed raises flaky dies blocks options long endless "
    "limited once release cancel retry scatter fetch"
).split()

FAULTS = (
    "cut slow_cut long_cut flap kill_worker stop_worker kill_client stop_client stop_broker restart"
).split()

BEAT_NBYTES = 6
"""Bodies up to here are beats and the like, which change no task."""

IN_TURN = ("before", "after")
"""Where in a turn a broker may be killed: around writing to its journal."""

OFTEN = 50
"""Tasks up to which the table is checked in each turn."""

LIVENESS_S = 200.0
"""Virtual seconds after the last fault within which all must end; ten of them is what it takes
to notice a silent death with the settings below."""


class Report(NamedTuple):
    """What a run did."""

    seed: int
    n_steps: int
    n_checked: int
    virtual_s: float
    n_faults: int


class SimBroker(Node):
    """The broker's process."""

    def __init__(
        self, agenda: Agenda, settings: Settings, epoch: int, disk: list[Entry] | None = None
    ) -> None:
        """disk: the journal's entries; None: there is none."""
        super().__init__(agenda)
        self.disk = disk
        self.full_until = 0.0
        """Until when its disk takes nothing."""
        self.dies_in_turn = ""
        """Where in its next turn it is killed: "before" it writes, or "after" that."""
        self.clients: list[SimClient] = []
        """Whose locks are compared with the broker's."""
        self.machine = BrokerMachine(
            epoch=epoch,
            version="1",
            settings=settings,
            now=agenda.now,
            first_number=agenda.rng.randint(1, MAX_SESSION // 2),
            saved=None if disk is None else list(disk),
            generation=epoch,
        )
        self.listener = Listener(self)
        self._tick_at = agenda.now
        self.wake(agenda.now)

    def die(self) -> None:
        """kill -9: all connections break."""
        self.alive = False

    def turn(self, now: float) -> float:
        machine = self.machine
        connections = list(self.listener.connections.values())
        self.agenda.rng.shuffle(connections)
        wake = NEVER
        changed = False
        left = self.agenda.rng.choice([1, 8, 64])
        for connection in connections:
            while left and (frames := connection.up.recv(now)) is not None:
                left -= 1
                machine.receive(connection.id, frames, now)
                if len(frames[1]) > BEAT_NBYTES:
                    changed = True
            due = connection.up.due()
            if due is not None:
                wake = min(wake, due)
            elif connection.broken:
                if connection.told_at <= now:
                    del self.listener.connections[connection.id]
                    machine.gone(connection.id, now)
                    changed = True
                else:
                    wake = min(wake, connection.told_at)
        if now >= self._tick_at or now >= machine.scheduler.due_at:
            self._tick_at = machine.tick(now)
            changed = True
        # Checking is what takes longest here: always after placing while the table is small, else
        # now and then, and sometimes between the events and placing.
        doubt = self.agenda.rng.random() * (len(machine.scheduler.tasks) + 1) / OFTEN
        if changed and doubt < 0.1:
            invariants.check(machine.scheduler)
        machine.turn()
        if self.dies_in_turn == "before":
            self.die()
            return NEVER
        if self.disk is not None:
            self._write(self.disk, now)
        if self.dies_in_turn:
            self.die()
            return NEVER
        if self.clients:
            sim_locks.check(machine, self.clients)
        if changed and doubt < 1.0:
            invariants.check(machine.scheduler)
        for peer, frames in machine.replies:
            self._deliver(peer, frames, now)
        machine.replies.clear()
        machine.log.clear()
        for record in list(machine.dirty):
            if self._pump(record, now):
                del machine.dirty[record]
            else:
                wake = min(wake, now + 0.001)
        bad = [key for key in machine.counts if key.startswith("bad:")]
        if bad:
            raise InternalError(f"a peer broke the protocol: {bad}")
        if now < self.full_until:
            wake = min(wake, self.full_until)
        return min(wake, self._tick_at, machine.scheduler.due_at)

    def _write(self, disk: list[Entry], now: float) -> None:
        machine = self.machine
        assert machine.journal is not None
        entries = machine.journal.take()
        if machine.journal.trouble or (entries and now < self.full_until):
            if now < self.full_until:
                machine.cannot_write("the disk is full")
            else:
                disk[:] = machine.snapshot()
                machine.can_write()
        elif entries and self.agenda.rng.random() < 0.02:
            disk[:] = self.machine.snapshot()
        else:
            disk.extend(entries)

    def _deliver(self, peer: bytes, frames: Any, now: float) -> bool:
        connection = self.listener.connections.get(peer)
        if connection is None:
            return True
        taken = connection.down.send(frames, now)
        owner = connection.owner
        due = connection.down.due()
        if owner is not None and due is not None:
            owner.wake(due)
        return taken

    def _pump(self, record: SessionRecord, now: float) -> bool:
        if record.peer is None:
            return True
        session = record.session
        while (frames := session.next_frames()) is not None:
            if not self._deliver(record.peer, frames, now):
                return False
            session.sent()
        return True


class Simulation:
    """One run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.agenda = Agenda(rng)
        self.settings = Settings.load(
            {},
            window=rng.choice([2, 8, 256]),
            window_bytes=(64, 2000, 1 << 24)[seed % 3],
            session_bytes=20_000 if seed % 7 == 3 else 1 << 40,
            batch_rows=rng.choice([3, 4096]),
            max_rows=rng.choice([2, 4096]),
            suspect_s=3.0,
            dead_s=8.0,
        )
        self.weather = Weather(
            delay_s=rng.choice([0.0002, 0.02]),
            p_slow=rng.choice([0.0, 0.02]),
            p_twice=rng.choice([0.0, 0.05]),
            capacity=rng.choice([2, 1000]),
        )
        self.directory: dict[int, SimWorker] = {}
        self.epoch = 1
        self.disk: list[Entry] | None = [] if rng.random() < 0.5 else None
        self.broker = SimBroker(self.agenda, self.settings, self.epoch, self.disk)
        self.n_named = 0
        # Seeds of the corpus have none of these, and so go on as they did.
        self.uses_locks = seed % 11 in (3, 9)
        self.uses_runs = seed % 11 in (3, 6, 9)
        self.fights_for_runs = seed % 11 == 3
        self.room = {0: 1, 7: 1, 9: 1, 11: 3, 13: 3, 15: 3}.get(seed % 17, 0)
        self.workers = [self._new_worker() for _ in range(rng.randint(1, 4))]
        self.clients = [self._new_client() for _ in range(rng.randint(1, 3))]
        # Swarm testing: each run knows some of the faults only, so that each gets its room.
        self.faults = [fault for fault in FAULTS if rng.random() < 0.4]
        if self.disk is not None and seed % 11 == 2:
            self.faults.append("full_disk")
        self.n_faults = 0
        self.log: list[str] = []

    def _listener(self) -> Listener | None:
        return self.broker.listener if self.broker.alive else None

    def _new_worker(self) -> SimWorker:
        rng = self.rng
        self.n_named += 1
        return SimWorker(
            self.agenda,
            f"w{self.n_named}",
            rng.choice([1, 1, 2, 3]),
            self._listener,
            self.settings,
            self.weather,
            self.directory,
            {"GPU": 1} if rng.random() < 0.5 else None,
            self.room,
        )

    def _new_client(self, before: SimClient | None = None) -> SimClient:
        """before: a client that is gone; if it held a run, this one goes on with that."""
        rng = self.rng
        self.n_named += 1
        run = f"run {self.n_named}" if self.uses_runs and rng.random() < 0.7 else ""
        if before is not None and before.run:
            run = before.run
        return SimClient(
            self.agenda,
            f"c{self.n_named}",
            self._listener,
            self.settings,
            self.weather,
            self.directory,
            rng.sample(HABITS, rng.randint(3, 8)) + ["map"],
            depth=0 if run else rng.choice([0, 0, 1]),
            run=run,
            before=before,
        )

    # --- the run ------------------------------------------------------------------------------

    def run(self) -> Report:
        """Raises InternalError, or whatever a machine raises, with the seed in its notes."""
        try:
            with small_limits(self.rng):
                return self._run()
        except Exception as exc:
            exc.add_note(f"seed {self.seed}, at {self.agenda.now:.6f} s; faults: {self.log[-8:]}")
            raise

    def _run(self) -> Report:
        rng, agenda = self.rng, self.agenda
        for _ in range(rng.randint(3, 12)):
            agenda.at(rng.uniform(0.1, 4.0), self._user_acts)
        if self.uses_locks:
            self.broker.clients = self.clients
            for _ in range(rng.randint(3, 20)):
                agenda.at(rng.uniform(0.1, 4.2), self._user_locks)
        if self.fights_for_runs:
            for _ in range(rng.randint(1, 5)):
                agenda.at(rng.uniform(0.1, 4.2), self._run_changes_hands)
        end = 0.5
        if self.faults:
            for _ in range(rng.randint(1, 6)):
                end = max(end, at := rng.uniform(0.1, 5.0))
                agenda.at(at, self._fault)
        for peer in self._peers():
            peer.fetches_fail = rng.choice([0.0, 0.0, 0.3])
        agenda.run(max(end, 4.2))
        self._weather_clears()
        for client in self._live():
            client.locks.end()
        self._must(self._all_ended, "pending tasks did not end")
        self._must(self._all_fetched, "stored values could not be fetched")
        self._check_clients()
        for client in self.clients:
            for call in list(client.calls):
                client.drop(call)
            client.wake(agenda.now)
        self._must(self._nothing_left, "something was left over")
        invariants.check_empty(self.broker.machine.scheduler)
        n_checked = sum(client.n_checked for client in self.clients)
        return Report(self.seed, agenda.n_steps, n_checked, agenda.now, self.n_faults)

    def _weather_clears(self) -> None:
        self.log.append(f"{self.agenda.now:.3f} the faults stop")
        self.faults = []
        if not self.broker.alive:
            self._restart_broker()
        if not any(worker.alive for worker in self.workers):
            self.workers.append(self._new_worker())
        for peer in self._peers():
            peer.fetches_fail = 0.0

    def _must(self, done: Any, text: str) -> None:
        if not self.agenda.run(self.agenda.now + LIVENESS_S, done):
            raise InternalError(f"{text} within {LIVENESS_S} s", self._story())

    def _peers(self) -> list[SimWorker | SimClient]:
        return [*self.workers, *self.clients]

    def _live(self) -> list[SimClient]:
        return [client for client in self.clients if client.alive]

    def _check_clients(self) -> int:
        return sum(client.check() for client in self._live())

    def _all_ended(self) -> bool:
        return not any(
            call.outcome.status == PENDING for client in self._live() for call in client.calls
        ) and all(
            client.welcomed and not client.submitter.has_work() and client.is_answered
            for client in self._live()
        )

    def _all_fetched(self) -> bool:
        if not self._all_ended():
            return False
        missing = 0
        for client in self._live():
            stored = [c for c in client.calls if c.outcome.status == STORED and not c.checked]
            missing += client.fetch(stored)
        return not missing

    def _nothing_left(self) -> bool:
        machine = self.broker.machine
        if any(w.ending or w.unclear for w in machine.scheduler.workers.values()):
            return False
        if machine.locks.requests():
            return False
        if machine.scheduler.tasks or any(c.submitter.has_work() for c in self._live()):
            return False
        for worker in self.workers:
            if worker.alive and not self._is_clean(worker):
                return False
        return True

    def _is_clean(self, worker: SimWorker) -> bool:
        """No rows, and no values but those that clients put and never told the broker of."""
        put = set().union(*(client.put_at for client in self.clients))
        return not worker.machine.n_rows and worker.machine.is_idle() and put >= worker.store.keys()

    def _story(self) -> list[str]:
        lines = list(self.log)
        for client in self._live():
            states = [(f"{c.outcome.id:x}", c.outcome.status) for c in client.calls]
            pending = [name for name, status in states if status == PENDING]
            lines.append(
                f"client {client.name} number {client.submitter.number} welcomed {client.welcomed} "
                f"pending {pending[:10]} of {len(states)}, work {client.submitter.has_work()}, "
                f"unacked {client.session.n_unacked}"
            )
        tasks = self.broker.machine.scheduler.tasks.values()
        lines.extend(task.story() for task in list(tasks)[:30])
        for record in self.broker.machine.sessions.values():
            lines.append(f"session {record.name}: unacked {record.session.n_unacked}")
        for worker in self.workers:
            if worker.alive:
                machine = worker.machine
                lines.append(
                    f"worker {worker.name} number {worker.number} welcomed {worker.welcomed}: rows "
                    f"{[f'{id_:x}' for id_ in machine.table.rows][:10]}, store "
                    f"{[f'{id_:x}' for id_ in worker.store][:10]}, slots "
                    f"{[(n, len(s.sent), s.takes_rows) for n, s in machine.crew.slots.items()]}"
                )
        return lines

    # --- what happens -------------------------------------------------------------------------

    def _user_acts(self) -> None:
        live = self._live()
        if live:
            client = self.rng.choice(live)
            client.act()
            if self.rng.random() < 0.7:
                again = self.agenda.now + self.rng.choice([0.0005, 0.05, 0.3])
                if again < 4.2:
                    self.agenda.at(again, self._user_acts)
            client.check()

    def _fault(self) -> None:
        if not self.faults:
            return
        rng = self.rng
        fault = rng.choice(self.faults)
        self.n_faults += 1
        self.log.append(f"{self.agenda.now:.3f} {fault}")
        peers = [peer for peer in self._peers() if peer.alive]
        workers = [p for p in self.workers if p.alive]
        clients = self._live()
        if fault == "cut" and peers:
            rng.choice(peers).dial.cut()
        elif fault == "slow_cut" and peers:
            rng.choice(peers).dial.cut(told_after_s=rng.choice([0.3, 3.0, 12.0]))
        elif fault == "long_cut" and peers:
            self._cut_for(rng.choice(peers), rng.choice([0.7, 3.0, 12.0]))
        elif fault == "flap" and peers:
            peer = rng.choice(peers)
            for n in range(rng.randint(2, 6)):
                self.agenda.at(self.agenda.now + n, lambda: self._cut_for(peer, 0.7))
        elif fault == "kill_worker" and workers:
            rng.choice(workers).die()
            if rng.random() < 0.8:
                self._later(lambda: self.workers.append(self._new_worker()))
        elif fault == "stop_worker" and workers:
            self._stop(rng.choice(workers))
        elif fault == "kill_client" and clients:
            client = rng.choice(clients)
            rng.choice([client.die, client.say_goodbye])()
            self._later(lambda: self.clients.append(self._new_client(client)))
        elif fault == "stop_client" and clients:
            self._stop(rng.choice(clients))
        elif fault == "stop_broker":
            self._stop(self.broker)
        elif fault == "full_disk":
            self.broker.full_until = self.agenda.now + rng.choice([0.1, 2.0, 5.0, 15.0])
        elif fault == "restart" and self.broker.alive:
            if (self.uses_locks or self.uses_runs) and (where := rng.choice(["", *IN_TURN])):
                self.broker.dies_in_turn = where
                self.broker.wake(self.agenda.now)
                self.agenda.at(self.agenda.now, self._broker_died)
                return
            self.broker.die()
            self._broker_died()

    def _broker_died(self) -> None:
        self.broker.alive = False
        for peer in self._peers():
            if peer.alive:
                peer.dial.cut()
        self._later(self._restart_broker)

    def _user_locks(self) -> None:
        live = [client for client in self._live() if client.welcomed]
        if live:
            self.rng.choice(live).locks.act()

    def _run_changes_hands(self) -> None:
        """Somebody wants a run whose holder sleeps, or perhaps only slept; or wants one to end."""
        rng = self.rng
        live = [client for client in self._live() if client.welcomed]
        holders = [client for client in self.clients if client.run]
        if not live or not holders:
            return
        holder = rng.choice(holders)
        if rng.random() < 0.3:
            asker = rng.choice(live)
            if holder in live and asker is not holder:
                holder.say_goodbye()
                self.agenda.at(self.agenda.now + 0.5, lambda: self._ask_for_the_end(asker, holder))
                self._later(lambda: self.clients.append(self._new_client(holder)))
            else:
                asker.end_run(holder.run)
            return
        if holder in live:
            self._stop(holder)
        self._later(lambda: self.clients.append(self._new_client(holder)))

    def _ask_for_the_end(self, asker: SimClient, holder: SimClient) -> None:
        """Of a run that another one has left."""
        if asker.alive and asker.welcomed:
            asker.end_run(holder.run)

    def _cut_for(self, peer: SimWorker | SimClient, seconds: float) -> None:
        """No connection for so long; the broker may hear of it only much later."""
        peer.dial.unreachable_until = self.agenda.now + seconds
        peer.dial.cut(told_after_s=self.rng.choice([0.0, 0.0, 0.3, 12.0]))

    def _later(self, act: Any) -> None:
        self.agenda.at(self.agenda.now + self.rng.choice([0.0, 0.1, 1.0]), act)

    def _stop(self, node: Node) -> None:
        node.stopped_until = self.agenda.now + self.rng.choice([0.1, 2.0, 5.0, 15.0])

    def _restart_broker(self) -> None:
        if not self.broker.alive:
            self.agenda.on_device = None  # what dropped rows occupy is in no journal
            self.epoch += 1
            self.broker = SimBroker(self.agenda, self.settings, self.epoch, self.disk)
            if self.uses_locks:
                self.broker.clients = self.clients


@contextlib.contextmanager
def small_limits(rng: random.Random) -> Iterator[None]:
    """Limits that a small run reaches, for as long as it lasts."""
    wanted = {
        "GIVE_LIMIT": rng.choice([40, 64 * 1024]),
        "MAX_KNOWN": rng.choice([3, 2048]),
    }
    before = {name: getattr(placer, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(placer, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(placer, name, value)


def simulate(seed: int) -> Report:
    """Run one seed. Raises what went wrong, with the seed in a note."""
    return Simulation(seed).run()


def failures(seeds: range | list[int]) -> list[tuple[int, str]]:
    """(seed, error) of those that fail."""
    return survey(seeds)[0]


def survey(seeds: range | list[int]) -> tuple[list[tuple[int, str]], Counter[str]]:
    """The failures, and sums over those that do not fail, by the fields of Report."""
    found = []
    sums: Counter[str] = Counter()
    gc.disable()  # a run is over before it would pay
    try:
        for seed in seeds:
            try:
                sums.update(simulate(seed)._asdict())
            except Exception as exc:
                what = type(exc).__name__ if not isinstance(exc, ZFabricError) else ""
                found.append((seed, f"{what} {exc}\n{' '.join(getattr(exc, '__notes__', ()))}"))
            if seed % 20 == 0:
                gc.collect()
    finally:
        gc.enable()
    return found, sums


def main(arguments: list[str]) -> int:
    """See the head of this file."""
    jobs = 1
    if "-j" in arguments:
        place = arguments.index("-j")
        jobs = int(arguments[place + 1])
        del arguments[place : place + 2]
    first = int(arguments[0])
    if len(arguments) == 1:
        print(simulate(first))
        return 0
    seeds = list(range(first, int(arguments[1])))
    if jobs == 1:
        found, sums = survey(seeds)
    else:
        from concurrent.futures import ProcessPoolExecutor

        with ProcessPoolExecutor(jobs) as pool:
            parts = [seeds[n::jobs] for n in range(jobs)]
            surveys = list(pool.map(survey, parts))
        found = [failure for part, _ in surveys for failure in part]
        sums = sum((some for _, some in surveys), Counter())
    for seed, text in sorted(found):
        print(f"seed {seed}: {text.strip()[:600]}\n")
    print(
        f"{sums['n_steps']} turns of processes in {sums['virtual_s']:.0f} virtual seconds, "
        f"{sums['n_faults']} faults, {sums['n_checked']} results compared"
    )
    print(f"{len(seeds)} seeds, {len(found)} failures: {sorted(seed for seed, _ in found)}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
