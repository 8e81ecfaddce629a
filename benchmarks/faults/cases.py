"""The faults. Each is a function of a bench that has warmed up, and gives the account."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.faults import garbage, tasks
from benchmarks.faults.systems import Shape, send
from benchmarks.faults.work import Account, Bench

LIMIT_S = 1.0
"""Of tasks that would run for ever."""

DOWN_S = 1.0
"""How long the broker is away."""


def nothing(bench: Bench) -> Account:
    """No fault: what the others are compared with. Its time is from the moment of theirs."""
    bench.under_way()
    return bench.collect(time.monotonic())


def slot_killed(bench: Bench) -> Account:
    os.kill(bench.under_way(), signal.SIGKILL)
    return bench.collect(time.monotonic())


def worker_killed(bench: Bench) -> Account:
    victims = bench.system.worker_of(bench.under_way())
    send(victims, signal.SIGKILL)
    return bench.collect(time.monotonic())


def worker_stopped(bench: Bench) -> Account:
    """All of its processes, as of a machine that is suspended, for twice the dead time."""
    victims = bench.system.worker_of(bench.under_way())
    send(victims, signal.SIGSTOP)
    begun, still = time.monotonic(), True

    def go_on() -> bool:
        nonlocal still
        if still and time.monotonic() - begun > 2 * bench.system.shape.dead_s:
            send(reversed(victims), signal.SIGCONT)
            still = False
        return still

    account = bench.collect(begun, meanwhile=go_on)
    # What it ran when it was stopped ends now, and is written down before its parts end.
    time.sleep(1.0 + bench.sizes.task_s)
    return account


def broker_killed(bench: Bench) -> Account:
    bench.under_way()
    begun = time.monotonic()
    bench.system.kill_broker()
    time.sleep(DOWN_S)
    bench.system.restart_broker()
    return bench.collect(begun)


def sole_copy_lost(bench: Bench) -> Account:
    """The worker that holds values, which nobody has fetched, is killed; then they are needed."""
    audit, nbytes = str(bench.audit.path), bench.sizes.nbytes
    system = bench.system
    n = max(4, bench.sizes.n // 4)
    kept = {
        f"p-{number}": system.submit_kept(tasks.block, audit, f"p-{number}", nbytes)
        for number in range(n)
    }
    bench.wait(lambda: all(map(system.is_done, kept.values())))
    victims = system.worker_of(bench.audit.where("p-0"))
    lost = {name for name in kept if bench.audit.where(name) in victims}
    begun = time.monotonic()
    send(victims, signal.SIGKILL)
    for name, future in kept.items():
        user = f"use-{name}"
        bench.futures[user] = system.submit(tasks.digest_of, audit, user, future)

    def right(user: str) -> str:
        data = tasks.content(user.removeprefix("use-"), nbytes)
        return hashlib.sha256(data).hexdigest()

    account = bench.collect(begun, right)
    # Those that were lost have to be made again; the others need not.
    ended = bench.audit.count("ended", "p")
    account.twice = sum(1 for name, times in ended.items() if times > 1 + (name in lost))
    return account


def poison(bench: Bench) -> Account:
    names = [f"p-{number}" for number in range(bench.sizes.n)]
    bench.pieces(names[::2])
    begun = time.monotonic()
    poisonous = bench.system.submit(tasks.poison, str(bench.audit.path), "poison")
    bench.pieces(names[1::2])
    return bench.collect(begun, must_fail={"poison": poisonous})


def cancelled(bench: Bench) -> Account:
    audit = str(bench.audit.path)
    loop = bench.system.submit(tasks.endless, audit, "endless")
    bench.wait(lambda: bench.audit.count("began", "endless"))
    begun = time.monotonic()
    bench.system.cancel(loop)
    bench.pieces(["p-next"])
    return bench.collect(begun)


def limited(bench: Bench) -> Account:
    return _limited(bench, tasks.endless)


def limited_in_c(bench: Bench) -> Account:
    return _limited(bench, tasks.endless_in_c)


def client_cut(bench: Bench) -> Account:
    return _cut(bench)


def workers_cut(bench: Bench) -> Account:
    return _cut(bench)


def garbage_at_port(bench: Bench) -> Account:
    bench.under_way()
    begun = time.monotonic()
    throw = threading.Thread(
        target=garbage.throw, args=(bench.system.port, bench.sizes.n_garbage), daemon=True
    )
    throw.start()
    return bench.collect(begun, meanwhile=throw.is_alive)


def _limited(bench: Bench, fn: Callable[..., object]) -> Account:
    """The slot's next task is done at the limit; time counts from there."""
    audit = str(bench.audit.path)
    loop = bench.system.submit_limited(LIMIT_S, fn, audit, "endless")
    bench.wait(lambda: bench.audit.count("began", "endless"))
    begun = time.monotonic()
    bench.pieces(["p-next"])
    return bench.collect(begun + LIMIT_S, must_fail={"endless": loop})


def _cut(bench: Bench) -> Account:
    bench.under_way()
    begun = time.monotonic()
    assert bench.system.proxy is not None
    bench.system.proxy.cut()
    return bench.collect(begun)


ONE = Shape(n_workers=1, slots=1)


@dataclass(frozen=True, slots=True)
class Case:
    """title: its row in the tables."""

    name: str
    title: str
    run: Callable[[Bench], Account]
    shape: Shape = Shape()


CASES = {
    case.name: case
    for case in (
        Case("none", "no fault", nothing),
        Case("slot", "process killed that runs a task", slot_killed),
        Case("worker", "worker killed, all its processes", worker_killed),
        Case("stop", "worker stopped for 2 × its dead time", worker_stopped),
        Case("broker", "broker killed, started again 1 s later", broker_killed),
        Case("copy", "sole copies of values lost", sole_copy_lost),
        Case("poison", "task that kills its process, among others", poison),
        Case("cancel", "cancel of an endless loop", cancelled, ONE),
        Case("limit", "time limit of an endless loop", limited, ONE),
        Case("limit-c", "time limit of an endless call in C", limited_in_c, ONE),
        Case("client-cut", "client's connection cut", client_cut, Shape(proxied="client")),
        Case("workers-cut", "workers' connections cut", workers_cut, Shape(proxied="workers")),
        Case("garbage", "garbage at the listening port", garbage_at_port),
    )
}
