"""The broker without sockets: handshakes, routes, silence, strangers, and good-byes."""

from __future__ import annotations

import pytest
from msgpack import packb, unpackb

from tests.unit.broker_house import EPOCH, SETTINGS, House, Peer
from zfabric import messages as m
from zfabric import wire
from zfabric.config import Settings
from zfabric.core import greeting, switchboard
from zfabric.core.broker import BrokerMachine
from zfabric.core.journal import Entry
from zfabric.ids import task_id
from zfabric.testing.bench import FN, FUNCTION


@pytest.fixture
def house() -> House:
    return House()


def submit(peer: Peer, counter: int = 1, options: m.TaskOptions | None = None) -> m.Submit:
    rows = [(0, options)] if options is not None else []
    return m.Submit([FUNCTION], [task_id(peer.number, counter)], [FN], [b"args"], (), rows)


# --- Handshake ----------------------------------------------------------------------------------


def test_a_hello_is_welcomed_with_a_number_and_the_epoch(house: House) -> None:
    client = house.peer(1).greet()
    worker = house.peer(2, m.WORKER, name="w", slots=4).greet()
    assert (client.number, worker.number) == (1, 2)
    assert worker.welcome == m.Welcome(2, "w", "1", SETTINGS.inline_limit, 1.0, 30.0)
    assert client.session.epoch == EPOCH
    assert list(house.machine.scheduler.clients) == [1]
    assert house.machine.scheduler.workers[2].slots == 4


def test_a_connection_carries_one_session(house: House) -> None:
    first = house.peer(1).greet()
    second = house.peer(2)
    second.link = first.link
    second.greet()
    assert second.welcome
    assert list(house.machine.sessions) == [2]
    assert house.machine.routes[second.link].session.token == 2


def test_a_repeated_hello_is_the_same_session(house: House) -> None:
    client = house.peer(1).greet()
    client.greet()
    assert client.number == 1
    assert len(house.machine.sessions) == 1
    assert [type(message) for message in client.heard] == [m.Welcome, m.Welcome]


@pytest.mark.parametrize("role", [m.CLIENT, m.WORKER])
def test_a_hello_that_comes_after_the_end_of_its_session(house: House, role: str) -> None:
    """It was said twice. A second session would go by the number of the first at its peer."""
    peer = house.peer(1, role).greet()
    house.machine.gone(peer.link, house.now)
    house.pass_time(SETTINGS.lease_s + 1)
    peer.redial()
    (refusal,) = peer.say(peer.hello)
    assert isinstance(refusal, m.Refuse) and refusal.code == "unknown"
    assert not house.machine.sessions
    assert house.peer(2, role).greet().number == 2


def test_so_many_tokens_are_remembered(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switchboard, "TOKENS_KEPT", 2)
    for token in (1, 2, 3):
        house.peer(token).greet().say(m.Bye(""))
    board = house.machine.board
    assert [board.is_over(token) for token in (1, 2, 3)] == [False, True, True]


def test_names_are_made_unique_and_come_free_again(house: House) -> None:
    peers = [house.peer(n, m.WORKER, name="w").greet() for n in (1, 2, 3)]
    assert [peer.welcome.name for peer in peers if peer.welcome] == ["w", "w-2", "w-3"]
    peers[1].say(m.Bye())
    again = house.peer(4, m.WORKER, name="w").greet()
    assert again.welcome is not None and again.welcome.name == "w-2"
    nameless = house.peer(5).greet()
    assert nameless.welcome is not None and nameless.welcome.name == "host-5"


@pytest.mark.parametrize("what", ["protocol", "python"])
def test_what_does_not_fit_is_refused_with_both_sides_in_columns(house: House, what: str) -> None:
    client = house.peer(1, python="3.11.9" if what == "python" else "3.12.0", zfabric="0.9")
    frames = wire.encode(client.hello, 1)
    if what == "protocol":
        parts = unpackb(frames[0])
        parts[1] = 99
        frames[0] = packb(parts)
    house.machine.receive(client.link, frames, house.now)
    (refusal,) = house.deliver(client)
    assert isinstance(refusal, m.Refuse) and refusal.code == "version"
    lines = refusal.text.splitlines()
    assert any("broker" in line and "client" in line for line in lines)
    assert any("3.12.4" in line for line in lines) and any("0.9" in line for line in lines)
    assert not house.machine.sessions


