"""`zfabric links`: how fast values move between whom, and what compressing them brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from zfabric.cli.options import say


@click.command(short_help="Show the links over which values move.")
@click.argument("address", envvar="ZFABRIC_ADDRESS")
@click.option("--json", "as_json", is_flag=True, help="Everything that is known, as JSON.")
def links(address: str, as_json: bool) -> None:
    """Show the links of the fabric at ADDRESS as its workers have measured them.

    \b
    MB/s    as the receiver sees them arrive, compressed bytes counted as such
    ratio   bytes on the wire / bytes of the values
    saved   seconds of the link, less what compressing has cost
    """
    from zfabric.client import Client

    with Client(address) as client:
        found = client.links()
    if as_json:
        import json

        say(json.dumps(found, indent=2))
    else:
        say(render(found))


def render(found: Sequence[dict[str, Any]]) -> str:
    """The links as a table; those that moved nothing are left out."""
    from zfabric.demo.table import bytes_text

    rows = [link for link in found if link["raw_nbytes"]]
    if not rows:
        return "no values have moved between hosts or processes yet"
    lines = [
        f"{'at':<18}{'':<4}{'peer':<30}{'moved':>11}{'MB/s':>8}{'ratio':>7}{'saved':>9}  verdicts"
    ]
    for link in rows:
        verdicts = ", ".join(f"{n} {name}" for name, n in sorted(link["verdicts"].items()) if n)
        rate = f"{link['rate'] / 1e6:.1f}" if link["rate"] else "-"
        way = "<-" if link["direction"] == "in" else "->"
        lines.append(
            f"{link['at'][:17]:<18}{way:<4}{link['peer_name'][:29]:<30}"
            f"{bytes_text(link['raw_nbytes']):>11}{rate:>8}"
            f"{link['wire_nbytes'] / link['raw_nbytes']:>7.2f}{link['saved_s']:>8.2f}s  {verdicts}"
        )
    return "\n".join(lines)
