"""`zfabric replay`: what a broker decided, once more and step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zfabric.cli.options import say

if TYPE_CHECKING:
    from zfabric.runtime.replay import Replay, Step


@click.command(short_help="Go through a recorded broker again.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--to", metavar="N", type=click.IntRange(1), help="Stop after event N.")
@click.option("--task", metavar="KEY", help="Only events that changed this task; key, name or id.")
@click.option("--step", is_flag=True, help="Wait for Enter after each event that is shown.")
@click.option("--check", is_flag=True, help="Check the broker's invariants after each turn.")
@click.option("--quiet", "-q", is_flag=True, help="Show only how it stands in the end.")
def replay(
    file: Path, to: int | None, task: str | None, step: bool, check: bool, quiet: bool
) -> None:
    """Go through FILE, made by `zfabric broker --record FILE`, or by a broker that reported a
    fabric without progress, and show how the tasks stand in the end and why.

    \b
    zfabric replay events.rec --task load-17
    zfabric replay events.rec --to 1200 --check --quiet
    """
    from zfabric.runtime.replay import Replay, read_dump

    dump = read_dump(file)
    if dump is not None:
        _show_dump(dump, quiet, step)
        return
    opened = Replay(file)
    try:
        _go_through(opened, to, task, step, check, quiet)
    finally:
        opened.close()


def _go_through(
    opened: Replay, to: int | None, task: str | None, step: bool, check: bool, quiet: bool
) -> None:
    from zfabric.core import invariants
    from zfabric.core.dump import picture

    machine = opened.machine
    stories: dict[int, str] = {}
    last: Step | None = None
    for last in opened.steps():
        if check and last.text.startswith("turn"):
            invariants.check(machine.scheduler)
        changed = _changes(machine, task, stories) if task else []
        if not quiet and (changed if task else last.text not in ("tick", "turn")):
            say(f"{last.number:>8} {last.at_s:>10.3f}s  {last.text}")
            for line in changed:
                say(f"{'':>21}{line}")
            if step:
                click.pause("")
        if to is not None and last.number >= to:
            break
    if opened.is_torn:
        say("the last event was cut off while it was written; all before it are here")
    say(f"\nafter {last.number if last else 0} events:")
    _show_tasks(picture(machine.scheduler, lambda number: 0.0))


def _changes(machine: Any, key: str, stories: dict[int, str]) -> list[str]:
    """How the tasks of that name stand now, where that is new."""
    from zfabric.core.questions import names_of

    found = {
        task.id: task.story()
        for task in machine.scheduler.tasks.values()
        if key in names_of(task) or key == f"{task.id:x}"
    }
    changed = [story for id_, story in found.items() if stories.get(id_) != story]
    changed += [f"{story} -> let go" for id_, story in stories.items() if id_ not in found]
    stories.clear()
    stories.update(found)
    return changed


def _show_dump(dump: dict[str, Any], quiet: bool, step: bool) -> None:
    say(dump.get("stall", ""))
    if not quiet:
        for at_s, text in dump.get("recent", ()):
            say(f"{at_s:>10.3f}s  {text}")
            if step:
                click.pause("")
    _show_tasks(dump)


def _show_tasks(state: dict[str, Any]) -> None:
    say("tasks: " + ", ".join(f"{n:,} {name}" for name, n in state["tasks"].items()))
    for worker in state["workers"]:
        rows = state["rows"].get(worker["name"], [])
        say(f"worker {worker['name']}: {worker['held']} rows held {' '.join(rows[:8])}")
    for task in state["unfinished_tasks"]:
        say(f"{task['key']} [{task['id']}] {task['state']}, attempt {task['attempt']}")
        for text in [*task["reasons"], *(f"earlier: {text}" for text in task["history"])]:
            say(f"    {text}")
    hidden = state["unfinished"] - len(state["unfinished_tasks"])
    if hidden > 0:
        say(f"and {hidden} more unfinished tasks")
