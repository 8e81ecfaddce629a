"""A worker that comes back says what it has; the broker keeps what still counts."""

from __future__ import annotations

import pytest

from tests.unit.broker_house import House, Peer
from zfabric import messages as m
from zfabric.config import Settings
from zfabric.core.journal import Entry
from zfabric.core.outcomes import stored_payload
from zfabric.core.supervisor import Supervisor
from zfabric.core.tasks import ASSIGNED, DONE, FAILED, READY, WAITING
from zfabric.messages import CANCELLED, ERROR, STORED, VALUE
from zfabric.testing.bench import FN, FUNCTION, Bench, results, run, tid

BIG = 1 << 20


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.client(1)
    bench.worker(101, credit=2)
    return bench


def inventory(*rows: tuple[int, int], values: tuple[int, ...] = (), credit: int = 2) -> m.Inventory:
    ids = [tid(n) for n, _ in rows]
    attempts = [attempt for _, attempt in rows]
    return m.Inventory(ids, attempts, [tid(n) for n in values], [BIG] * len(values), credit)


def test_rows_that_nobody_else_has_go_on_under_their_attempt(bench: Bench) -> None:
    bench.submit(1, 2)
    bench.worker_left(101)
    assert bench.states(1, 2) == [READY, READY]
    bench.worker(102, credit=0)
    assert bench.say(102, inventory((1, 1), (2, 1))) == []
    assert bench.states(1, 2) == [ASSIGNED, ASSIGNED]
    assert bench.ended(1, worker=102) == [(1, results(1))]
    assert not bench.task(2).history


def test_rows_that_another_worker_has_are_dropped(bench: Bench) -> None:
    bench.submit(1)
    bench.worker_left(101)
    bench.worker(102, credit=1)
    bench.turn()
    bench.worker(103, credit=0)
    assert bench.say(103, inventory((1, 1))) == [(103, m.Drop([tid(1)]))]
    late = m.Done([tid(1)], [1], bytes([VALUE]), [b"late"], 2)
    assert bench.say(103, late) == []
    assert bench.task(1).attempt == 2


def test_an_attempt_that_was_cancelled_is_not_taken_back_by_a_retry(bench: Bench) -> None:
    bench.submit(1)
    bench.worker_left(101)
    bench.say(1, m.Cancel([tid(1)]))
    bench.say(1, m.Retry([tid(1)]))
    bench.worker(102, credit=0)
    assert bench.say(102, inventory((1, 1)))[0] == (102, m.Drop([tid(1)]))


def test_an_attempt_whose_end_was_heard_is_not_taken_back(bench: Bench) -> None:
    bench.submit(1, options={1: m.TaskOptions(retries=3)})
    bench.scheduler.workers[101].credit = 0
    bench.ended(1, status=ERROR, payload=b"exc", credit=0)
    bench.worker_left(101)
    bench.worker(102, credit=0)
    assert (102, m.Drop([tid(1)])) in bench.say(102, inventory((1, 1), credit=0))


def test_values_are_copies_or_ends(bench: Bench) -> None:
    bench.submit(1, 2)
    bench.stored(1)
    bench.worker_left(101)
    bench.worker(102, credit=0)
    found = stored_payload(BIG, [(102, "ipc://102")])
    said = bench.say(102, inventory(values=(1, 2, 9)))
    assert said == [
        (102, m.Free([tid(9)])),
        (1, m.Results([tid(1), tid(2)], bytes([STORED, STORED]), [found, found])),
    ]
    assert bench.states(1, 2) == [DONE, DONE]


def test_a_value_ends_the_row_that_would_make_it_again(bench: Bench) -> None:
    bench.submit(1)
    bench.stored(1)
    bench.worker_left(101)
    bench.worker(102, credit=1)
    bench.turn()
    bench.worker(103, credit=0)
    said = bench.say(103, inventory(values=(1,)))
    assert (102, m.Drop([tid(1)])) in said
    assert bench.states(1) == [DONE]


def test_a_lost_value_is_not_kept_of_a_task_that_was_let_go(bench: Bench) -> None:
    bench.submit(1)
    bench.worker_left(101)
    bench.release(1)
    bench.worker(102, credit=0)
    assert bench.say(102, inventory((1, 1), values=(1,))) == [
        (102, m.Drop([tid(1)])),
        (102, m.Free([tid(1)])),
    ]
    assert not bench.scheduler.table.lost


