"""Tasks under way, and the account of what became of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.faults import tasks
from benchmarks.faults.audit import Audit
from benchmarks.faults.systems import System

PAUSE_S = 0.01
"""Between two looks at the futures."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """n: tasks under way.  task_s: what each takes.  hung_s: seconds without a single new answer
    after which those that miss are counted as hung.  nbytes: of a large value."""

    n: int = 40
    task_s: float = 0.25
    hung_s: float = 30.0
    nbytes: int = 1_000_000
    n_garbage: int = 200


QUICK = Sizes(n=12, task_s=0.1, nbytes=100_000, n_garbage=40)


@dataclass(slots=True)
class Account:
    """What became of `n` tasks.

    lost: ended in an error that is none of theirs.  wrong: another value than theirs.  twice: ran
    to their end more than once.  hung: no end at all.  recovery_s: from the fault until the last
    answer was here; None when one was lost or hung.  goes_on: whether the same client had new work
    done afterwards; None: not asked.  verb: "" or what the system cannot say.
    """

    n: int = 0
    lost: int = 0
    wrong: int = 0
    twice: int = 0
    hung: int = 0
    recovery_s: float | None = None
    goes_on: bool | None = None
    verb: str = ""
    errors: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """A system, the audit file of its tasks, and how much is to be done."""

    def __init__(self, system: System, sizes: Sizes) -> None:
        self.system = system
        self.sizes = sizes
        self.audit = Audit(system.directory / "audit")
        self.futures: dict[str, Any] = {}
        self._gate = system.directory / "gate"

    def warm_up(self, timeout_s: float = 60.0) -> None:
        """Until each process that runs tasks has run one; TimeoutError when that takes too long."""
        wanted = self.system.shape.n_workers * self.system.shape.slots
        deadline, number = time.monotonic() + timeout_s, 0
        while len(self.audit.processes()) < wanted:
            names = [f"warm-{number + n}" for n in range(2 * wanted)]
            number += len(names)
            found = [self._submit(tasks.piece, name, 0.05) for name in names]
            while not all(map(self.system.is_done, found)):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"fewer than {wanted} processes run tasks")
                time.sleep(PAUSE_S)
        self.futures.clear()

    def pieces(self, names: Iterable[str], *, gated: bool = False) -> None:
        """Tasks more under way.  gated: they end only after the fault, when `collect` begins."""
        gate = str(self._gate) if gated else ""
        for name in names:
            self.futures[name] = self._submit(tasks.piece, name, self.sizes.task_s, gate)

    def under_way(self) -> int:
        """A few are done and their answers taken, then n wait or run: a process in which one runs.

        Taken, so that what is lost with the fault was all under way then."""
        n, system = self.sizes.n, self.system
        self.pieces([f"p-before-{number}" for number in range(n // 4)])
        self.wait(lambda: all(map(system.is_done, self.futures.values())))
        for future in self.futures.values():
            system.take(future, 10.0)
        self.futures.clear()
        self.pieces([f"p-{number}" for number in range(n)], gated=True)
        return int(self.wait(self.audit.running)[0][1])

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Until it is true; TimeoutError when that takes longer than being hung does."""
        deadline = time.monotonic() + self.sizes.hung_s
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError("what the fault needs did not come about")
            time.sleep(0.002)
        return found

    def collect(
        self,
        since: float,
        right: Callable[[str], Any] = tasks.answer,
        *,
        must_fail: Mapping[str, Any] | None = None,
        meanwhile: Callable[[], bool] = lambda: False,
    ) -> Account:
        """Take what comes, until all is here or nothing has come for `hung_s`.

        right: the value of each.  must_fail: more futures, that have to end in an error.
        meanwhile: called each turn; true while the fault goes on, and nobody counts as hung.
        """
        self._gate.touch()
        ends_badly = must_fail or {}
        pending = {**self.futures, **ends_badly}
        account = Account(n=len(pending))
        last = time.monotonic()
        while pending:
            if meanwhile():
                last = time.monotonic()
            self.system.keep_workers()
            for name in [name for name in pending if self.system.is_done(pending[name])]:
                try:
                    value = self.system.take(pending[name], 2.0)
                except Exception as error:
                    if name not in ends_badly:
                        if isinstance(error, TimeoutError):
                            continue  # its value is still to come
                        account.lost += 1
                        account.errors.append(f"{name}: {type(error).__name__}: {error}"[:300])
                else:
                    if name in ends_badly or value != right(name):
                        account.wrong += 1
                        account.errors.append(f"{name} is {value!r}"[:300])
                del pending[name]
                last = time.monotonic()
            if time.monotonic() - last > self.sizes.hung_s:
                break
            time.sleep(PAUSE_S)
        account.hung = len(pending)
        account.errors += [f"{name}: no end" for name in pending]
        if not account.lost and not account.hung:
            account.recovery_s = last - since
        while meanwhile():
            time.sleep(PAUSE_S)
        return account

    def goes_on(self) -> bool:
        """Whether the same client has a new task done within `hung_s`; one that fails, as while a
        client still dials, is followed by another."""
        deadline = time.monotonic() + self.sizes.hung_s
        while time.monotonic() < deadline:
            try:
                future = self._submit(tasks.piece, "next", 0.0)
                while not self.system.is_done(future) and time.monotonic() < deadline:
                    self.system.keep_workers()
                    time.sleep(PAUSE_S)
                return bool(self.system.take(future, 2.0) == tasks.answer("next"))
            except Exception:
                time.sleep(PAUSE_S)
        return False

    def count_twice(self, prefix: str = "p") -> int:
        """Tasks that ran to their end more than once."""
        return sum(1 for n in self.audit.count("ended", prefix).values() if n > 1)

    def _submit(self, fn: Callable[..., Any], name: str, *args: Any) -> Any:
        return self.system.submit(fn, str(self.audit.path), name, *args)
