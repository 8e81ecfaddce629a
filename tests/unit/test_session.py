"""Two ends of a session over links that lose, repeat and delay: nothing lost, nothing twice."""

from __future__ import annotations

import random
from typing import Any

import pytest

from zfabric import messages as m
from zfabric import wire
from zfabric.config import DEFAULTS, Settings
from zfabric.core.session import MAX_CONTROL, PATIENCE, RELAY_WINDOW, Session
from zfabric.errors import RemoteProtocolError
from zfabric.testing.links import Pipe, Weather
from zfabric.wire import Header

TOKEN = 77


class End:
    """One end: a session, what it took in, and its side of the links."""

    def __init__(self, name: str, settings: Settings = DEFAULTS) -> None:
        self.name = name
        self.session = Session(TOKEN, 1, settings=settings, now=0.0)
        self.taken: list[m.Message] = []
        self.heard: list[m.Message] = []
        """Everything that came, repeated ones, beats and nacks too."""
        self.out: Pipe | None = None
        self.sources: list[Pipe] = []

    def transmit(self, now: float) -> int:
        n = 0
        while self.out is not None and (frames := self.session.next_frames()) is not None:
            if not self.out.send(frames, now):
                break
            self.session.sent()
            n += 1
        return n

    def collect(self, now: float, rng: random.Random) -> None:
        sources = [pipe for pipe in self.sources if len(pipe) or not pipe.closed]
        self.sources = sources
        rng.shuffle(sources)  # an old connection may be read before or after the new one
        for pipe in sources:
            while (frames := pipe.recv(now)) is not None:
                header, message = wire.decode([bytes(frame) for frame in frames])
                self.heard.append(message)
                if self.session.receive(header, message, now, len(frames[1])):
                    self.taken.append(message)


def connect(a: End, b: End, rng: random.Random, weather: Weather) -> None:
    for one, other in ((a, b), (b, a)):
        one.out = Pipe(rng, weather)
        other.sources.append(one.out)


def cut(a: End, b: End) -> None:
    for end in (a, b):
        assert end.out is not None
        end.out.cut()


def pair(settings: Settings = DEFAULTS) -> tuple[End, End]:
    return End("client", settings), End("broker", settings)


def pass_on(sender: End, receiver: End, now: float = 0.0, lose: Any = ()) -> int:
    """Everything that the sender may send, at once, but for the ones of these places."""
    n = 0
    while (frames := sender.session.next_frames()) is not None:
        sender.session.sent()
        if n not in lose:
            header, message = wire.decode([bytes(frame) for frame in frames])
            receiver.heard.append(message)
            if receiver.session.receive(header, message, now, len(frames[1])):
                receiver.taken.append(message)
        n += 1
    return n


def numbered(*numbers: int) -> list[m.Message]:
    return [m.Release([n]) for n in numbers]


# --- Over bad links -----------------------------------------------------------------------------


@pytest.mark.parametrize("first_seed", range(0, 400, 50))
def test_everything_arrives_once_and_in_order(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 50):
        _run_over_bad_links(seed)


def _run_over_bad_links(seed: int) -> None:
    rng = random.Random(seed)
    settings = Settings.load({}, window=rng.choice([1, 2, 3, 8, 64]))
    weather = Weather(
        delay_s=rng.choice([0.001, 0.05, 0.4]),
        p_slow=rng.choice([0.0, 0.05]),
        p_twice=rng.choice([0.0, 0.2]),
        capacity=rng.choice([3, 1000]),
    )
    a, b = pair(settings)
    connect(a, b, rng, weather)
    posted: dict[str, list[m.Message]] = {"client": [], "broker": []}
    now = 0.0
    quiet_at = 6.0
    p_cut = rng.choice([0.0, 0.02, 0.1])
    n_cuts = 0
    while now < quiet_at + 300.0:
        now += 0.05
        for end in (a, b):
            if now < quiet_at and rng.random() < 0.3:
                for _ in range(rng.randint(1, 10)):
                    message = m.Release([len(posted[end.name])])
                    posted[end.name].append(message)
                    end.session.post(message)
            end.collect(now, rng)
            assert end.session.tick(now) > now
            end.transmit(now)
        if now < quiet_at and rng.random() < p_cut:
            n_cuts += 1
            cut(a, b)
            connect(a, b, rng, weather)
            for end in (a, b):
                end.session.reconnected()
        done = not a.session.n_unacked and not b.session.n_unacked
        if now > quiet_at and done:
            break
    assert b.taken == posted["client"], f"seed {seed}"
    assert a.taken == posted["broker"], f"seed {seed}"
    assert not a.session.n_unacked and not b.session.n_unacked, f"seed {seed}"
    for end, other in ((a, b), (b, a)):
        nacks = sum(isinstance(message, m.Nack) for message in other.heard)
        # One per gap and beat at most: go-back-N must not answer each late message with a Nack.
        assert nacks <= (n_cuts + 1) * (2 + 2 * (now + 1)), f"seed {seed}"
        assert end.session.acked == end.session.posted