def test_other_patch_levels_of_python_fit(house: House) -> None:
    assert house.peer(1, python="3.12.0rc1").greet().welcome is not None


def test_a_worker_without_slots_or_a_session_without_token(house: House) -> None:
    for peer in (house.peer(7, m.WORKER, slots=0), house.peer(0)):
        (refusal,) = peer.say(peer.hello)
        assert isinstance(refusal, m.Refuse) and refusal.code == "hello"


def test_a_broker_that_ran_out_of_numbers(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "MAX_SESSION", 1)
    house.peer(1).greet()
    late = house.peer(2)
    (refusal,) = late.say(late.hello)
    assert isinstance(refusal, m.Refuse) and refusal.code == "full"


# --- Strangers ----------------------------------------------------------------------------------


def test_a_session_that_the_broker_does_not_know_is_told_so_once_per_beat(house: House) -> None:
    ghost = house.peer(9)
    for _ in range(5):
        ghost.say(m.Beat(0))
    assert [message.code for message in ghost.heard if isinstance(message, m.Refuse)] == ["unknown"]
    house.now += SETTINGS.beat_s
    assert len(ghost.say(m.Beat(0))) == 1


def test_a_session_of_an_earlier_broker(house: House) -> None:
    client = house.peer(1).greet()
    client.session.epoch = EPOCH - 1
    (refusal,) = client.say(m.Release([1]))
    assert isinstance(refusal, m.Refuse) and refusal.code == "epoch"


def test_two_brokers_do_not_refuse_each_other_for_ever(house: House) -> None:
    frames = wire.encode(m.Refuse("unknown", ""), 5, 6)
    house.machine.receive(b"other", frames, house.now)
    house.deliver()
    assert not house.strangers


def test_garbage_is_counted_and_answered_with_nothing(house: House) -> None:
    client = house.peer(1).greet()
    for frames in ([b"GET / HTTP/1.1"], [b"", b""], [b"\xc1"] * 3, [bytes(100), b""]):
        house.machine.receive(b"somebody", frames, house.now)
    house.deliver()
    assert not house.strangers
    assert sum(n for key, n in house.machine.counts.items() if key.startswith("bad:")) == 4
    assert house.machine.info(house.now)["errors"]["bad:frame-count"] == 1
    assert client.say(m.Ask(1, "info")) != []


def test_who_breaks_the_protocol_is_put_out_and_nobody_else_is(house: House) -> None:
    good, bad = house.peer(1).greet(), house.peer(2).greet()
    worker = house.peer(3, m.WORKER).greet()
    bad.say(submit(bad))
    (refusal,) = bad.say(m.Submit([], [task_id(bad.number, 2)], [999], [b""]))
    assert isinstance(refusal, m.Refuse) and refusal.code == "protocol"
    assert house.machine.counts["bad:submit"] == 1
    assert list(house.machine.scheduler.clients) == [good.number]
    assert not house.machine.scheduler.tasks
    assert good.say(submit(good)) == []
    assert [type(message) for message in worker.heard[1:]][-1] is m.Run


def test_replies_to_strangers_are_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switchboard, "MAX_REPLIES", 10)
    monkeypatch.setattr(switchboard, "REFUSALS_KEPT", 5)
    for n in range(100):
        frames = wire.encode(m.Beat(0), n + 1, EPOCH)
        house.machine.receive(b"%d" % n, frames, house.now)
    assert len(house.machine.replies) == 10
    assert len(house.machine.board._refused) == 5


# --- Routes -------------------------------------------------------------------------------------


