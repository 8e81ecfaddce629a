"""Locks: the broker's queues, and what a client says."""

from __future__ import annotations

import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import zfabric
from zfabric import messages as m
from zfabric.core.locks import Locks
from zfabric.errors import RemoteProtocolError, UsageError


def test_first_come_first_served() -> None:
    locks = Locks()
    assert locks.acquire(1, m.Acquire(5, "a", True)) == [(1, m.Locked(5, True))]
    assert locks.acquire(2, m.Acquire(5, "a", True)) == []
    assert locks.acquire(1, m.Acquire(6, "a", True)) == []
    assert locks.acquire(3, m.Acquire(1, "a", False)) == [(3, m.Locked(1, False))]
    assert locks.is_locked("a") and locks.holder("a") == 1 and locks.n_waiting("a") == 2
    assert locks.unlock(1, m.Unlock(5)) == [(2, m.Locked(5, True))]
    assert locks.unlock(1, m.Unlock(5)) == []  # said twice
    assert locks.unlock(2, m.Unlock(5)) == [(1, m.Locked(6, True))]
    assert locks.unlock(1, m.Unlock(6)) == []
    assert not locks.is_locked("a") and not locks._queues and not locks._names


def test_who_gives_up_is_not_served() -> None:
    locks = Locks()
    for session in (1, 2, 3):
        locks.acquire(session, m.Acquire(1, "a", True))
    assert locks.unlock(2, m.Unlock(1)) == []
    assert locks.unlock(1, m.Unlock(1)) == [(3, m.Locked(1, True))]


def test_a_session_takes_its_locks_with_it() -> None:
    locks = Locks()
    locks.acquire(1, m.Acquire(1, "a", True))
    locks.acquire(1, m.Acquire(2, "b", True))
    locks.acquire(1, m.Acquire(3, "a", True))
    locks.acquire(2, m.Acquire(1, "a", True))
    assert locks.session_ended(1) == [(2, m.Locked(1, True))]
    assert locks.names() == ["a"]
    assert locks.session_ended(1) == []


def test_a_request_made_twice_breaks_the_protocol() -> None:
    locks = Locks()
    locks.acquire(1, m.Acquire(1, "a", True))
    with pytest.raises(RemoteProtocolError):
        locks.acquire(1, m.Acquire(1, "b", True))


