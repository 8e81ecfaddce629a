"""One soak: faults by a seed, then the accounts."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from zfabric.testing.chaos import stopped
from zfabric.testing.soak.fabric import Fabric, size_of

FAULTS = ("slot kill", "worker kill", "worker stop", "broker kill", "cut", "freeze")
COUNTS = ("lost", "wrong", "twice", "hung")
WARM_UP_S = 3.0
GROWTH_BYTES = 128 << 20
GROWTH_DESCRIPTORS = 32


def soak(
    seconds: float, seed: int, *, every_s: float = 3.0, faults: Sequence[str] = FAULTS
) -> dict[str, Any]:
    """Runs for about `seconds` and gives the accounts; "failures" is empty when all is well.

    every_s: between two faults, on average.  faults: which of `FAULTS` may come.
    """
    with tempfile.TemporaryDirectory(prefix="zfabric-soak-") as name:
        fabric = Fabric(Path(name), seed)
        try:
            report = _run(fabric, seconds, Random(seed), every_s, faults)
        finally:
            slots = fabric.slots()
            fabric.close()
        deadline = time.monotonic() + 10.0
        while (left := [pid for pid in slots if _is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            report["failures"].append(f"slots left behind: {left}")
        return {"seed": seed, "seconds": seconds, **report}


def _run(
    fabric: Fabric, seconds: float, random: Random, every_s: float, faults: Sequence[str]
) -> dict[str, Any]:
    failures: list[str] = []
    for user in fabric.users:
        if user.wait_for("ended", 40.0) is None:
            raise RuntimeError("a user did not begin")
    time.sleep(WARM_UP_S)
    sizes = {pid: size_of(pid) for pid in _lasting(fabric)}
    end = time.monotonic() + seconds - WARM_UP_S
    injected: list[tuple[str, float]] = []
    plan: list[str] = []
    while time.monotonic() < end:
        if not plan:  # each kind comes once before any comes again
            plan = random.sample(list(faults), len(faults))
        fault = plan.pop()
        injected.append((fault, time.monotonic()))
        _inject(fabric, fault, random)
        time.sleep(random.uniform(0.5, 1.5) * every_s)
    for user in fabric.users:
        user.tell("stop")
    for user in fabric.users:
        if user.wait_for("stopped", 90.0) is None:
            failures.append("a user did not stop")
    for user in fabric.users:
        user.tell("empty")
        answer = user.wait_for("empty", 30.0)
        if answer is None or not answer["empty"]:
            failures.append(f"tables not empty: {answer}")
            break
    failures += _growth(fabric, sizes)
    works = [[line for line in user.lines if "ended" in line] for user in fabric.users]
    flat = [line for user in works for line in user]
    counts = {kind: sum(line[kind] for line in flat) for kind in COUNTS}
    runs = Counter(
        line.split()[0] for line in (fabric.directory / "audit").read_text().split("\n")[:-1]
    )
    taken = Counter(name for line in flat for name in line["ids"])
    counts["lost"] += sum(1 for name in taken if name not in runs)
    counts["twice"] += sum(1 for n in taken.values() if n > 1)
    failures += [f"{n} {kind}" for kind, n in counts.items() if n]
    failures += [line["why"] for line in flat if line["why"]]
    kinds = Counter(line["kind"] for line in flat)
    return {
        "counts": counts,
        "work": dict(kinds),
        "results": len(taken),
        "ran_again": sum(n - 1 for n in runs.values()),
        "faults": _recoveries(injected, works, kinds),
        "failures": failures,
    }


def _inject(fabric: Fabric, fault: str, random: Random) -> None:
    n = random.randrange(3)
    worker = fabric.workers[n]
    if fault == "slot kill":
        if slots := fabric.slots():
            os.kill(random.choice(slots), signal.SIGKILL)
    elif fault == "worker kill":
        worker.kill()
        worker.wait()
        fabric.workers[n] = fabric.start_worker(n)
    elif fault == "worker stop":
        with stopped(worker.pid):
            time.sleep(random.uniform(0.5, 2.0))
    elif fault == "broker kill":
        fabric.broker.kill()
        fabric.broker.wait()
        fabric.broker = fabric.start_broker()
    elif fault == "cut":
        fabric.proxy.cut()
    else:
        fabric.proxy.freeze()
        time.sleep(random.uniform(0.5, 2.0))
        fabric.proxy.thaw()


def _lasting(fabric: Fabric) -> list[int]:
    return [p.pid for p in (fabric.broker, *(user.process for user in fabric.users))]


def _growth(fabric: Fabric, before: dict[int, tuple[int, int]]) -> list[str]:
    """What the users, and the broker if it is still the same, have kept."""
    found = []
    for pid in before.keys() & set(_lasting(fabric)):
        if not _is_alive(pid):
            found.append(f"process {pid} has ended")
            continue
        size, descriptors = size_of(pid)
        if size > before[pid][0] + GROWTH_BYTES:
            found.append(f"process {pid} grew from {before[pid][0]} to {size} bytes")
        if descriptors > before[pid][1] + GROWTH_DESCRIPTORS:
            found.append(f"process {pid} had {before[pid][1]} descriptors, now {descriptors}")
    return found


def _recoveries(
    injected: list[tuple[str, float]], works: list[list[dict[str, Any]]], kinds: Counter[str]
) -> dict[str, dict[str, Any]]:
    """Per fault: how often, and the longest time until every user had begun and ended new work."""
    table: dict[str, dict[str, Any]] = {
        fault: {"injected": 0, "longest_s": None} for fault in FAULTS
    }
    table["cancel of running work"] = {"injected": kinds["cancel"], "longest_s": None}
    table["lock holder death"] = {"injected": kinds["locks"], "longest_s": None}
    for fault, at in injected:
        row = table[fault]
        row["injected"] += 1
        ends = [next((w["ended"] for w in work if w["began"] >= at), None) for work in works]
        if None not in ends:
            row["longest_s"] = round(max(row["longest_s"] or 0.0, max(ends) - at), 2)
    for name, kind in (("cancel of running work", "cancel"), ("lock holder death", "locks")):
        spans = [w["ended"] - w["began"] for work in works for w in work if w["kind"] == kind]
        table[name]["longest_s"] = round(max(spans), 2) if spans else None
    return table


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
