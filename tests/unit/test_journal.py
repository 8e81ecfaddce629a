"""What is journalled makes the same table again; a file that is no journal is left as it is."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

import pytest

from zfabric import messages as m
from zfabric import wire
from zfabric.config import Settings
from zfabric.core import invariants
from zfabric.core.journal import (
    Entry,
    JournalDamaged,
    JournalWriter,
    SavedSession,
    replay,
    settle,
    snapshot,
)
from zfabric.core.locks import Locks
from zfabric.core.placement import WorkerRecord
from zfabric.core.restart import Restart
from zfabric.core.scheduler import Scheduler
from zfabric.core.tasks import ASSIGNED, DONE, FAILED, READY, WAITING
from zfabric.errors import ConfigError, RemoteProtocolError
from zfabric.messages import ERROR, LOST
from zfabric.runtime import journal as runtime
from zfabric.testing.bench import Bench, tid

SESSION = SavedSession(77, 1, "client-1", 0, "", 0, "")


class Written(Bench):
    """A scheduler whose journal is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.writer = JournalWriter(self.scheduler.table)
        self.writer.begin(SESSION)
        self.seq = 0
        self.client(1)

    def hear(self, number: int, message: m.Message) -> None:
        if number == 1:
            body = wire.encode_body(message)
            self.seq += 1
            header = wire.encode_header(body.kind, SESSION.token, 5, self.seq, 0)
            self.writer.message([header, *body.frames])
        super().hear(number, message)
        if isinstance(message, m.Done):
            self.writer.done(message)

    def written(self) -> list[Entry]:
        self.entries += self.writer.take()
        return self.entries


def restored(entries: list[Entry]) -> Scheduler:
    scheduler = Scheduler()
    replay(scheduler, Locks(), entries, 2)
    invariants.check(scheduler)
    return scheduler


def table(scheduler: Scheduler) -> list[tuple[object, ...]]:
    return [
        (task.id, task.state, task.status, task.value, task.wanted, [d.id for d in task.deps])
        for task in scheduler.tasks.values()
    ]


@pytest.fixture
def bench() -> Written:
    bench = Written()
    bench.worker(101, credit=9)
    bench.submit(1, 2, 3, 4, 5, deps={3: [2], 4: [3], 5: [1]})
    bench.ended(1, credit=9)
    bench.release(1)
    bench.stored(2)
    bench.say(1, m.Cancel([tid(4)]))
    return bench


def test_a_replay_gives_the_table_again(bench: Written) -> None:
    scheduler = restored(bench.written())
    states = {task.id: task.state for task in scheduler.tasks.values()}
    # What a worker runs is not known before it says so.
    assert states == {tid(1): DONE, tid(2): DONE, tid(3): READY, tid(4): FAILED, tid(5): READY}
    assert scheduler.tasks[tid(1)].value == b"value"
    assert scheduler.settling
    assert scheduler.flush() == []


def test_a_snapshot_is_worth_the_whole_journal(bench: Written) -> None:
    whole = restored(bench.written())
    short = list(snapshot(bench.scheduler.table, Locks(), [SESSION], []))
    assert sorted(table(restored(short))) == sorted(table(whole))
    again = list(snapshot(restored(short).table, Locks(), [SESSION], []))
    assert sorted(table(restored(again))) == sorted(table(whole))


def test_every_prefix_makes_sense(bench: Written) -> None:
    entries = bench.written()
    for end in range(len(entries) + 1):
        restored(entries[:end])


def test_values_that_no_worker_brings_back_are_made_again(bench: Written) -> None:
    scheduler = restored(bench.written())
    settle(scheduler.table, ())
    scheduler.settled(0.0)
    assert scheduler.tasks[tid(2)].state == READY
    assert scheduler.tasks[tid(3)].state == WAITING
    invariants.check(scheduler)


def test_data_that_a_client_put_is_lost_with_its_last_copy() -> None:
    bench = Written()
    bench.worker(101)
    bench.say(1, m.Register([tid(1)], [100], [[101]]))
    scheduler = restored(bench.written())
    assert scheduler.tasks[tid(1)].state == DONE
    settle(scheduler.table, ())
    task = scheduler.tasks[tid(1)]
    assert (task.state, task.status) == (FAILED, LOST)


