"""Work of every kind, each piece checked, by several users at once, for as long as asked.

A wrong value, a lost task and a hang all end in an exception of the user that met it, with what
the broker knew at that moment.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

import zfabric
from zfabric.errors import KilledTask, TaskCancelled

PATIENCE_S = 60.0


def add(*numbers: int) -> int:
    return sum(numbers)


def boom(text: str) -> None:
    raise ValueError(text)


def die() -> None:
    os._exit(3)


def total(array: np.ndarray) -> int:
    return int(array.sum())


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def fibonacci(n: int) -> int:
    if n < 2:
        return n
    client = zfabric.get_client()
    a, b = client.submit(fibonacci, n - 1), client.submit(fibonacci, n - 2)
    return int(a.result() + b.result())


def do_map(client: Any, rng: random.Random) -> None:
    n = rng.randrange(1, 3000)
    got = client.gather(client.map(abs, range(-n, 0)))
    wrong = [(i, g, w) for i, (g, w) in enumerate(zip(got, range(n, 0, -1))) if g != w]
    assert len(got) == n and not wrong, wrong[:5]


def do_chain(client: Any, rng: random.Random) -> None:
    n = rng.randrange(1, 300)
    last = client.submit(add, 0)
    for _ in range(n):
        last = client.submit(add, last, 1)
    assert last.result(PATIENCE_S) == n


def do_tree(client: Any, rng: random.Random) -> None:
    level = client.map(add, range(64))
    while len(level) > 1:
        level = [client.submit(add, a, b) for a, b in zip(level[::2], level[1::2])]
    assert level[0].result(PATIENCE_S) == 2016


def do_errors(client: Any, rng: random.Random) -> None:
    failed = client.submit(boom, "a text")
    for future in (failed, client.submit(add, failed, 1)):
        try:
            future.result(PATIENCE_S)
        except ValueError as exc:
            assert str(exc) == "a text"
        else:
            raise AssertionError("an error was lost")


def do_poison(client: Any, rng: random.Random) -> None:
    try:
        client.submit(die).result(PATIENCE_S)
    except KilledTask as exc:
        assert len(exc.attempts) >= 3  # and one more per worker that was lost with it
    else:
        raise AssertionError("a task that kills its process gave a value")


def do_arrays(client: Any, rng: random.Random) -> None:
    n = rng.randrange(1, 300_000)
    array = client.submit(np.arange, n)
    assert client.submit(total, array).result(PATIENCE_S) == n * (n - 1) // 2
    if rng.random() < 0.3:
        assert len(array.result(PATIENCE_S)) == n


def do_nested(client: Any, rng: random.Random) -> None:
    n = rng.randrange(1, 6)
    assert client.submit(fibonacci, n).result(PATIENCE_S) == [0, 1, 1, 2, 3, 5][n]


def do_cancel(client: Any, rng: random.Random) -> None:
    futures = client.map(sleep, [0.01] * 20)
    client.cancel(futures[rng.randrange(20) :])
    for future in futures:
        try:
            assert future.result(PATIENCE_S) == 0.01
        except TaskCancelled:
            assert future.cancelled()


def do_follow_up(client: Any, rng: random.Random) -> None:
    done = zfabric.as_completed(client.map(add, range(20)))
    seen = 0
    for future in done:
        seen += 1
        if seen <= 20:
            done.add(client.submit(add, future, 1))
    assert seen == 40


def do_forget(client: Any, rng: random.Random) -> None:
    client.map(add, range(500))


KINDS: list[Callable[[Any, random.Random], None]] = [
    do_map,
    do_chain,
    do_tree,
    do_errors,
    do_poison,
    do_arrays,
    do_nested,
    do_cancel,
    do_follow_up,
    do_forget,
]


class User(threading.Thread):
    """Does one thing after the other. done: how often each; error: what went wrong, if anything."""

    def __init__(self, client: Any, seed: int, until: float) -> None:
        super().__init__(name=f"user-{seed}", daemon=True)
        self.done: Counter[str] = Counter()
        self.error: BaseException | None = None
        self._client = client
        self._rng = random.Random(seed)
        self._until = until

    def run(self) -> None:
        while time.monotonic() < self._until and self.error is None:
            kind = self._rng.choice(KINDS)
            try:
                kind(self._client, self._rng)
            except BaseException as exc:
                exc.add_note(f"in {kind.__name__}; the broker says {self._client.info()}")
                self.error = exc
            self.done[kind.__name__] += 1


def is_empty(info: dict[str, Any]) -> bool:
    """Whether the broker holds no task of anybody, and no worker a value."""
    tasks = info["tasks"]
    held = ("waiting", "ready", "running", "finished", "failed", "released")
    return not any(tasks[name] for name in held) and not any(
        worker["values"] for worker in info["workers"]
    )