def test_a_lost_tail_is_found_by_the_next_beat() -> None:
    a, b = pair()
    for message in numbered(1, 2, 3):
        a.session.post(message)
    pass_on(a, b, lose={1, 2})
    assert b.taken == numbered(1)
    pass_on(b, a)
    assert not pass_on(a, b)  # nothing shows the loss yet
    a.session.tick(1.0)
    pass_on(a, b, 1.0)
    assert isinstance(b.heard[-1], m.Beat)
    pass_on(b, a, 1.0)
    pass_on(a, b, 1.0)
    assert b.taken == numbered(1, 2, 3)
    assert b.session.gaps == 1


def test_a_gap_is_complained_of_once_however_many_messages_follow() -> None:
    a, b = pair()
    for message in numbered(*range(100)):
        a.session.post(message)
    pass_on(a, b, lose={10})
    assert b.taken == numbered(*range(10))
    pass_on(b, a)
    nacks = [message for message in a.heard if isinstance(message, m.Nack)]
    assert nacks == [m.Nack(11)]
    pass_on(a, b)
    assert b.taken == numbered(*range(100))
    assert b.session.duplicates == 0


def test_a_lost_nack_is_said_again_at_the_next_beat_only() -> None:
    a, b = pair()
    for message in numbered(1, 2, 3):
        a.session.post(message)
    pass_on(a, b, lose={0})
    assert b.session.has_unsent
    pass_on(b, a, lose={0})
    for now in (1.0, 2.0):
        a.session.tick(now)
        pass_on(a, b, now)
        pass_on(b, a, now)
    pass_on(a, b, 2.0)
    assert b.taken == numbered(1, 2, 3)


def test_both_ends_send_what_is_unacked_again_after_a_reconnect() -> None:
    a, b = pair()
    for message in numbered(1, 2, 3):
        a.session.post(message)
    b.session.post(m.Free([9]))
    pass_on(a, b, lose={0, 1, 2})
    pass_on(b, a, lose={0})
    a.session.reconnected()
    b.session.reconnected()
    pass_on(a, b)
    pass_on(b, a)
    assert b.taken == numbered(1, 2, 3)
    assert a.taken == [m.Free([9])]
    # The Beat that goes ahead says only what had been acknowledged: no Nack for it.
    assert not [x for x in a.heard + b.heard if isinstance(x, m.Nack)]


def test_a_repeated_message_is_counted_and_dropped() -> None:
    a, b = pair()
    a.session.post(m.Release([1]))
    frames = a.session.next_frames()
    assert frames is not None
    header, message = wire.decode(frames)
    assert b.session.receive(header, message, 0.0)
    assert not b.session.receive(header, message, 0.0)
    assert b.session.duplicates == 1
    assert not b.session.has_unsent


# --- Window, acks, beats ------------------------------------------------------------------------


def test_at_most_a_window_is_under_way() -> None:
    a, b = pair(Settings.load({}, window=8))
    for message in numbered(*range(20)):
        a.session.post(message)
    a.out = Pipe(random.Random(0))
    assert a.transmit(0.0) == 8
    assert not a.session.has_unsent
    assert a.session.n_unacked == 20
    b.sources.append(a.out)
    b.collect(1.0, random.Random(0))
    assert len(b.taken) == 8
    pass_on(b, a)  # acks come without traffic of b's own
    assert a.session.n_unacked == 12
    assert a.transmit(1.0) == 8