def test_what_may_run_once_at_most_does_not_run_again() -> None:
    bench = Written()
    bench.worker(101, credit=1)
    once = m.TaskOptions(idempotent=False)
    bench.submit(1, 2, options={1: once, 2: once})
    scheduler = Scheduler()
    known = replay(scheduler, Locks(), bench.written(), 2)
    assert known.started == {tid(1)}, "the other never left"
    settle(scheduler.table, known.started)
    assert [task.state for task in scheduler.tasks.values()] == [FAILED, READY]
    assert scheduler.tasks[tid(1)].status == m.UNKNOWN


def test_ends_without_a_value_and_retries_are_known(bench: Written) -> None:
    bench = Written()
    bench.worker(101, credit=1)
    bench.submit(1, 2, deps={2: [1]})
    bench.ended(1, status=ERROR, payload=b"exc", credit=1)
    scheduler = restored(bench.written())
    assert [task.status for task in scheduler.tasks.values()] == [ERROR, ERROR]
    bench.scheduler.workers[101].credit = 0
    bench.retry(1)
    assert [t.state for t in restored(bench.written()).tasks.values()] == [READY, FAILED]


def test_a_session_that_goes_on_without_its_run_keeps_its_functions() -> None:
    """As its client does not tell them again."""
    bench = Written()
    bench.submit(1)
    bench.writer.begin(SESSION._replace(received=bench.seq))  # it has left a run
    bench.submit(2)
    scheduler = restored(bench.written())
    assert list(scheduler.tasks) == [tid(1), tid(2)]


def test_attempts_that_gave_no_value_are_remembered() -> None:
    bench = Written()
    bench.worker(101, credit=1)
    bench.submit(1, options={1: m.TaskOptions(retries=1)})
    bench.ended(1, status=ERROR, payload=b"exc", credit=0)
    entries = list(bench.written())
    for saved in (entries, list(snapshot(restored(entries).table, Locks(), [SESSION], []))):
        task = restored(saved).tasks[tid(1)]
        assert task.state == READY and task.history == bench.task(1).history
        assert len(task.history or ()) == 1


def test_a_restart_does_not_cut_the_pause_before_a_retry_short() -> None:
    bench = Written()
    bench.worker(101, credit=1)
    again = m.TaskOptions(retries=1)
    bench.submit(1, 2, 3, options={1: again, 2: again})
    bench.ended(1, status=ERROR, payload=b"exc", credit=0)
    locks, settings = Locks(), Settings(retry_s=8.0, max_retry_s=60.0)
    scheduler = Scheduler(settings)
    restart = Restart(scheduler, locks, bench.written(), 2, settings, 100.0)
    scheduler.worker_joined(WorkerRecord(102, "fresh", 4, now=100.0), 100.0)
    restart.settle(100.0)
    invariants.check(scheduler)
    scheduler.flush()
    states = [scheduler.tasks[tid(n)].state for n in (1, 2, 3)]
    assert states == [READY, ASSIGNED, ASSIGNED]
    assert 104.0 <= scheduler.due_at <= 108.0
    scheduler.tick(108.0)
    scheduler.flush()
    assert scheduler.tasks[tid(1)].state == ASSIGNED


def test_a_failure_that_is_told_again_after_a_restart_counts_once() -> None:
    bench = Written()
    bench.worker(101, credit=1)
    bench.submit(1, options={1: m.TaskOptions(retries=1)})
    bench.ended(1, status=ERROR, payload=b"exc", credit=0)
    scheduler = restored(bench.written())
    scheduler.worker_joined(WorkerRecord(102, "again", 1, now=0.0), 0.0)
    scheduler.on_message(102, m.Inventory([tid(1)], [1], [], [], 1), 0.0)
    assert scheduler.workers[102].drops == [tid(1)]
    scheduler.on_message(102, m.Done([tid(1)], [1], bytes([ERROR]), [b"exc"], 1), 0.0)
    assert scheduler.tasks[tid(1)].state == READY
    scheduler.on_message(102, m.Inventory([tid(1)], [2], [], [], 1), 0.0)
    assert scheduler.tasks[tid(1)].state == ASSIGNED, "the second attempt goes on"


def test_a_worker_that_was_not_lost_after_all_is_not_held_against_a_task() -> None:
    bench = Written()
    bench.worker(101, credit=1)
    bench.submit(1)
    bench.scheduler.worker_left(101, "silent", bench.now, may_return=True)
    assert [one.how for one in restored(bench.written()).tasks[tid(1)].history or ()] == [LOST]
    bench.worker(102, credit=0)
    bench.hear(102, m.Inventory([tid(1)], [1], [], [], 0))
    assert not restored(bench.written()).tasks[tid(1)].history


