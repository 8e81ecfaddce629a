"""`zfabric status`: who is there and what runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from zfabric.cli.options import joining, say


@click.command(short_help="Show a fabric's workers and tasks.")
@click.argument("address", envvar="ZFABRIC_ADDRESS")
@click.option("--json", "as_json", is_flag=True, help="Everything the broker says, as JSON.")
def status(address: str, as_json: bool) -> None:
    """Show the workers and tasks of the fabric at ADDRESS.

    \b
    zfabric status tcp://127.0.0.1:8787
    zfabric status tcp://127.0.0.1:8787 --json | jq .tasks
    """
    from zfabric.client import Client

    with Client(joining(address)) as client:
        address = client.address
        info = client.info()
    if as_json:
        import json

        say(json.dumps(info, indent=2, default=str))
    else:
        say(render(address, info))


def render(address: str, info: Mapping[str, Any]) -> str:
    """The broker's answer as text within 80 columns."""
    from zfabric.demo.table import bytes_text

    workers = info.get("workers", [])
    slots = sum(worker["slots"] for worker in workers)
    lines = [
        f"{address}  up {_duration(info.get('uptime_s', 0.0))}",
        f"{len(workers)} workers, {slots} slots, {info.get('clients', 0)} clients; "
        f"{bytes_text(info.get('bytes_in', 0))} in, {bytes_text(info.get('bytes_out', 0))} out",
        "tasks: " + ", ".join(f"{n:,} {name}" for name, n in info.get("tasks", {}).items()),
    ]
    if info.get("stalled_s"):
        lines.append(f"NO PROGRESS for {_duration(info['stalled_s'])}; the broker's log says more")
    if info.get("journal", "off") not in ("off", "on"):
        lines.append(f"NO WORK IS TAKEN: {info['journal']}")
    if not workers:
        lines.append(f"no worker is connected; start one: zfabric worker {address}")
        return "\n".join(lines)
    lines += [
        "",
        f"{'worker':<14}{'host':<9}{'slots':>5}{'running':>8}{'done':>8}"
        f"{'memory':>9}{'values':>9}{'shared':>9}{'on disk':>9}",
    ]
    lines += [
        f"{worker['name'][:13]:<14}{worker['host'][:8]:<9}{worker['slots']:>5}"
        f"{worker['running']:>8,}{worker['done']:>8}"
        f"{bytes_text(worker.get('memory', 0)):>9}{bytes_text(worker['bytes']):>9}"
        f"{bytes_text(worker.get('shared', 0)):>9}{bytes_text(worker.get('spilled', 0)):>9}"
        for worker in workers
    ]
    lines += [
        f"{worker['name']}: THE DISK TAKES NO VALUES, they stay in memory; its log says why"
        for worker in workers
        if worker.get("disk_fails")
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}"