class LocksAgainstAModel(RuleBasedStateMachine):
    """Any order of requests, ends and lost sessions, against plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.locks = Locks()
        self.model: dict[str, list[tuple[int, int]]] = {}
        self.told: set[tuple[int, int]] = set()
        self.last = 0

    def hear(self, said: Any) -> None:
        for session, message in said:
            if message.held:
                assert (session, message.request) not in self.told, "told twice"
                self.told.add((session, message.request))

    @rule(session=st.integers(1, 4), name=st.sampled_from("abc"), waits=st.booleans())
    def acquire(self, session: int, name: str, waits: bool) -> None:
        self.last += 1
        queue = self.model.setdefault(name, [])
        if waits or not queue:
            queue.append((session, self.last))
        self.hear(self.locks.acquire(session, m.Acquire(self.last, name, waits)))

    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        opened = sorted(request for queue in self.model.values() for request in queue)
        if opened:
            session, request = data.draw(st.sampled_from(opened))
            for queue in self.model.values():
                if (session, request) in queue:
                    queue.remove((session, request))
            self.hear(self.locks.unlock(session, m.Unlock(request)))

    @rule(session=st.integers(1, 4))
    def end(self, session: int) -> None:
        for queue in self.model.values():
            queue[:] = [request for request in queue if request[0] != session]
        said = self.locks.session_ended(session)
        self.hear([each for each in said if each[0] != session])

    @invariant()
    def the_first_of_each_queue_knows(self) -> None:
        held = {name: queue for name, queue in self.model.items() if queue}
        assert set(self.locks.names()) == set(held)
        for name, queue in held.items():
            assert self.locks.holder(name) == queue[0][0]
            assert self.locks.n_waiting(name) == len(queue) - 1
            assert queue[0] in self.told and not self.told & set(queue[1:])


TestLocksAgainstAModel = LocksAgainstAModel.TestCase
TestLocksAgainstAModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# --- The client's side, on a real fabric --------------------------------------------------------


def add_one(path: str, n: int) -> None:
    """Not safe at all but for the lock."""
    for _ in range(n):
        with zfabric.Lock("counter"):
            with open(path) as file:
                value = int(file.read() or 0)
            with open(path, "w") as file:
                file.write(str(value + 1))


def take(name: str) -> bool:
    return zfabric.Lock(name).acquire(False)


def hold_and_die(lock: Any) -> None:
    import os

    lock.acquire()
    os._exit(1)


def use(lock: Any) -> bool:
    with lock:
        return bool(lock.locked())


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_tasks_exclude_one_another(kind: str, tmp_path: Any) -> None:
    path = tmp_path / "count"
    path.write_text("0")
    with zfabric.Client(slots=3, kind=kind) as client:
        client.gather([client.submit(add_one, str(path), 30) for _ in range(3)])
        add_one(str(path), 1)
    assert path.read_text() == "91"


def test_a_lock_between_a_client_and_its_tasks(wait_until: Callable[..., Any]) -> None:
    with zfabric.Client(slots=1) as client:
        lock = zfabric.Lock("one")
        assert not lock.locked() and lock.acquire() and lock.locked()
        assert not lock.acquire(False) and not lock.acquire(timeout=0.01)
        assert client.submit(take, "one").result(20) is False
        assert client.submit(take, "other").result(20) is True
        lock.release()
        assert client.submit(use, lock).result(20) is True
        with pytest.raises(RuntimeError, match="not held"):
            lock.release()
        # A task that died takes it along, and so does a client that ends.
        dying = client.submit(hold_and_die, lock)
        assert isinstance(dying.exception(20), zfabric.KilledTask)
        assert lock.acquire(timeout=10)
        lock.release()
        with zfabric.Client(client.address) as other:
            assert zfabric.Lock("one", other).acquire()
            mine = zfabric.Lock("one", client)
            waiting = threading.Thread(target=mine.acquire)
            waiting.start()
        waiting.join(10)
        assert not waiting.is_alive() and lock.locked()
        mine.release()
        wait_until(lambda: not lock.locked())


def test_a_lock_is_its_name() -> None:
    lock = zfabric.Lock("a")
    assert pickle.loads(pickle.dumps(lock)) is lock is zfabric.Lock("a")

    class Other(zfabric.Lock):
        pass

    assert type(Other("a")) is Other and Other("a") is not lock
    assert {lock: 1}[zfabric.Lock("a")] == 1 and zfabric.Lock("b") is not lock
    with pytest.raises(UsageError):
        zfabric.Lock("")
    with pytest.raises(ValueError, match="timeout"):
        lock.acquire(False, 1)
    with pytest.raises(UsageError, match="no open client"):
        lock.acquire()
    with pytest.raises(RuntimeError):
        lock.release()


def test_a_lock_that_is_held_is_known_by_its_name_though_nobody_keeps_it() -> None:
    with zfabric.Client(n_workers=1, slots=1) as client:
        zfabric.Lock("kept").acquire()
        gc.collect()
        assert zfabric.Lock("kept").locked()
        zfabric.Lock("kept").release()
        assert not zfabric.Lock("kept").locked()
        assert client.submit(abs, -1).result(30) == 1


def test_closing_the_client_wakes_who_waits() -> None:
    with zfabric.Client(slots=1, kind="thread") as client:
        lock = zfabric.Lock("closing", client)
        assert lock.acquire()
        raised: list[BaseException] = []

        def wait() -> None:
            try:
                lock.acquire()
            except zfabric.ClientClosed as exc:
                raised.append(exc)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while not client._io.questions.lockers:
            threading.Event().wait(0.001)
    waiting.join(10)
    assert raised
    lock.release()  # it ended with the client