def test_a_client_is_told_the_ends_that_it_asks_for(bench: Bench) -> None:
    bench.submit(1, 2)
    client = bench.scheduler.clients[1]
    client.held_back = True
    assert bench.ended(1) == []
    asks = m.Inventory([tid(1), tid(2), tid(7)], [0, 0, 0], [], [], 1)
    ((number, said),) = bench.say(1, asks)
    assert number == 1
    assert isinstance(said, m.Results)
    assert (list(said.ids), said.statuses) == ([tid(1)], bytes([VALUE]))
    assert bench.ended(2) == [(1, results(2))]


def test_a_worker_tells_unheard_ends_again_and_what_it_has() -> None:
    worker = Supervisor(1, now=0.0)
    number = worker.effects(0.0)[0].slot  # type: ignore[union-attr]
    worker.slot_started(number, 0.0)
    worker.run(run(1, 2, 3, 4, functions=[(7, "f", b"f")])._replace(fns=[7] * 4))
    worker.effects(0.0)
    worker.drop([tid(2)])
    worker.slot_done(number, bytes([VALUE, VALUE]), [b"one", b"two"], 0.0, 0.0)
    (done,) = worker.messages(0.0)
    assert isinstance(done, m.Done)
    assert done.statuses == bytes([VALUE, CANCELLED])
    worker.done_posted(done, 1)
    worker.value_put(99, BIG)
    (told,) = worker.rejoin(0.0)
    assert list(told.ids) == [tid(1), tid(3), tid(4)]
    assert (list(told.values), list(told.sizes)) == ([99], [BIG])
    assert told.credit > 0
    (again,) = worker.messages(0.0)
    assert isinstance(again, m.Done)
    assert (list(again.ids), again.payloads) == ([tid(1)], [b"one"])