def test_after_a_redial_everything_unacked_goes_out_by_the_new_connection(house: House) -> None:
    client = house.peer(1).greet()
    worker = house.peer(2, m.WORKER).greet()
    old, client.link = client.link, b"lost"  # what is sent from now on does not arrive
    client.session.post(submit(client))
    frames = client.session.next_frames()
    assert frames is not None
    client.session.sent()
    house.machine.receive(old, frames, house.now)
    house.deliver()
    (run,) = worker.heard[1:]
    assert isinstance(run, m.Run)
    worker.say(m.Done(run.ids, run.attempts, b"\0", [b"value"], 2))
    assert len(client.heard) == 1
    client.link = old
    client.redial()
    house.machine.gone(old, house.now)
    assert [type(message) for message in client.say()] == [m.Results]
    assert house.machine.counts["reconnects"] == 1


@pytest.mark.parametrize("gone_first", [False, True])
def test_late_messages_of_a_left_connection_do_not_take_the_session_back(
    house: House, gone_first: bool
) -> None:
    """A listener may read the first messages of a new connection before the last of the old."""
    worker = house.peer(1, m.WORKER).greet()
    left = worker.session
    left.post(m.Holds([]))
    late = left.next_frames()
    assert late is not None
    left.sent()
    old = worker.redial()
    worker.say()
    record = house.machine.sessions[1]
    if not gone_first:
        house.machine.receive(old, late, house.now)
        assert record.peer == worker.link
    house.machine.gone(old, house.now)
    house.pass_time(SETTINGS.grace_s * 3)
    assert 1 in house.machine.sessions
    assert record.peer == worker.link
    assert list(house.machine.routes) == [worker.link]


def test_a_connection_that_lived_shortly_between_two_others(house: House) -> None:
    """Its only message is read last, so it looks like the newest; then it is gone."""
    worker = house.peer(1, m.WORKER).greet()
    first = worker.redial()
    between = worker.session.next_frames()
    assert between is not None
    second = worker.redial()
    worker.say()
    house.machine.receive(second, between, house.now)
    house.machine.gone(first, house.now)
    house.machine.gone(second, house.now)
    house.pass_time(SETTINGS.grace_s * 3)
    assert house.machine.sessions[1].peer == worker.link


def test_a_broken_connection_ends_the_session_after_the_grace(house: House) -> None:
    client, worker = house.peer(1).greet(), house.peer(2, m.WORKER).greet()
    client.say(submit(client))
    house.machine.gone(worker.link, house.now)
    house.pass_time(SETTINGS.grace_s / 2, 0.05, alive=(client,))
    assert house.machine.scheduler.workers[worker.number].suspect
    house.pass_time(SETTINGS.grace_s, 0.05, alive=(client,))
    assert not house.machine.scheduler.workers
    assert house.machine.scheduler.info()["tasks"]["ready"] == 1
    assert house.machine.by_number.keys() == {client.number}
    assert set(house.machine.routes) == {client.link}
    house.machine.gone(b"never seen", house.now)


def test_a_connection_that_carries_a_second_session_stays_with_it(house: House) -> None:
    first = house.peer(1).greet()
    second = house.peer(2)
    second.link = first.link
    second.greet()
    first.say(m.Bye())
    assert house.machine.routes[second.link] is house.machine.sessions[2]
    house.machine.gone(second.link, house.now)
    house.pass_time(SETTINGS.lease_s + 1.0, step=1.0)
    assert not house.machine.sessions


# --- Silence ------------------------------------------------------------------------------------


def test_silence_makes_a_worker_suspect_and_then_dead(house: House) -> None:
    client, worker = house.peer(1).greet(), house.peer(2, m.WORKER).greet()
    house.pass_time(SETTINGS.suspect_s - 1, alive=(client,))
    assert not house.machine.scheduler.workers[worker.number].suspect
    house.pass_time(2, alive=(client,))
    assert house.machine.scheduler.workers[worker.number].suspect
    worker.session.tick(house.now)
    worker.say()
    assert not house.machine.scheduler.workers[worker.number].suspect
    house.pass_time(SETTINGS.dead_s + 1, alive=(client,))
    assert list(house.machine.by_number) == [client.number]


