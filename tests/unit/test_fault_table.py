"""The table of faults in docs/reliability.md names tests that exist, and leaves no row out."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
N_ROWS = 42


def rows() -> dict[int, str]:
    """The last column of each row of the table, by its number."""
    _, _, section = PAGE.read_text().partition("## Faults that are tried\n")
    section = section.partition("\n## ")[0]
    return {
        int(found[1]): found[2] for found in re.finditer(r"^\| (\d+) \|.*\|(.*)\|$", section, re.M)
    }


@cache
def names(path: str) -> frozenset[str]:
    """Functions and classes at the top of a test file; none where there is no file."""
    file = ROOT / path
    if not file.is_file():
        return frozenset()
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return frozenset(each.name for each in ast.parse(file.read_text()).body if type(each) in kinds)


def test_every_row_is_there_and_names_a_test() -> None:
    found = rows()
    assert list(found) == list(range(1, N_ROWS + 1))
    assert not [number for number, shown in found.items() if "`tests/" not in shown]


def test_every_test_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", " ".join(rows().values()))
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not names(path) or (name and name not in names(path))
    ]
    assert len(named) > N_ROWS
    assert not missing