def test_a_long_inventory_comes_in_parts() -> None:
    worker = Supervisor(1, settings=Settings(batch_rows=3), now=0.0)
    for value in range(7):
        worker.value_put(value, BIG)
    parts = worker.rejoin(0.0)
    assert [list(part.values) for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [part.credit > 0 for part in parts] == [False, False, True]


def device() -> m.TaskOptions:
    return m.TaskOptions(resources={"GPU": 1})


def at_a_broker() -> tuple[House, Peer, Peer]:
    """A client, and a worker with one device and room for two rows, of which one uses it."""
    house = House()
    client = house.peer(1).greet()
    worker = house.peer(2, m.WORKER, slots=2, resources={"GPU": 1.0}).greet()
    submit = m.Submit([FUNCTION], [tid(1)], [FN], [b""], (), [(0, device())])
    client.say(submit)
    return house, client, worker


def comes_back(house: House, old: Peer, token: int, told: m.Inventory) -> Peer:
    house.machine.gone(old.link, house.now)
    house.pass_time(1.0)
    new = house.peer(token, m.WORKER, slots=2, resources={"GPU": 1.0}, previous=old.session.token)
    new.greet().say(told)
    return new


def used(house: House, worker: Peer) -> int:
    return house.machine.scheduler.workers[worker.number].used.get("GPU", 0) // 1_000_000


def runs(peer: Peer) -> list[int]:
    return [id_ for message in peer.heard if isinstance(message, m.Run) for id_ in message.ids]


def test_a_device_is_taken_until_the_dropped_row_of_before_has_ended() -> None:
    house, client, old = at_a_broker()
    assert runs(old) == [tid(1)]
    house.machine.gone(old.link, house.now)
    house.pass_time(1.0)
    client.say(m.Cancel([tid(1)]))
    client.say(m.Submit([], [tid(2)], [FN], [b""], (), [(0, device())]))
    new = comes_back(house, old, 3, inventory((1, 1)))
    assert new.heard[-1] == m.Drop([tid(1)])
    new.say(m.Done([tid(1)], [1], bytes([CANCELLED]), [b""], 2))
    assert runs(new) == [tid(2)] and used(house, new) == 1
    assert not house.machine.scheduler.workers[new.number].ending


def test_so_it_is_for_a_row_that_was_dropped_before_its_worker_was_cut_off() -> None:
    house, client, old = at_a_broker()
    client.say(m.Cancel([tid(1)]))
    house.deliver()
    assert old.heard[-1] == m.Drop([tid(1)])
    client.say(m.Submit([], [tid(2)], [FN], [b""], (), [(0, device())]))
    between = comes_back(house, old, 3, inventory((1, 1), credit=0)._replace(n_dropped=1))
    again = comes_back(house, between, 4, inventory((1, 1))._replace(n_dropped=1))
    assert not runs(again) and used(house, again) == 1
    assert not any(isinstance(message, m.Drop) for message in again.heard)
    again.say(m.Returned([tid(1)], [1], 2))
    assert runs(again) == [tid(2)]


def test_what_a_worker_has_not_told_of_has_ended() -> None:
    house, client, old = at_a_broker()
    client.say(m.Cancel([tid(1)]))
    client.say(m.Submit([], [tid(2)], [FN], [b""], (), [(0, device())]))
    new = comes_back(house, old, 3, inventory())
    assert runs(new) == [tid(2)] and used(house, new) == 1


def test_a_worker_tells_last_of_rows_that_are_still_dying() -> None:
    worker = Supervisor(1, settings=Settings(batch_rows=2), now=0.0)
    number = worker.effects(0.0)[0].slot  # type: ignore[union-attr]
    worker.slot_started(number, 0.0)
    worker.run(run(1, 2, 3, 4, functions=[(7, "f", b"f")])._replace(fns=[7] * 4))
    worker.effects(0.0)
    worker.drop([tid(1)])
    parts = worker.rejoin(0.0)
    assert [list(part.ids) for part in parts] == [[tid(2), tid(3)], [tid(4), tid(1)]]
    assert [part.n_dropped for part in parts] == [0, 1]


def test_what_may_run_once_waits_for_its_worker_and_goes_on_there(bench: Bench) -> None:
    bench.worker(101, credit=2)
    once = m.TaskOptions(idempotent=False)
    bench.submit(1, 2, options={1: once, 2: once})
    bench.worker(102, credit=2)
    assert bench.worker_left(101) == []
    assert bench.states(1, 2) == [WAITING, WAITING]
    bench.worker(103)
    bench.say(103, inventory((1, 1)))
    assert bench.states(1, 2) == [ASSIGNED, WAITING]
    assert bench.task(1).worker.number == 103
    bench.now += bench.scheduler.settings.dead_s
    bench.scheduler.tick(bench.now)
    ((_, end),) = bench.turn()
    assert isinstance(end, m.Results)
    assert (list(end.ids), end.statuses) == ([tid(2)], bytes([m.UNKNOWN]))
    assert not bench.scheduler.table.in_doubt


def test_doubt_ends_when_a_worker_is_back_and_has_told_all(bench: Bench) -> None:
    """Not only when `dead_s` are over: what it has not told of, nobody will."""
    house, client, old = at_a_broker()
    once = m.TaskOptions(idempotent=False)
    client.say(m.Submit([], [tid(2)], [FN], [b""], (), [(0, once)]))
    assert runs(old) == [tid(1), tid(2)]
    new = comes_back(house, old, 3, inventory(credit=0))
    assert house.machine.scheduler.tasks[tid(2)].state == WAITING
    new.say(inventory((1, 1)))
    assert not house.machine.scheduler.table.in_doubt
    (end,) = [message for message in client.heard if isinstance(message, m.Results)]
    assert (list(end.ids), end.statuses) == ([tid(2)], bytes([m.UNKNOWN]))
    assert b"came back without it" in end.payloads[0]
    assert house.machine.scheduler.tasks[tid(1)].state == ASSIGNED


def test_after_a_restart_a_dying_row_keeps_all_that_its_worker_has() -> None:
    """Nobody knows what it occupies: its task is gone."""
    house = House(saved=[])
    house.peer(1).greet()
    worker = house.peer(2, m.WORKER, slots=2, resources={"GPU": 1.0}).greet()
    entries = list(house.machine.snapshot())
    later = House(saved=entries)
    client = later.peer(5).greet()
    wanted = tid(2, client.number)
    client.say(m.Submit([FUNCTION], [wanted], [FN], [b""], (), [(0, device())]))
    new = later.peer(3, m.WORKER, slots=2, resources={"GPU": 1.0}, previous=worker.session.token)
    new.greet().say(inventory((1, 1))._replace(n_dropped=1))
    later.pass_time(5.0, alive=(client, new))
    assert not runs(new) and used(later, new) == 1
    new.say(m.Returned([tid(1)], [1], 2))
    assert runs(new) == [wanted]


def test_a_dying_row_keeps_it_too_when_the_broker_before_left_no_journal() -> None:
    """To this one all rows of its worker are strange, and what they occupy is not free."""
    house = House()
    client = house.peer(5).greet()
    new = house.peer(3, m.WORKER, slots=2, resources={"GPU": 1.0}, previous=77)
    new.greet().say(inventory((1, 1)))
    wanted = tid(2, client.number)
    client.say(m.Submit([FUNCTION], [wanted], [FN], [b""], (), [(0, device())]))
    house.deliver()
    assert new.heard[-1] == m.Drop([tid(1)])
    assert not runs(new) and used(house, new) == 1
    new.say(m.Done([tid(1)], [1], bytes([CANCELLED]), [b""], 2))
    assert runs(new) == [wanted] and used(house, new) == 1


def once_at_a_broker() -> tuple[House, list[Entry], Peer]:
    """A broker with a journal, what that begins with, and a worker that has a row which may run
    once."""
    house = House(saved=[])
    house.pass_time(0.25)  # nobody is waited for
    entries = list(house.machine.snapshot())
    client = house.peer(1).greet()
    worker = house.peer(2, m.WORKER, slots=1).greet()
    once = m.TaskOptions(idempotent=False)
    client.say(m.Submit([FUNCTION], [tid(1)], [FN], [b""], (), [(0, once)]))
    assert runs(worker) == [tid(1)]
    return house, entries, worker


def written(house: House) -> list[Entry]:
    assert house.machine.journal is not None
    return house.machine.journal.take()


def back(house: House, old: Peer, token: int, told: m.Inventory) -> Peer:
    peer = house.peer(token, m.WORKER, slots=1, previous=old.session.token).greet()
    peer.say(told)
    return peer


def test_after_a_restart_doubt_ends_when_all_are_back_and_have_told_all() -> None:
    house, entries, worker = once_at_a_broker()
    later = House(saved=entries + written(house))
    back(later, worker, 3, inventory(credit=0))
    assert later.machine.scheduler.settling
    later.peers[3].say(inventory())
    assert not later.machine.scheduler.settling, "though no time has passed"
    task = later.machine.scheduler.tasks[tid(1)]
    assert (task.state, task.status) == (FAILED, m.UNKNOWN)


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_restart_waits_for_who_was_given_up_and_may_have_a_row(rewritten: bool) -> None:
    house, entries, worker = once_at_a_broker()
    other = house.peer(4, m.WORKER, slots=1).greet()
    house.machine.gone(worker.link, house.now)
    house.pass_time(1.0, alive=(other,))
    assert house.machine.scheduler.table.in_doubt
    entries += written(house)
    later = House(saved=list(house.machine.snapshot()) if rewritten else entries)
    back(later, other, 5, inventory())
    assert later.machine.scheduler.settling
    back(later, worker, 6, inventory((1, 1)))
    assert not later.machine.scheduler.settling
    assert later.machine.scheduler.tasks[tid(1)].state == ASSIGNED


def test_it_waits_no_longer_than_this_broker_would_have() -> None:
    house, entries, worker = once_at_a_broker()
    other = house.peer(4, m.WORKER, slots=1).greet()
    house.machine.gone(worker.link, house.now)
    house.pass_time(1.0 + house.machine.settings.dead_s, alive=(other,))
    later = House(saved=entries + written(house))
    back(later, other, 5, inventory())
    assert not later.machine.scheduler.settling


def test_who_is_cut_off_again_while_it_settles_is_waited_for_as_ever() -> None:
    house, entries, worker = once_at_a_broker()
    away = house.peer(4, m.WORKER, slots=1).greet()
    later = House(saved=entries + written(house))
    again = back(later, worker, 5, inventory((1, 1)))
    later.machine.gone(again.link, later.now)
    later.pass_time(1.0)
    back(later, away, 6, inventory())
    assert not later.machine.scheduler.settling
    last = back(later, again, 7, inventory((1, 1)))
    task = later.machine.scheduler.tasks[tid(1)]
    assert task.worker is later.machine.scheduler.workers[last.number]