def test_silence_while_the_broker_slept_proves_nothing(house: House) -> None:
    client, worker = house.peer(1).greet(), house.peer(2, m.WORKER).greet()
    house.pass_time(2, alive=(client, worker))
    house.now += 1000.0
    house.machine.tick(house.now)
    assert len(house.machine.sessions) == 2
    house.pass_time(2, alive=(client, worker))
    assert not house.machine.scheduler.workers[worker.number].suspect


def test_a_stop_does_not_use_up_the_grace(house: House) -> None:
    worker = house.peer(1, m.WORKER).greet()
    house.machine.tick(house.now)
    house.machine.gone(worker.link, house.now)
    house.now += 100.0
    house.machine.tick(house.now)
    assert house.machine.sessions
    house.pass_time(SETTINGS.suspect_s + 0.3)
    assert not house.machine.sessions


def test_connections_that_break_when_the_broker_wakes_have_time_to_come_back(house: House) -> None:
    client, worker = house.peer(1).greet(), house.peer(2, m.WORKER).greet()
    house.machine.tick(house.now)
    house.now += 100.0
    house.machine.tick(house.now)
    house.pass_time(0.1, 0.05, alive=(client,))
    house.machine.gone(worker.link, house.now)  # a heartbeat of ZeroMQ's went without an answer
    house.pass_time(SETTINGS.grace_s + 1.0, alive=(client,))
    assert house.machine.scheduler.workers[worker.number].suspect
    worker.link = b"another"
    worker.session.reconnected()
    worker.say()
    house.pass_time(2.0, alive=(client, worker))
    assert not house.machine.scheduler.workers[worker.number].suspect
    house.pass_time(SETTINGS.suspect_s, alive=(client, worker))
    house.machine.gone(worker.link, house.now)
    house.pass_time(SETTINGS.grace_s + 0.3, alive=(client,))
    assert not house.machine.scheduler.workers, "that was a while ago"


def test_tasks_for_a_worker_that_was_cut_off_wait_for_it(house: House) -> None:
    client, worker = house.peer(1).greet(), house.peer(2, m.WORKER, name="w").greet()
    other = house.peer(3, m.WORKER).greet()
    alive = (client, other)
    client.say(submit(client, options=m.TaskOptions(workers=("w",))))
    house.machine.gone(worker.link, house.now)
    house.pass_time(SETTINGS.dead_s - 1.0, alive=alive)
    assert worker.number not in house.machine.scheduler.workers
    assert house.machine.scheduler.info()["tasks"]["ready"] == 1
    house.pass_time(3.0, alive=alive)
    assert house.machine.scheduler.info()["tasks"]["failed"] == 1


def test_tasks_for_a_worker_that_said_good_bye_do_not_wait(house: House) -> None:
    client, worker = house.peer(1).greet(), house.peer(2, m.WORKER, name="w").greet()
    other = house.peer(3, m.WORKER).greet()
    client.say(submit(client, options=m.TaskOptions(workers=("w",))))
    worker.say(m.Bye("stopped"))
    house.pass_time(3.0, alive=(client, other))
    assert house.machine.scheduler.info()["tasks"]["failed"] == 1


def test_a_beat_tells_the_load(house: House) -> None:
    worker = house.peer(1, m.WORKER).greet()
    worker.session.load = (1, 2, 3, 4, 5, 6)
    worker.session.tick(house.now + 5)
    worker.say()
    (info,) = house.machine.info(house.now)["workers"]
    assert (info["bytes"], info["memory"]) == (5, 6)


# --- The rest -----------------------------------------------------------------------------------


def test_a_good_bye_ends_a_session_at_once(house: House) -> None:
    client = house.peer(1).greet()
    client.say(submit(client), m.Bye("closed"))
    assert not house.machine.sessions and not house.machine.scheduler.tasks
    assert not house.machine.routes and not house.machine.dirty
    (refusal,) = client.say(m.Release([1]))
    assert isinstance(refusal, m.Refuse) and refusal.code == "unknown"


