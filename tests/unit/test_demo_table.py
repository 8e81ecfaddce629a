"""What the main job prints fits 80 columns, in a terminal and in a pipe."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from zfabric.demo import job, table
from zfabric.demo.analysis import FunctionFigures, Summary, analyse
from zfabric.demo.bar import Bar, can_print


class Terminal(io.StringIO):
    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True


@pytest.fixture
def outcome(tmp_path: Path) -> job.Outcome:
    deep = tmp_path / ("a_rather_long_folder_name/" * 5)
    deep.mkdir(parents=True)
    (deep / "module.py").write_text("import os\ndef " + "f" * 100 + "(x): return x or 1\n")
    (tmp_path / "broken.py").write_text("def")
    return job.run_serial(job.find_sources(tmp_path))


def test_lines_fit(outcome: job.Outcome, tmp_path: Path) -> None:
    text = table.render(outcome, tmp_path) + "\n" + table.render_figures(outcome, None)
    assert max(map(len, text.splitlines())) <= 80
    assert "module.py" in text
    assert "not parsable" in text


def test_figures_of_a_fabric(outcome: job.Outcome) -> None:
    info = {"workers": [{"bytes": 2_000_000}], "bytes_in": 1500, "bytes_out": 12}
    text = table.render_figures(outcome, info)
    assert "1 worker, 1 slot at work" in text
    assert "1.5 kB in, 12 B out" in text
    assert "values held by the workers: 2.0 MB" in text


def test_nothing_at_all_can_be_printed(tmp_path: Path) -> None:
    empty = job.Outcome(Summary(), {}, 0, 0.0)
    assert "files" in table.render(empty, tmp_path)
    assert "0 tasks" in table.render_figures(empty, {})


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (3e15, "3000.0 TB")],
)
def test_bytes(n: float, text: str) -> None:
    assert table.bytes_text(n) == text


def test_the_end_of_a_long_path_stays() -> None:
    assert table.shortened("a/very/long/path.py", 10) == "...path.py"
    assert table.shortened("path.py", 10) == "path.py"


def test_the_bar_draws_on_a_terminal_only() -> None:
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        bar = Bar(stream, "working")
        bar(1, 2)
        bar(2, 2)
        bar.clear()
    assert pipe.getvalue() == ""
    assert "100%  2/2 tasks" in terminal.getvalue()
    assert all(len(line) <= 79 for line in terminal.getvalue().split("\r"))


def test_the_bar_takes_any_encoding() -> None:
    assert "#" in Bar(Terminal("ascii"), "x").line(1, 2, 1.0)
    assert not can_print("█", Terminal("klingon"))


def test_sources_are_found_without_installed_packages(tmp_path: Path) -> None:
    for name in ("b.py", "a/c.py", "site-packages/d.py", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "folder.py").mkdir()
    assert job.find_sources(tmp_path) == [str(tmp_path / "a/c.py"), str(tmp_path / "b.py")]
    with pytest.raises(NotADirectoryError):
        job.find_sources(tmp_path / "b.py")


def test_a_serial_run_counts_its_tasks(tmp_path: Path) -> None:
    for n in range(9):
        (tmp_path / f"m{n}.py").write_text("if x: pass\n" * n)
    seen: list[tuple[int, int]] = []
    outcome = job.run_serial(
        job.find_sources(tmp_path), lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (9, 9)
    assert outcome.tasks == 9 + 3 + 9  # files, merges of 8 + 1 and of 2, follow-ups
    assert [file.complexity for file in outcome.summary.hardest] == list(range(8, -1, -1))
    assert outcome.functions[str(tmp_path / "m8.py")] == ()


def test_the_tree_submits_every_merge_once(tmp_path: Path) -> None:
    submitted = []

    def submit(fn: object, *args: object) -> object:
        submitted.append(args)
        return ("merge", len(submitted))

    inner, root = job.merge_tree(submit, list(range(65)))
    assert len(inner) == len(submitted) == 9 + 2 + 1
    assert root is inner[-1]
    assert job.merge_tree(submit, ["one"]) == ([], "one")


def test_functions_sort_by_complexity_then_line() -> None:
    assert sorted([FunctionFigures(-1, 9, "b"), FunctionFigures(-2, 5, "a")])[0].name == "a"
    assert analyse(__file__).hardest[0].complexity > 0
