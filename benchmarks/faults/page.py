"""The tables: a row per fault and system for a terminal, a cell per fault and system for a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.faults.cases import CASES

WORDS = (("lost", "lost"), ("wrong", "wrong"), ("twice", "ran twice"), ("hung", "hung"))

Rounds = dict[tuple[str, str], list[dict[str, Any]]]
"""(case, system): an account per round."""


def table(rounds: Rounds, systems: Sequence[str]) -> str:
    """Sums over all rounds; of the recovery the median, and the longest."""
    head = "".join(f"{word:>10}" for _, word in WORDS)
    lines = [f"{'':<44}{'system':<13}{'tasks':>6}{head}{'recovery s':>16}"]
    for case, system, found in _rows(rounds, systems):
        start = f"{CASES[case].title:<44}{system:<13}"
        if found[0]["verb"]:
            lines.append(f"{start}no such verb: {found[0]['verb']}")
            continue
        counts = "".join(f"{_sum(found, field):>10}" for field, _ in WORDS)
        stuck = "" if goes_on(found) else "  takes no new work"
        lines.append(f"{start}{_sum(found, 'n'):>6}{counts}{_recovery(found) or '-':>16}{stuck}")
    return "\n".join(lines)


def markdown(rounds: Rounds, systems: Sequence[str]) -> str:
    """What went wrong, of how many tasks; then the seconds."""
    lines = ["| fault | " + " | ".join(systems) + " |", "|---|" + "---|" * len(systems)]
    for case in dict.fromkeys(case for case, _ in rounds):
        cells = [_cell(rounds.get((case, system), [])) for system in systems]
        lines.append(f"| {CASES[case].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def account(rounds: Rounds, system: str) -> str:
    """What became of one system's tasks, in numbers: a line per fault."""
    lines = [
        "| fault | injected | tasks | lost | wrong | ran twice | hung | recovery |",
        "|---|" + "---:|" * 7,
    ]
    for case, _, found in _rows(rounds, [system]):
        counts = " | ".join(str(_sum(found, field)) for field, _ in WORDS)
        seconds = _recovery(found)
        lines.append(
            f"| {CASES[case].title} | {len(found)} | {_sum(found, 'n')} | {counts} |"
            f" {seconds + ' s' if seconds else '-'} |"
        )
    return "\n".join(lines)


def goes_on(found: Sequence[dict[str, Any]]) -> bool:
    """Whether new work was done afterwards, wherever it was asked for: not after a hang."""
    return not any(account["goes_on"] is False for account in found)


def _cell(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return ""
    if found[0]["verb"]:
        return "no such verb"
    wrong = [f"{n} {word}" for field, word in WORDS if (n := _sum(found, field))]
    if wrong:
        wrong[-1] += f" of {_sum(found, 'n')}"
    if not goes_on(found):
        wrong.append("takes no new work")
    seconds = _recovery(found)
    return ", ".join([*wrong, *([f"{seconds} s"] if seconds else [])])


def _rows(rounds: Rounds, systems: Sequence[str]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    cases = dict.fromkeys(case for case, _ in rounds)
    return [(c, s, rounds[c, s]) for c in cases for s in systems if (c, s) in rounds]


def _sum(found: Sequence[dict[str, Any]], field: str) -> int:
    return sum(account[field] for account in found)


def _recovery(found: Sequence[dict[str, Any]]) -> str:
    """ "" unless every round had all its answers."""
    seconds = [account["recovery_s"] for account in found]
    if not seconds or None in seconds:
        return ""
    median, longest = f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"
    return median if median == longest else f"{median} (max {longest})"