def test_relays_are_passed_on_unread(house: House) -> None:
    client, worker = house.peer(1).greet(), house.peer(2, m.WORKER).greet()
    client.say(m.Relay(worker.number, (b"any", b"thing")))
    assert worker.heard[-1] == m.Relay(client.number, (b"any", b"thing"))
    # There is no such session, and never will be again: whoever asks need not wait.
    assert client.say(m.Relay(77, (b"nobody",))) == [m.Relay(77, ())]
    house.machine.gone(worker.link, house.now)
    before = len(worker.heard)
    client.say(m.Relay(worker.number, (b"lost",)))
    assert len(worker.heard) == before


def test_info(house: House) -> None:
    client = house.peer(1).greet()
    house.peer(2, m.WORKER, name="w").greet()
    house.now += 3
    (answer,) = client.say(m.Ask(17, "info"))
    assert isinstance(answer, m.Answer) and answer.request == 17
    info = unpackb(answer.payload)
    assert info["workers"][0]["name"] == "w"
    assert info["workers"][0]["silent_s"] == 3.0
    assert (info["clients"], info["uptime_s"], info["version"]) == (1, 3.0, "1")


def test_a_broker_that_stops_says_so(house: House) -> None:
    client = house.peer(1).greet()
    house.machine.close("maintenance")
    (refusal,) = house.deliver(client)
    assert refusal == m.Refuse("closing", "maintenance")


def test_numbers_begin_where_they_are_told_to() -> None:
    """So that ids of one incarnation mean nothing in the next."""
    house = House()
    house.machine = BrokerMachine(epoch=EPOCH, now=house.now, first_number=5000)
    assert [house.peer(token).greet().number for token in (1, 2)] == [5000, 5001]


def test_a_sessions_own_message_that_cannot_be_read_ends_it(house: House) -> None:
    """Dropped, it would be sent again for ever, with all that follows; so says each end."""
    client = house.peer(1).greet()
    record = house.machine.by_number[client.number]
    head, body = wire.encode(
        m.Release([1]), record.session.token, house.machine.epoch, record.session.received + 1
    )
    house.machine.receive(client.link, [head, bytes(body) + b"\xc1"], house.now)
    house.deliver()
    assert isinstance(client.heard[-1], m.Refuse) and client.heard[-1].code == "protocol"
    assert client.number not in house.machine.by_number


def test_a_message_that_does_not_fit_the_link_ends_its_session_alone(house: House) -> None:
    one, two = house.peer(1).greet(), house.peer(2).greet()
    record = house.machine.by_number[one.number]
    house.machine.end_unsendable(record, "a frame of 9 MB", house.now)
    assert list(house.machine.by_number) == [two.number]
    assert any("9 MB" in text for _, text in house.machine.log)


def finish_large(house: House, client: Peer, worker: Peer, counters: range, value: bytes) -> None:
    for counter in counters:
        row = task_id(client.number, counter)
        client.say(m.Submit([FUNCTION], [row], [FN], [b""]))
        worker.say(m.Done([row], [1], bytes([m.VALUE]), [value], 8))


def test_results_for_a_client_that_does_not_read_wait_as_rows() -> None:
    house = House(Settings(window_bytes=20_000))
    worker = house.peer(1, m.WORKER).greet()
    slow, quick = house.peer(2).greet(), house.peer(3).greet()
    rows = [task_id(slow.number, n) for n in range(1, 201)]
    slow.say(m.Submit([FUNCTION], rows, [FN] * 200, [b""] * 200))
    taken = slow.session.received
    session = house.machine.sessions[2].session
    # From now on it takes in nothing, and the worker ends its rows one by one.
    slow.is_deaf = True
    value = b"v" * 1000
    for row in rows:
        worker.say(m.Done([row], [1], bytes([m.VALUE]), [value], 300))
    assert 20_000 <= session.nbytes < 40_000
    record = house.machine.scheduler.clients[slow.number]
    assert record.is_full and len(record.ids) > 150
    assert all(payload is not None for payload in record.payloads)
    finish_large(house, quick, worker, range(1, 4), value)
    assert len([x for x in quick.heard if isinstance(x, m.Results)]) == 3
    # It wakes up.
    slow.is_deaf = False
    assert slow.session.received == taken
    session.reconnected()
    house.machine.dirty[house.machine.sessions[2]] = None
    for _ in range(40):
        house.deliver()
        slow.session.tick(house.now)
        house.now += 1.0
        slow.push()
    told = [id_ for x in slow.heard if isinstance(x, m.Results) for id_ in x.ids]
    assert told == rows
    assert session.nbytes < 20_000 and not record.is_full