def test_a_session_is_full_by_bytes_and_acks_go_out_by_bytes() -> None:
    a, b = pair(Settings.load({}, window_bytes=10_000))
    while not a.session.is_full:
        a.session.post(m.Answer(1, b"x" * 1000))
    assert 10_000 <= a.session.nbytes < 12_000 and a.session.n_unacked == 10
    assert pass_on(a, b) == 10
    pass_on(b, a)
    assert a.session.nbytes < 3000 and not a.session.is_full
    b.session.tick(2.0)
    pass_on(b, a)
    assert a.session.nbytes == 0


PART = 256 * 1024


def relay(n: int, nbytes: int = PART) -> m.Relay:
    return m.Relay(n, (bytes(nbytes),))


def lane_of(sender: End) -> list[int]:
    """The relays that go out now, by their numbers."""
    out = []
    while (frames := sender.session.next_frames()) is not None:
        sender.session.sent()
        _, message = wire.decode(frames)
        if isinstance(message, m.Relay):
            out.append(message.peer)
    return out


def test_relays_wait_behind_all_else_and_for_the_other_end() -> None:
    a, b = pair()
    for n in range(1, 21):
        a.session.post(relay(n))
    a.session.post(m.Release([1]))
    a.session.post(m.Beat(0))
    pass_on(a, b)
    assert [type(message) for message in b.heard[:2]] == [m.Beat, m.Release]
    relayed = [message for message in b.taken if isinstance(message, m.Relay)]
    assert len(relayed) * PART == RELAY_WINDOW
    assert not a.session.has_unsent and a.session.lane_nbytes > 12 * PART
    a.session.post(m.Release([2]))
    assert pass_on(a, b) == 1  # what is in sequence goes on
    while pass_on(b, a):
        pass_on(a, b)
    numbers = [message.peer for message in b.taken if isinstance(message, m.Relay)]
    assert numbers == list(range(1, 21)) and a.session.lane_nbytes == 0


def test_relays_that_a_cut_swallowed_are_not_waited_for() -> None:
    a, b = pair()
    for n in range(1, 21):
        a.session.post(relay(n))
    assert lane_of(a) == list(range(1, 9))
    a.session.reconnected()
    assert lane_of(a) == list(range(9, 17))
    a.session.reconnected()
    while pass_on(a, b) or pass_on(b, a):
        pass
    assert [x.peer for x in b.taken if isinstance(x, m.Relay)] == [17, 18, 19, 20]


def test_relays_that_got_lost_are_forgiven_only_while_the_other_end_speaks() -> None:
    a, b = pair()
    for n in range(1, 21):
        a.session.post(relay(n))
    assert lane_of(a) == list(range(1, 9))
    for beat in range(1, PATIENCE + 1):
        assert not a.session.has_unsent
        b.session.tick(float(beat) + 1.0)
        pass_on(b, a)
    assert lane_of(a) == list(range(9, 17))


def test_relays_count_anew_with_another_incarnation() -> None:
    a, b = pair()
    for n in range(1, 21):
        a.session.post(relay(n))
    while pass_on(a, b) or pass_on(b, a):
        pass
    b = End("next broker")
    a.session.pause()
    a.session.go_on()
    for n in range(1, 21):
        a.session.post(relay(n))
    for beat in range(2, 2 + 4 * PATIENCE):
        b.session.tick(float(beat))
        while pass_on(a, b) or pass_on(b, a):
            pass
    assert sum(isinstance(x, m.Relay) for x in b.taken) == 20


def test_acks_go_out_every_quarter_of_a_window() -> None:
    a, b = pair(Settings.load({}, window=16))
    for n in range(40):
        a.session.post(m.Release([n]))
        pass_on(a, b)
        pass_on(b, a)
        assert a.session.n_unacked <= 4
    assert sum(isinstance(message, m.Beat) for message in a.heard) == 10


def test_an_ack_that_rides_along_makes_a_beat_needless() -> None:
    a, b = pair(Settings.load({}, window=16))
    for n in range(40):
        a.session.post(m.Release([n]))
        b.session.post(m.Free([n]))
        pass_on(a, b)
        pass_on(b, a)
    assert not [x for x in a.heard + b.heard if isinstance(x, m.Beat)]
    assert b.session.acked >= 39


