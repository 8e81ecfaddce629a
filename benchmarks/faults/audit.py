"""The lines that tasks leave: what began and ended, how often, and where."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


class Audit:
    """A file that each task appends to. Read anew at each question: it is short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def lines(self) -> list[tuple[str, str, int]]:
        """(name, "began" or "ended", process id), in the order of writing."""
        found = []
        for line in self.path.read_text().split("\n")[:-1]:
            name, what, pid = line.split()
            found.append((name, what, int(pid)))
        return found

    def running(self) -> list[tuple[str, int]]:
        """(name, process id) of what began and has not ended there, the latest last."""
        found = dict.fromkeys((name, pid) for name, what, pid in self.lines() if what == "began")
        for name, what, pid in self.lines():
            if what == "ended":
                found.pop((name, pid), None)
        return list(found)

    def count(self, what: str, prefix: str = "") -> Counter[str]:
        """How often each began, or ended."""
        return Counter(n for n, w, _ in self.lines() if w == what and n.startswith(prefix))

    def processes(self) -> set[int]:
        """Where something began."""
        return {pid for _, what, pid in self.lines() if what == "began"}

    def where(self, name: str) -> int:
        """The process in which it ended last; 0: nowhere."""
        return next((p for n, w, p in reversed(self.lines()) if n == name and w == "ended"), 0)
