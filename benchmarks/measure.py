"""Samples and their spread, and the machine that they were taken on."""

from __future__ import annotations

import os
import platform
import signal
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import zfabric


@dataclass(slots=True)
class Series:
    """One figure of one peer, once per round."""

    peer: str
    workload: str
    metric: str
    unit: str
    higher_is_better: bool
    values: list[float] = field(default_factory=list)
    n: int = 0
    """Size of the workload in the last round: tasks, links, or calls."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def as_json(self) -> dict[str, Any]:
        return {
            "peer": self.peer,
            "workload": self.workload,
            "metric": self.metric,
            "unit": self.unit,
            "n": self.n,
            "min": min(self.values),
            "median": self.median,
            "max": max(self.values),
            "values": self.values,
        }


class Results:
    """All series of a run, in the order of their first sample."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str, str], Series] = {}
        self.failures: list[tuple[str, str, str]] = []
        """(peer, workload, what happened)."""

    def add(
        self,
        peer: str,
        workload: str,
        metric: str,
        value: float,
        unit: str,
        n: int,
        *,
        higher_is_better: bool = False,
    ) -> None:
        """One sample; samples of one (peer, workload, metric) are the rounds of one series."""
        key = (peer, workload, metric)
        series = self._series.get(key)
        if series is None:
            series = Series(peer, workload, metric, unit, higher_is_better)
            self._series[key] = series
        series.values.append(value)
        series.n = n

    def fail(self, peer: str, workload: str, error: BaseException) -> None:
        self.failures.append((peer, workload, f"{type(error).__name__}: {error}"))

    def get(self, peer: str, workload: str, metric: str) -> Series | None:
        return self._series.get((peer, workload, metric))

    def __iter__(self) -> Iterator[Series]:
        return iter(self._series.values())

    def rows(self) -> dict[tuple[str, str], list[Series]]:
        """Series of one (workload, metric) together, in order of first appearance."""
        rows: dict[tuple[str, str], list[Series]] = {}
        for series in self._series.values():
            rows.setdefault((series.workload, series.metric), []).append(series)
        return rows


class Overdue(Exception):
    """A measurement took much longer than it should; the peer may hang."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises Overdue in the main thread when the block takes longer. Not to be nested."""

    def ring(number: int, frame: object) -> None:
        raise Overdue(f"no end after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def quantile(sorted_values: Sequence[float], q: float) -> float:
    """The value at share q of a sorted, non-empty sequence; nearest rank."""
    return sorted_values[min(len(sorted_values) - 1, int(q * len(sorted_values)))]


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """The machine, the interpreter, and the version of each package that is installed."""
    versions = {"zfabric": zfabric.__version__}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