def test_locks_have_the_same_holders_and_the_same_queues_again() -> None:
    bench = Written()
    other = SavedSession(78, 2, "client-2", 0, "", 0, "")
    bench.writer.begin(other)
    for token, request, name in [(77, 1, "a"), (78, 1, "b"), (78, 2, "a"), (77, 2, "b")]:
        bench.writer.in_its_place(token, m.Acquire(request, name, True))
    bench.writer.in_its_place(78, m.Acquire(3, "a", False))
    bench.writer.in_its_place(78, m.Unlock(1))
    entries = list(bench.written())
    locks = Locks()
    scheduler = Scheduler()
    replay(scheduler, locks, entries, 2)
    assert locks.requests() == [("a", 1, 1), ("a", 2, 2), ("b", 1, 2)]
    again = Locks()
    short = list(snapshot(scheduler.table, locks, [SESSION, other], []))
    replay(Scheduler(), again, short, 3)
    assert again.requests() == locks.requests()
    bench.writer.end(77)
    later = Locks()
    replay(Scheduler(), later, bench.written(), 3)
    assert later.requests() == [("a", 2, 2)]


def test_a_message_that_broke_the_protocol_does_not_spoil_a_journal() -> None:
    bench = Written()
    bench.submit(1)
    with pytest.raises(RemoteProtocolError):
        bench.submit(1)
    bench.writer.end(SESSION.token)
    bench.scheduler.client_left(1)
    assert not restored(bench.written()).tasks


def test_numbers_are_not_given_twice(bench: Written) -> None:
    bench.writer.joined(9, 40)
    scheduler = Scheduler()
    known = replay(scheduler, Locks(), bench.written(), 2)
    assert known.next_number == 41
    assert known.workers == {9: 40}
    assert known.sessions[0].received == bench.seq
    assert all(task.attempt == 2 << 20 for task in scheduler.tasks.values())


def test_entries_that_make_no_sense_are_told() -> None:
    with pytest.raises(JournalDamaged):
        restored([(3, b"\x91\xc0")])
    with pytest.raises(JournalDamaged):
        restored([(99, b"")])


# --- the file -------------------------------------------------------------------------------------


def test_a_file_keeps_what_was_committed(tmp_path: Path) -> None:
    book = runtime.Journal(tmp_path / "j")
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o600
    book.commit([(1, b"a"), (2, b"b")], list)
    book.commit([(3, b"c")], list)
    first = book.generation
    book.close()
    book = runtime.Journal(tmp_path / "j")
    assert list(book.entries()) == [(1, b"a"), (2, b"b"), (3, b"c")]
    assert book.generation == first + 1
    book.rewrite(lambda: [(4, b"d")])
    assert list(book.entries()) == [(4, b"d")]
    book.close()


def test_a_crash_at_any_byte_of_the_log_leaves_whole_turns(tmp_path: Path) -> None:
    book = runtime.Journal(tmp_path / "j")
    turns = [[(n, bytes([n]) * 300), (n, b"last")] for n in range(1, 6)]
    for turn in turns:
        book.commit(turn, list)
    wal = (tmp_path / "j-wal").read_bytes()
    whole = [sum(turns[:n], []) for n in range(6)]
    for cut in range(0, len(wal), 517):
        shutil.copy(tmp_path / "j", tmp_path / "copy")
        (tmp_path / "copy-wal").write_bytes(wal[:cut])
        try:
            torn = runtime.Journal(tmp_path / "copy")
        except ConfigError as exc:
            pytest.fail(f"cut at {cut}: {exc}")
        assert list(torn.entries()) in whole
        torn.close()
    book.close()


