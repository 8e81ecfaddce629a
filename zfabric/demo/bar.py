"""A progress bar on one line of a terminal; silent where nobody looks."""

from __future__ import annotations

import shutil
from time import monotonic
from typing import TextIO


class Bar:
    """Call it with (done, total). Draws at most ten times a second, and always the last step.

    Writes nothing unless `stream` is a terminal, so a pipe or a log gets no control characters.
    """

    def __init__(self, stream: TextIO, title: str) -> None:
        self._stream = stream
        self._title = title
        self._began = monotonic()
        self._next_s = 0.0
        self._width = min(80, shutil.get_terminal_size().columns) - 1
        self._shown = stream.isatty()
        self._full, self._empty = ("█", "░") if can_print("█░", stream) else ("#", ".")

    def __call__(self, done: int, total: int) -> None:
        now = monotonic()
        if not self._shown or (now < self._next_s and done < total):
            return
        self._next_s = now + 0.1
        self._stream.write("\r" + self.line(done, total, now - self._began))
        self._stream.flush()

    def line(self, done: int, total: int, seconds: float) -> str:
        """The bar as text, exactly as wide as the terminal or 79 columns."""
        share = done / total if total else 1.0
        rate = done / seconds if seconds > 0 else 0.0
        tail = f" {share:4.0%}  {done:,}/{total:,} tasks  {rate:,.0f}/s"
        room = max(self._width - len(self._title) - len(tail) - 1, 5)
        full = int(share * room)
        text = f"{self._title} {self._full * full}{self._empty * (room - full)}{tail}"
        return text[: self._width].ljust(self._width)

    def clear(self) -> None:
        """Leaves an empty line for what is printed next."""
        if self._shown:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()


def can_print(text: str, stream: TextIO) -> bool:
    """Whether the stream's encoding has these characters."""
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
