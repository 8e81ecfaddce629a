"""What several commands have in common: parsing, logging, text that any terminal takes."""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import click

LOG_LEVELS = click.Choice(["debug", "info", "warning", "error"], case_sensitive=False)

log_level = click.option(
    "--log-level",
    type=LOG_LEVELS,
    default="info",
    show_default=True,
    help="What to log to stderr.",
)


class Size(click.ParamType):
    """`500M` or `2G` as bytes; powers of 1024."""

    name = "BYTES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().upper().removesuffix("B").removesuffix("I")
        unit = "KMGT".find(text[-1:]) + 1 if text else 0
        try:
            nbytes = float(text[:-1] if unit else text) * 1024**unit
        except ValueError:
            nbytes = 0.0
        if not 0 < nbytes < 2**60:
            self.fail(f"{value!r} is no number of bytes, as 500M or 2G", param, ctx)
        return int(nbytes)


class Resources(click.ParamType):
    """`GPU=1,memory=16e9` as a dict of floats."""

    name = "NAME=AMOUNT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, float]:
        if isinstance(value, dict):
            return value
        amounts: dict[str, float] = {}
        for item in filter(None, str(value).split(",")):
            name, _, text = item.partition("=")
            try:
                amount = float(text) if text else 1.0
            except ValueError:
                self.fail(f"{item!r} is not NAME=AMOUNT, as in GPU=2", param, ctx)
            if not name.strip() or not 0 <= amount < float("inf"):
                self.fail(f"{item!r} is not NAME=AMOUNT with an amount of 0 or more", param, ctx)
            amounts[name.strip()] = amount
        return amounts


def merged(several: tuple[dict[str, float], ...]) -> dict[str, float]:
    """Of an option given more than once: all amounts; the last one of a name counts."""
    return {name: amount for amounts in several for name, amount in amounts.items()}


def joining(address: str) -> str:
    """The address as given, or the line on stdin for `-`: a secret there is in no list of
    processes."""
    return sys.stdin.readline().strip() if address == "-" else address


def start_logging(level: str) -> None:
    """Logs lines with time, level and text to stderr, from zfabric only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("zfabric")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints, with an escape for each character that the stream's encoding lacks."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "ascii"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()