def test_a_worker_that_does_not_read_gets_no_more_rows() -> None:
    house = House(Settings(window_bytes=20_000))
    worker = house.peer(1, m.WORKER).greet()
    client = house.peer(2).greet()
    worker.say(m.Inventory([], [], [], [], 1000))
    worker.say(m.Done([], [], b"", [], 1000))
    worker.is_deaf = True
    for n in range(1, 51):
        row = task_id(client.number, n)
        client.say(m.Submit([FUNCTION], [row], [FN], [b"a" * 1000]))
    session = house.machine.sessions[1].session
    assert 20_000 <= session.nbytes < 23_000
    assert len(house.machine.scheduler.workers[worker.number].rows) < 25


def test_whoever_asks_without_reading_is_given_up() -> None:
    house = House(Settings(lease_bytes=20_000))
    client = house.peer(1).greet()
    client.is_deaf = True
    for n in range(1, 1000):
        client.say(m.Ask(n, "info"))
        if not house.machine.sessions:
            break
    assert not house.machine.sessions
    assert house.machine.counts["bad:unread"] == 1


def test_relays_for_one_that_does_not_read_are_bounded_and_counted() -> None:
    house = House(Settings(relay_bytes=100_000))
    worker, client = house.peer(1, m.WORKER).greet(), house.peer(2).greet()
    session = house.machine.sessions[2].session
    for _ in range(300):
        worker.session.post(m.Relay(client.number, (bytes(50_000),)))
        worker.push()
        house.machine.sessions[1].session.next_frames()
        worker.session.reconnected()  # as if all had been told of
    assert 100_000 <= session.lane_nbytes <= 150_000
    assert house.machine.info(house.now)["relays_dropped"] >= 290


def test_a_client_that_was_cut_off_has_a_lease(house: House) -> None:
    client = house.peer(1).greet()
    house.machine.gone(client.link, house.now)
    house.pass_time(SETTINGS.lease_s - 1.0, step=1.0)
    client.redial()
    client.say(m.Submit([FUNCTION], [task_id(client.number, 1)], [FN], [b""]))
    assert len(house.machine.scheduler.tasks) == 1
    house.machine.gone(client.link, house.now)
    house.pass_time(SETTINGS.lease_s + 1.0, step=1.0)
    assert not house.machine.sessions
    assert not house.machine.scheduler.tasks


def test_what_is_kept_for_a_client_that_is_away_is_bounded() -> None:
    house = House(Settings(lease_bytes=1000))
    client = house.peer(1).greet()
    record = house.machine.sessions[1]
    house.machine.gone(client.link, house.now)
    record.session.post(m.Answer(1, b"x" * 900))
    house.pass_time(2.0)
    assert house.machine.sessions
    record.session.post(m.Answer(2, b"x" * 900))
    house.pass_time(2.0)
    assert not house.machine.sessions


def test_a_worker_begins_again_before_its_old_session_was_given_up(house: House) -> None:
    old = house.peer(1, m.WORKER, name="w").greet()
    client = house.peer(2).greet()
    client.say(m.Submit([FUNCTION], [task_id(client.number, 1)], [FN], [b""]))
    assert [type(message) for message in old.heard if type(message) is m.Run]
    new = house.peer(3, m.WORKER, name="w", previous=1).greet()
    assert new.welcome is not None
    assert new.welcome.name == "w"
    assert 1 not in house.machine.sessions
    row = task_id(client.number, 1)
    assert new.say(m.Inventory([row], [1], [], [], 2)) == []
    said = new.say(m.Done([row], [1], bytes([m.VALUE]), [b"v"], 2))
    assert said == []
    house.deliver(client)
    assert any(type(message) is m.Results for message in client.heard)