def test_beats_come_on_time_and_do_not_pile_up_behind_a_full_link() -> None:
    a, _ = pair()
    now = 0.0
    for _ in range(100):
        now = a.session.tick(now)
    assert now == pytest.approx(100 * DEFAULTS.beat_s)
    n = 0
    while a.session.next_frames() is not None:
        a.session.sent()
        n += 1
    assert n == 4
    assert a.session.tick(now - 0.01) == now  # not due: nothing is posted
    assert not a.session.has_unsent


def test_a_beat_carries_the_load() -> None:
    a, b = pair()
    a.session.load = (1, 2, 3)
    a.session.tick(1.0)
    pass_on(a, b)
    assert b.heard == [m.Beat(0, (1, 2, 3))]
    assert b.taken == []


def test_unsequenced_messages_are_dropped_rather_than_hoarded() -> None:
    a, b = pair()
    for n in range(MAX_CONTROL + 5):
        assert a.session.post(m.Relay(1, (b"%d" % n,))) == 0
    assert pass_on(a, b) == MAX_CONTROL
    assert b.taken[-1] == m.Relay(1, (b"%d" % (MAX_CONTROL + 4),))
    assert b.session.received == 0


def test_posting_numbers_messages_from_one() -> None:
    a, b = pair()
    assert [a.session.post(message) for message in numbered(5, 6)] == [1, 2]
    assert a.session.posted == 2
    pass_on(a, b)
    assert b.session.received == 2
    b.session.tick(1.0)
    pass_on(b, a)
    assert a.session.acked == 2


def test_a_message_not_taken_by_the_link_is_offered_again() -> None:
    a, _ = pair()
    a.session.post(m.Release([1]))
    a.session.post(m.Beat(0))
    first = a.session.next_frames()
    assert a.session.next_frames() == first  # control goes ahead, until sent() is called
    a.session.sent()
    assert a.session.next_frames() != first


# --- A peer that makes no sense -------------------------------------------------------------------


def test_an_ack_of_what_was_never_sent() -> None:
    a, _ = pair()
    a.session.post(m.Release([1]))
    with pytest.raises(RemoteProtocolError) as caught:
        a.session.receive(Header(4, TOKEN, 1, 0, 2), m.Beat(0), 0.0)
    assert caught.value.reason == "ack"


def test_a_nack_of_what_was_never_sent() -> None:
    a, _ = pair()
    with pytest.raises(RemoteProtocolError) as caught:
        a.session.receive(Header(5, TOKEN, 1, 0, 0), m.Nack(2), 0.0)
    assert caught.value.reason == "nack"


def test_old_acks_and_nacks_change_nothing() -> None:
    a, b = pair()
    for message in numbered(1, 2, 3):
        a.session.post(message)
    pass_on(a, b)
    b.session.tick(1.0)
    pass_on(b, a)
    assert a.session.acked == 3
    for header, message in [
        (Header(4, TOKEN, 1, 0, 1), m.Beat(0)),
        (Header(5, TOKEN, 1, 0, 1), m.Nack(2)),
        (Header(5, TOKEN, 1, 0, 0), m.Nack(0)),
    ]:
        assert not a.session.receive(header, message, 2.0)
    assert a.session.next_frames() is None
    assert (a.session.acked, a.session.posted) == (3, 3)


def test_what_is_held_tells_nothing_and_acknowledges_nothing() -> None:
    rng = random.Random(1)
    a, b = End("a"), End("b")
    connect(a, b, rng, Weather(delay_s=0.0))
    b.session.post(m.Release([1]))
    b.transmit(0.0)
    a.collect(0.0, rng)
    a.session.post(m.Nack(2))
    a.session.hold()
    a.session.post(m.Release([2]))
    a.session.post(m.Alarm("full"))
    a.session.tick(1.0)
    assert a.session.has_unsent
    a.transmit(1.0)
    assert not a.session.has_unsent
    b.collect(1.0, rng)
    assert [type(message) for message in b.heard] == [m.Alarm, m.Beat]
    assert b.session.n_unacked == 1
    # A gap is not complained of, as that would acknowledge what is before it.
    a.session.receive(Header(18, TOKEN, 1, 5, 0), m.Release([5]), 1.0)
    assert not a.session.has_unsent
    a.session.let_go()
    a.transmit(2.0)
    b.collect(2.0, rng)
    assert b.taken == [m.Alarm("full"), m.Release([2])]
    assert b.session.n_unacked == 0
