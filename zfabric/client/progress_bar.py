"""`progress(futures)`: a bar in the terminal, a line where output is piped, HTML in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, NamedTuple, TextIO

from zfabric.client.future import FAILED, Future
from zfabric.client.waiting import futures_of, sleep_until
from zfabric.core.submitter import PENDING

WIDTH = 40
"""Characters of the bar."""


class Count(NamedTuple):
    """How far a set of tasks is."""

    done: int
    failed: int
    total: int
    elapsed_s: float


def progress(
    futures: Any,
    *,
    notebook: bool | None = None,
    interval_s: float = 0.1,
    file: TextIO | None = None,
) -> None:
    """Show how far these futures are (nested as you like) until all have ended.

    notebook: show HTML; None finds out by itself.  interval_s: seconds between two looks.
    file: where the bar goes, default stderr. Where that is no terminal, one line at the end.
    """
    flat = futures_of(futures, "progress()")
    if notebook is None:
        notebook = _in_notebook()
    show: Callable[[Count], None]
    if notebook:
        show = _Notebook()
    else:
        show = _Terminal(file or sys.stderr)
    began = monotonic()
    pending = flat
    while True:
        pending = [f for f in pending if f._outcome.status == PENDING]
        show(_count(flat, len(pending), monotonic() - began))
        if not pending:
            return
        # Rather the last one: a look per interval is enough, a wake-up per task is not.
        sleep_until(pending[-1]._client, pending[-1]._outcome, monotonic() + interval_s)


def _count(flat: Sequence[Future], n_pending: int, elapsed_s: float) -> Count:
    failed = sum(f._outcome.status in FAILED for f in flat)
    return Count(len(flat) - n_pending, failed, len(flat), elapsed_s)


def bar_text(count: Count) -> str:
    """[######      ]  50% 5/10 1.2 s, 1 failed"""
    share = count.done / count.total if count.total else 1.0
    filled = int(WIDTH * share)
    failed = f", {count.failed} failed" if count.failed else ""
    return (
        f"[{'#' * filled}{' ' * (WIDTH - filled)}] {share:4.0%}"
        f" {count.done}/{count.total} {count.elapsed_s:.1f} s{failed}"
    )


class _Terminal:
    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._live = file.isatty()
        self._width = 0

    def __call__(self, count: Count) -> None:
        text = bar_text(count)
        last = count.done == count.total
        if self._live:
            # Spaces wipe what a longer text before has left.
            self._file.write("\r" + text.ljust(self._width) + ("\n" if last else ""))
            self._width = len(text)
        elif last:
            self._file.write(text + "\n")
        self._file.flush()


class _Notebook:
    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self, count: Count) -> None:
        from IPython.display import HTML, display  # type: ignore[import-not-found]

        share = count.done / count.total if count.total else 1.0
        text = bar_text(count).partition("] ")[2]
        html = HTML(f'<progress value="{share:.3f}" max="1"></progress> <code>{text}</code>')
        if self._handle is None:
            self._handle = display(html, display_id=True)
        else:
            self._handle.update(html)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
