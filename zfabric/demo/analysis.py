"""The tasks of the main job: pure functions from a path, or from summaries, to plain data.

A `Summary` describes any set of files, and `merge` joins summaries of disjoint sets. It is
associative and commutative with `Summary()` as its neutral element, so the tree that merges may
have any shape and any order and gives the same answer.

Cyclomatic complexity (McCabe, A Complexity Measure, 1976) is counted as one per function plus one
per decision in it. Decisions are: `if` and `elif`, a conditional expression, `for` and `while`,
`except`, `assert`, each `and`/`or` beyond a single operand, each `for` and each `if` of a
comprehension, and each `case` except a bare `case _`. A file's complexity is the sum over its
functions and the decisions outside of functions. A lambda's decisions are its function's.
"""

from __future__ import annotations

import ast
import threading
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from time import thread_time
from typing import NamedTuple

N_HARDEST = 10
"""How many of the most complex files a summary keeps."""


class FileFigures(NamedTuple):
    """One parsed file. Ordered so that a plain sort puts the most complex first, then by path."""

    negative_complexity: int
    path: str
    lines: int
    functions: int

    @property
    def complexity(self) -> int:
        return -self.negative_complexity


class FunctionFigures(NamedTuple):
    """One function, sorted as `FileFigures` are."""

    negative_complexity: int
    line: int
    name: str

    @property
    def complexity(self) -> int:
        return -self.negative_complexity


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known of a set of files. Counts are totals over the files that could be parsed."""

    files: int = 0
    lines: int = 0
    functions: int = 0
    classes: int = 0
    complexity: int = 0
    imports: dict[str, int] = field(default_factory=dict)
    """Top-level module name to the number of statements that import it."""
    identifiers: dict[str, int] = field(default_factory=dict)
    """Name of a variable, attribute, argument, function or class to its occurrences."""
    hardest: tuple[FileFigures, ...] = ()
    """The `N_HARDEST` most complex files, most complex first."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """(path, reason) of each file that could not be read, decoded or parsed; sorted."""
    slots: dict[str, tuple[int, float]] = field(default_factory=dict, compare=False)
    """Where it ran: thread id to (files, CPU seconds). No part of the answer."""


def analyse(path: str) -> Summary:
    """The summary of one file. A file that cannot be parsed is counted and named, never fatal."""
    began = thread_time()
    try:
        tree, lines = parse(path)
        functions, classes, complexity, imports, identifiers = count(tree)
    except Unreadable as error:
        return Summary(unreadable=((path, str(error)),), slots=_here(began))
    return Summary(
        files=1,
        lines=lines,
        functions=functions,
        classes=classes,
        complexity=complexity,
        imports=imports,
        identifiers=identifiers,
        hardest=(FileFigures(-complexity, path, lines, functions),),
        slots=_here(began),
    )


def merge(*parts: Summary) -> Summary:
    """The summary of all files of all parts; the parts are of disjoint sets of files."""
    return Summary(
        files=sum(part.files for part in parts),
        lines=sum(part.lines for part in parts),
        functions=sum(part.functions for part in parts),
        classes=sum(part.classes for part in parts),
        complexity=sum(part.complexity for part in parts),
        imports=_added(part.imports for part in parts),
        identifiers=_added(part.identifiers for part in parts),
        hardest=tuple(sorted(one for part in parts for one in part.hardest)[:N_HARDEST]),
        unreadable=tuple(sorted(one for part in parts for one in part.unreadable)),
        slots=_joined(part.slots for part in parts),
    )


def rank_functions(path: str, most: int = 3) -> tuple[FunctionFigures, ...]:
    """The `most` complex functions of a file, most complex first; () if it cannot be parsed."""
    try:
        tree, _ = parse(path)
    except Unreadable:
        return ()
    return tuple(sorted(functions_of(tree))[:most])


class Unreadable(Exception):
    """A file that is no Python source for this interpreter; the text says why in a few words."""


def parse(path: str) -> tuple[ast.Module, int]:
    """A file's syntax tree and its number of lines. Raises Unreadable."""
    try:
        data = Path(path).read_bytes()
        encoding, _ = tokenize.detect_encoding(BytesIO(data).readline)
        text = data.decode(encoding)
    except OSError as error:
        raise Unreadable(error.strerror or "not readable") from None
    except (SyntaxError, UnicodeDecodeError):
        raise Unreadable("not decodable") from None
    lines = text.count("\n") + (not text.endswith("\n") and text != "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's escape sequences
            return ast.parse(text, path), lines
    except (SyntaxError, ValueError):
        raise Unreadable("not parsable") from None
    except (RecursionError, MemoryError):
        raise Unreadable("nested too deeply") from None


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def count(tree: ast.Module) -> tuple[int, int, int, dict[str, int], dict[str, int]]:
    """(functions, classes, complexity, imports, identifiers) of a tree."""
    functions = classes = complexity = 0
    imports: dict[str, int] = {}
    identifiers: dict[str, int] = {}
    for node in ast.walk(tree):
        name = ""
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                pass
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                functions += 1
            case ast.ClassDef(name=name):
                classes += 1
            case ast.Import(names=aliases):
                for alias in aliases:
                    module = alias.name.partition(".")[0]
                    imports[module] = imports.get(module, 0) + 1
            case ast.ImportFrom(module=str(module), level=0):
                module = module.partition(".")[0]
                imports[module] = imports.get(module, 0) + 1
        decide = _DECISIONS.get(type(node))
        if decide is not None:
            complexity += decide(node)
        if name:
            identifiers[name] = identifiers.get(name, 0) + 1
    return functions, classes, complexity + functions, imports, identifiers


def functions_of(tree: ast.Module) -> Iterator[FunctionFigures]:
    """Each function of a tree, with the dotted name that leads to it. No recursion: a generated
    file may be nested deeper than Python's stack."""
    totals: list[int] = []
    named: list[tuple[str, int]] = []
    todo: list[tuple[ast.AST, str, int]] = [(tree, "", -1)]
    while todo:
        node, prefix, owner = todo.pop()
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            prefix = f"{prefix}.{node.name}" if prefix else node.name
            if isinstance(node, _FUNCTIONS):
                owner = len(totals)
                totals.append(1)
                named.append((prefix, node.lineno))
        decide = _DECISIONS.get(type(node))
        if decide is not None and owner >= 0:
            totals[owner] += decide(node)
        todo.extend((child, prefix, owner) for child in ast.iter_child_nodes(node))
    for total, (name, line) in zip(totals, named):
        yield FunctionFigures(-total, line, name)


def _one(node: ast.AST) -> int:
    return 1


def _operands(node: ast.AST) -> int:
    assert isinstance(node, ast.BoolOp)
    return len(node.values) - 1


def _for_and_ifs(node: ast.AST) -> int:
    assert isinstance(node, ast.comprehension)
    return 1 + len(node.ifs)


def _unless_bare(node: ast.AST) -> int:
    match node:
        case ast.match_case(pattern=ast.MatchAs(pattern=None, name=None), guard=None):
            return 0
    return 1


_DECISIONS: dict[type[ast.AST], Callable[[ast.AST], int]] = {
    **dict.fromkeys(
        (
            ast.If,
            ast.IfExp,
            ast.For,
            ast.AsyncFor,
            ast.While,
            ast.ExceptHandler,
            ast.Assert,
        ),
        _one,
    ),
    ast.BoolOp: _operands,
    ast.comprehension: _for_and_ifs,
    ast.match_case: _unless_bare,
}


def _added(parts: Iterator[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        if not total:
            total.update(part)
            continue
        get = total.get
        for name, n in part.items():
            total[name] = get(name, 0) + n
    return total


def _joined(parts: Iterator[dict[str, tuple[int, float]]]) -> dict[str, tuple[int, float]]:
    total: dict[str, tuple[int, float]] = {}
    for part in parts:
        for slot, (files, cpu_s) in part.items():
            before = total.get(slot, (0, 0.0))
            total[slot] = (before[0] + files, before[1] + cpu_s)
    return total


def _here(began: float) -> dict[str, tuple[int, float]]:
    """One file in this slot. A process slot runs tasks in its main thread, whose id is the
    process's; a thread slot has an id of its own."""
    return {str(threading.get_native_id()): (1, thread_time() - began)}
