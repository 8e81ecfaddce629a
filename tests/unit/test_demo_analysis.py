"""The tasks of the main job: what is counted, and that merging may happen in any shape."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfabric.demo.analysis import (
    N_HARDEST,
    FileFigures,
    Summary,
    analyse,
    count,
    functions_of,
    merge,
    rank_functions,
)


def complexity_of(source: str) -> int:
    return count(ast.parse(source))[2]


@pytest.mark.parametrize(
    ("source", "complexity"),
    [
        ("x = 1", 0),
        ("def f(): pass", 1),
        ("async def f(): pass", 1),
        ("if a: pass\nelif b: pass\nelse: pass", 2),
        ("x = a if b else c", 1),
        ("for x in y: pass\nelse: pass", 1),
        ("while x: pass", 1),
        ("try: pass\nexcept A: pass\nexcept B: pass\nfinally: pass", 2),
        ("assert x", 1),
        ("x = a and b and c or d", 3),
        ("x = [a for b in c if d if e for f in g]", 4),
        ("x = {a: b for a in c}", 1),
        ("with a: pass", 0),
        ("match x:\n  case 1: pass\n  case y if y: pass\n  case _: pass", 2),
        ("f = lambda x: x if x else y", 1),
        ("def f():\n  def g():\n    if x: pass\n  if y: pass", 4),
    ],
)
def test_complexity_follows_the_rules(source: str, complexity: int) -> None:
    assert complexity_of(source) == complexity


def test_functions_are_ranked_with_their_own_decisions_only() -> None:
    source = """
class A:
    def easy(self): pass
    def hard(self):
        if a and b: pass
        def inner():
            while x: pass
            return [y for y in z if y]
        return lambda: a if b else c
"""
    found = {f.name: f.complexity for f in functions_of(ast.parse(source))}
    assert found == {"A.easy": 1, "A.hard": 4, "A.hard.inner": 4}


def test_functions_add_up_to_the_file() -> None:
    tree = ast.parse(Path(ast.__file__).read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    total = count(tree)[2]
    assert total == sum(function.complexity for function in functions_of(tree)) > 100


def test_names_and_imports_are_counted() -> None:
    source = (
        "import os.path, re\nfrom . import a\nfrom .b import c\nfrom re import x\ny = os.y(q=y)"
    )
    functions, classes, _, imports, identifiers = count(ast.parse(source))
    assert (functions, classes) == (0, 0)
    assert imports == {"os": 1, "re": 2}
    assert identifiers == {"y": 3, "os": 1}


def test_a_file_of_this_package(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("class A:\n    def f(self, x):\n        return x or 1")
    summary = analyse(str(file))
    assert (summary.files, summary.lines, summary.functions, summary.classes) == (1, 3, 1, 1)
    assert summary.hardest == (FileFigures(-2, str(file), 3, 1),)
    assert rank_functions(str(file)) == ((-2, 2, "A.f"),)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"def f(:", "not parsable"),
        (b"x = '\xff'", "not decodable"),
        (b"# coding: klingon\n", "not decodable"),
        (b"x = 1\0", "not parsable"),
        (b"x = " + b"(" * 5000 + b")" * 5000, None),
        (b"x = " + b"-" * 200_000 + b"1", None),
    ],
)
def test_what_cannot_be_parsed_is_counted(
    tmp_path: Path, content: bytes, reason: str | None
) -> None:
    file = tmp_path / "a.py"
    file.write_bytes(content)
    summary = analyse(str(file))
    assert summary.files == 0
    ((path, seen),) = summary.unreadable
    assert path == str(file)
    assert reason is None or seen == reason
    assert rank_functions(str(file)) == ()


def test_a_missing_file_is_counted(tmp_path: Path) -> None:
    summary = analyse(str(tmp_path / "gone.py"))
    assert summary.unreadable == ((str(tmp_path / "gone.py"), "No such file or directory"),)


@pytest.mark.parametrize(
    ("content", "lines"), [("", 0), ("\n", 1), ("x = 1", 1), ("x = 1\n", 1), ("x = 1\n\n# y", 3)]
)
def test_lines(tmp_path: Path, content: str, lines: int) -> None:
    file = tmp_path / "a.py"
    file.write_text(content)
    assert analyse(str(file)).lines == lines


def test_an_encoding_cookie_is_honoured(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_bytes(b"# coding: latin-1\nx = '\xff'\n")
    assert analyse(str(file)).files == 1


counts = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 9))
summaries = st.builds(
    Summary,
    files=st.integers(0, 9),
    lines=st.integers(0, 99),
    functions=st.integers(0, 9),
    classes=st.integers(0, 9),
    complexity=st.integers(0, 99),
    imports=counts,
    identifiers=counts,
    hardest=st.lists(
        st.builds(
            FileFigures, st.integers(-9, 0), st.text("xyz", max_size=2), st.just(1), st.just(1)
        ),
        max_size=N_HARDEST,
    ).map(lambda files: tuple(sorted(files))),
    unreadable=st.lists(st.tuples(st.text("xyz", max_size=2), st.just("why")), max_size=2).map(
        lambda rows: tuple(sorted(rows))
    ),
    slots=st.dictionaries(st.sampled_from("12"), st.tuples(st.integers(1, 9), st.just(0.5))),
)


@given(summaries, summaries, summaries)
def test_merge_is_associative_and_commutative(a: Summary, b: Summary, c: Summary) -> None:
    assert merge(a, b, c) == merge(merge(a, b), c) == merge(a, merge(b, c)) == merge(c, a, b)
    assert merge(a, Summary()) == merge(a) == a
    assert merge(a, b).slots == merge(b, a).slots


@given(summaries)
def test_summaries_travel(summary: Summary) -> None:
    again = pickle.loads(pickle.dumps(summary, protocol=5))
    assert again == summary
    assert again.slots == summary.slots


def test_merge_leaves_its_parts_alone() -> None:
    part = Summary(imports={"os": 1}, slots={"1": (1, 0.5)})
    merge(part, part)
    assert part.imports == {"os": 1}
    assert part.slots == {"1": (1, 0.5)}