# --- A journal that cannot be written -----------------------------------------------------------


def test_while_nothing_can_be_written_questions_are_answered_and_nothing_else() -> None:
    house = House(saved=[])
    client, worker = house.peer(1).greet(), house.peer(2, m.WORKER).greet()
    client.say(submit(client))
    heard = len(worker.heard)
    unacked = client.session.n_unacked
    house.machine.cannot_write("no room")
    client.push()
    assert house.deliver(client) == [m.Alarm("no room")]
    assert client.say(submit(client, 2)) == []
    assert len(house.machine.scheduler.tasks) == 1, "taken for lost on its way"
    ids = [task_id(client.number, 1), task_id(client.number, 2)]
    (info,) = client.say(m.Query(7, "info"))
    assert isinstance(info, m.Reply) and info.request == 7
    assert unpackb(info.payload)["journal"] == "no room"
    (why,) = client.say(m.Query(8, "why", ids))
    assert isinstance(why, m.Reply)
    stories = unpackb(why.payload)
    assert [story["state"] for story in stories][1] == "unknown"
    assert all(story["reasons"][-1][0] == "journal" for story in stories)
    house.now += 1.5
    house.machine.tick(house.now)
    assert m.Alarm("no room") in house.deliver(client)
    assert client.session.n_unacked == unacked + 1, "nothing was acknowledged"
    late = house.peer(3).greet()
    assert [type(message) for message in late.heard] == [m.Welcome, m.Alarm]
    assert late.say(m.Ask(1, "info")) == []
    house.machine.can_write()
    assert m.Alarm("") in house.deliver(client)
    house.now += 1.5
    for peer in (client, late):  # their beats show what was not taken in
        peer.session.tick(house.now)
        peer.push()
        house.deliver(peer)
        peer.push()
        house.deliver(peer)
    assert len(house.machine.scheduler.tasks) == 2
    assert any(isinstance(message, m.Answer) for message in late.heard)
    assert len(worker.heard) > heard


def test_an_alarm_that_is_over_is_said_again_to_who_has_not_heard(house: House) -> None:
    client = house.peer(1).greet()
    alarm, reply = client.say(m.Query(1, "runs"))
    assert alarm == m.Alarm("") and reply == m.Reply(1, packb([]))
    worker = house.peer(2, m.WORKER).greet()
    worker.say(m.Query(1, "info"))
    assert 2 not in house.machine.sessions, "workers put no queries"


def test_a_broker_of_many_sessions_does_not_look_at_all_of_them_for_each_beat(house: House) -> None:
    house.now = 0.0
    for token in range(1, 501):
        house.now += 0.002  # so that their beats are due one by one
        house.peer(token).greet()
    now, n_ticks = house.now, 0
    while now < house.now + 1.1:
        now = house.machine.tick(now)
        n_ticks += 1
    assert n_ticks <= 1.1 / (500 * 2e-5) + 1
    posted = [record.session.n_control for record in house.machine.sessions.values()]
    assert min(posted) >= 1, "each gets its beat"


def test_a_worker_that_came_back_is_not_waited_for_once_more() -> None:
    saved: list[Entry] = []
    previous = 0
    for token in (5, 6, 7):
        house = House(saved=list(saved))
        worker = house.peer(token, m.WORKER, previous=previous).greet()
        worker.say(m.Inventory([], [], [], [], 1))
        house.pass_time(1.0, alive=(worker,))
        assert not house.machine.scheduler.settling
        assert not any("did not come back" in text for _, text in house.machine.log)
        assert house.machine.journal is not None
        saved += house.machine.journal.take()
        previous = token
