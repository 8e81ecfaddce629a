"""`zfabric demo`: the main job on files of this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from zfabric.cli.options import say


@click.command(short_help="Analyse this machine's Python files on a fabric.")
@click.option(
    "--path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder to analyse.  [default: the standard library]",
)
@click.option("--slots", "-n", type=click.IntRange(min=1), help="Slots.  [default: all cores]")
@click.option("--threads", is_flag=True, help="Thread slots in place of processes.")
@click.option(
    "--address", metavar="ADDRESS", help="Run on this fabric; its workers need the files."
)
@click.option("--serial", is_flag=True, help="A plain loop in this process: the same answer.")
def demo(
    path: Path | None, slots: int | None, threads: bool, address: str | None, serial: bool
) -> None:
    """Analyse every Python file of the standard library, or of a folder.

    One task per file counts lines, functions, classes, imports, cyclomatic complexity and names;
    a tree of tasks merges that; the ten most complex files get a second task each.

    \b
    zfabric demo
    zfabric demo --path ~/src --slots 8
    zfabric demo --serial
    zfabric demo --address tcp://127.0.0.1:8787
    """
    from zfabric.demo import job, table
    from zfabric.demo.bar import Bar, can_print

    if address and (slots or threads or serial):
        raise click.UsageError("--address takes the fabric as it is: no --slots, no --serial")
    folder = (path or job.standard_library()).resolve()
    files = job.find_sources(folder)
    if not files:
        raise click.ClickException(f"no Python files below {folder}")

    bar = Bar(sys.stderr, "analysing")
    info = None
    try:
        if serial:
            outcome = job.run_serial(files, bar)
        else:
            from zfabric.client import Client

            kind = "thread" if threads else "process"
            with Client(address) if address else Client(slots=slots, kind=kind) as client:
                outcome = job.run_on(client, files, bar)
                info = client.info()
    finally:
        bar.clear()
    full, rule = "█─" if can_print("█─", sys.stdout) else "#-"
    say(table.render(outcome, folder, full, rule))
    say("")
    say(table.render_figures(outcome, info, full, rule))
