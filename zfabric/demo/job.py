"""The driving of the main job, on a fabric or in a plain loop, with the same answer.

On the fabric: one task per file; a tree of `merge` tasks above them, each submitted with futures
as its arguments, so no summary passes through this process but the last; one `as_completed` loop
over all of it. When the root of the tree arrives, the loop adds a task for each of the most
complex files and goes on until those are done too.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from zfabric.demo.analysis import FunctionFigures, Summary, analyse, merge, rank_functions

if TYPE_CHECKING:
    from zfabric.client import Client, Future

FAN_IN = 8
"""Summaries per merge: a wide tree has few inner tasks, a narrow one waits less for stragglers."""

Watcher = Callable[[int, int], None]
"""Called with (tasks done, tasks in all) whenever either changes."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer, which does not depend on where it was computed, and what it took."""

    summary: Summary
    functions: dict[str, tuple[FunctionFigures, ...]]
    """Path of each of the hardest files to its most complex functions."""
    tasks: int
    seconds: float

    def answer(self) -> tuple[Summary, dict[str, tuple[FunctionFigures, ...]]]:
        """What a serial run must equal."""
        return self.summary, self.functions


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def find_sources(folder: Path) -> list[str]:
    """Every `.py` file below a folder, sorted. Raises NotADirectoryError.

    Installed packages are not the standard library, even where they live inside of it.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    packages = {"site-packages", "dist-packages"}
    return sorted(
        str(path)
        for path in folder.rglob("*.py")
        if path.is_file() and not packages.intersection(path.relative_to(folder).parts)
    )


def run_serial(files: Sequence[str], watch: Watcher = lambda done, total: None) -> Outcome:
    """The job as a plain loop in this process."""
    began = perf_counter()
    parts = []
    for n, path in enumerate(files, 1):
        parts.append(analyse(path))
        watch(n, len(files))
    merges = 0
    while len(parts) > 1:
        parts = [merge(*group) for group in groups_of(FAN_IN, parts)]
        merges += len(parts)
    summary = parts[0] if parts else Summary()
    functions = {file.path: rank_functions(file.path) for file in summary.hardest}
    tasks = len(files) + merges + len(functions)
    return Outcome(summary, functions, tasks, perf_counter() - began)


def run_on(
    client: Client, files: Sequence[str], watch: Watcher = lambda done, total: None
) -> Outcome:
    """The job on a fabric. The workers read the files themselves, under the same paths."""
    from zfabric.client import as_completed

    began = perf_counter()
    if not files:
        return Outcome(Summary(), {}, 0, perf_counter() - began)
    leaves: list[Future] = client.map(analyse, files)
    inner, root = merge_tree(client.submit, leaves)

    completed = as_completed([*leaves, *inner])
    total = len(leaves) + len(inner)
    follow_ups: dict[Any, str] = {}
    summary, functions = Summary(), {}
    for done, future in enumerate(completed, 1):
        if future is root:
            summary = future.result()
            for file in summary.hardest:
                follow_up = client.submit(rank_functions, file.path)
                follow_ups[follow_up] = file.path
                completed.add(follow_up)
            total += len(summary.hardest)
        elif future in follow_ups:
            functions[follow_ups[future]] = future.result()
        watch(done, total)
    return Outcome(summary, functions, total, perf_counter() - began)


def merge_tree(submit: Callable[..., Any], leaves: Sequence[Any]) -> tuple[list[Any], Any]:
    """Submits merges of `FAN_IN` until one is left. Returns (all inner tasks, the root)."""
    inner: list[Any] = []
    level = list(leaves)
    while len(level) > 1:
        level = list(map(partial(_submit_merge, submit), groups_of(FAN_IN, level)))
        inner += level
    return inner, level[0]


def _submit_merge(submit: Callable[..., Any], group: Sequence[Any]) -> Any:
    return submit(merge, *group)


def groups_of(size: int, items: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """Neighbours in groups of `size`; the last may be smaller."""
    return (items[at : at + size] for at in range(0, len(items), size))