def test_an_older_journal_is_read_and_is_of_this_format_then(tmp_path: Path) -> None:
    book = runtime.Journal(tmp_path / "j")
    book.commit([(1, b"a")], list)
    book.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "j")) as db:
        db.execute("PRAGMA user_version=1")
    book = runtime.Journal(tmp_path / "j")
    assert list(book.entries()) == [(1, b"a")]
    book.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "j")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (runtime.FORMAT,)


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    db = sqlite3.connect(foreign)
    db.execute("CREATE TABLE things (name)")
    db.close()
    newer, crashed = tmp_path / "newer", tmp_path / "crashed"
    runtime.Journal(newer).close()
    db = sqlite3.connect(newer)
    db.execute("PRAGMA user_version=99")
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("CREATE TABLE more (name)")
    for suffix in ("", "-wal"):  # as a kill would leave it
        shutil.copy(f"{newer}{suffix}", f"{crashed}{suffix}")
    db.close()
    letter = tmp_path / "letter"
    letter.write_text("Dear Sir or Madam")
    damaged = tmp_path / "damaged"
    book = runtime.Journal(damaged)
    book.commit([(1, b"x" * 50_000)], list)
    book.close()
    data = bytearray(damaged.read_bytes())
    data[4096:12288] = b"\xff" * 8192
    damaged.write_bytes(data)
    for path, text in (
        (foreign, "another program's"),
        (newer, "format 99"),
        (crashed, "format 99"),
        (letter, "is not a journal"),
        (damaged, "is damaged"),
    ):
        before = {file: file.read_bytes() for file in tmp_path.glob(f"{path.name}*")}
        with pytest.raises(ConfigError, match=text):
            runtime.Journal(path)
        assert {file: file.read_bytes() for file in tmp_path.glob(f"{path.name}*")} == before
    assert (tmp_path / "crashed-wal").stat().st_size


def test_a_full_disk_is_told_and_got_over(tmp_path: Path) -> None:
    book = runtime.Journal(tmp_path / "j")
    book.commit([(1, b"a")], list)
    book._db.execute("PRAGMA max_page_count=4")
    with pytest.raises(runtime.JournalFailed, match="full"):
        book.commit([(2, b"x" * 100_000)], list)
    assert list(book.entries()) == [(1, b"a")]
    book.recover(lambda: [(1, b"a"), (2, b"x" * 100_000)])
    assert [kind for kind, _ in book.entries()] == [1, 2]
    book.close()


@pytest.mark.parametrize("log_is_gone", [False, True])
def test_a_rotation_that_was_cut_short_is_finished(tmp_path: Path, log_is_gone: bool) -> None:
    book = runtime.Journal(tmp_path / "j")
    book.commit([(1, b"old")], list)
    runtime._write_whole(tmp_path / "j.new", [(1, b"new"), (2, b"newer")], 7)
    (tmp_path / "j.part").write_bytes(b"half of another one")
    for name in ("j", "j-wal"):  # as kill -9 leaves them
        if name == "j" or not log_is_gone:
            (tmp_path / f"copy{name[1:]}").write_bytes((tmp_path / name).read_bytes())
    book.close()
    (tmp_path / "j.new").rename(tmp_path / "copy.new")
    book = runtime.Journal(tmp_path / "copy")
    assert list(book.entries()) == [(1, b"new"), (2, b"newer")]
    assert book.generation == 8
    assert not (tmp_path / "copy.new").exists()
    book.recover(lambda: [(3, b"newest")])
    book.commit([(4, b"and later")], list)
    assert list(book.entries()) == [(3, b"newest"), (4, b"and later")]
    book.close()


def test_a_client_whose_first_welcome_was_lost_is_told_what_ends() -> None:
    """It does not know that there was a broker before, so it does not say what it has heard."""
    scheduler = restored(Written().written())
    (client,) = scheduler.clients.values()
    assert client.held_back
    scheduler.client_was_never_told(client.number)
    assert not client.held_back


def test_what_there_was_no_room_for_is_not_there_after_a_restart_either() -> None:
    bench = Written()
    bench.worker(101, credit=0)
    bench.scheduler.quota.why_not = lambda client, nbytes: "full"  # type: ignore[method-assign]
    bench.submit(1, 2, deps={2: [1]})
    bench.say(1, m.Register([tid(3)], [100], [[101]]))
    assert not bench.scheduler.tasks
    scheduler = restored(bench.written())
    assert not scheduler.tasks
    # Its client may not have heard that yet, nor from one that was killed with a snapshot written.
    scheduler.settled(0.0)
    (client,) = scheduler.clients.values()
    ids = [tid(1), tid(2), tid(3), tid(4)]
    scheduler.on_message(client.number, m.Inventory(ids, [0] * 4, [], [], 1), 0.0)
    assert (client.ids, set(client.statuses)) == (ids[:3], {m.FULL}), "tid(4) is on its way"
    assert set(client.refused) == set(ids[:3]), "for a snapshot; it may be killed as well"
    scheduler.on_message(client.number, m.Release(ids[:3]), 0.0)
    assert not client.refused
