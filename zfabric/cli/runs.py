"""`zfabric runs`: the named runs at a broker."""

from __future__ import annotations

import click

from zfabric.cli.options import joining, say


@click.group(short_help="List named runs, or end one.")
def runs() -> None:
    """Named runs, which outlive the clients that began them."""


@runs.command("list", short_help="Show all runs.")
@click.argument("address", envvar="ZFABRIC_ADDRESS")
def list_runs(address: str) -> None:
    """Show the runs of the fabric at ADDRESS: who holds each, and its tasks."""
    from zfabric.client import Client

    with Client(joining(address)) as client:
        found = client.runs()
    if not found:
        say("no runs")
        return
    say(f"{'run':<32}{'tasks':>8}{'unfinished':>12}  holder")
    for run in found:
        holder = f"{run['holder']} (pid {run['pid']} on {run['host']})"
        held = holder if run["holder"] else f"nobody for {run['left_s']:.0f} s"
        say(f"{run['name']:<32}{run['tasks']:>8}{run['unfinished']:>12}  {held}")


@runs.command("end", short_help="Forget a run and its tasks.")
@click.argument("name")
@click.argument("address", envvar="ZFABRIC_ADDRESS")
def end_run(name: str, address: str) -> None:
    """Forget the run NAME, with its tasks and their results, if nobody holds it."""
    from zfabric.client import Client

    with Client(joining(address)) as client:
        client.end_run(name)
