"""The command line: help in one screen, one text per mistake, arguments as the rooms get them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import zfabric
from zfabric.cli import group, status
from zfabric.cli.options import Resources, merged, say
from zfabric.errors import ConnectFailed, InternalError


def invoke(*args: str) -> Any:
    return CliRunner().invoke(group.cli, list(args))


def test_help_fits_one_screen() -> None:
    text = invoke("--help").output
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 80
    for name in ("broker", "worker", "demo", "status", "keys", "zfabric.Client()"):
        assert name in text


@pytest.mark.parametrize("command", ["broker", "worker", "demo", "status", "keys"])
def test_each_command_has_examples(command: str) -> None:
    text = invoke(command, "--help").output
    assert text.count(f"zfabric {command}") >= 2


def test_version() -> None:
    assert invoke("--version").output == f"zfabric {zfabric.__version__}\n"


@pytest.mark.parametrize(
    ("text", "amounts"),
    [
        ("GPU=1", {"GPU": 1.0}),
        ("GPU", {"GPU": 1.0}),
        ("GPU=2,memory=16e9", {"GPU": 2.0, "memory": 16e9}),
        ("", {}),
    ],
)
def test_resources(text: str, amounts: dict[str, float]) -> None:
    assert Resources().convert(text, None, None) == amounts


@pytest.mark.parametrize("text", ["GPU=x", "=1", "GPU=-1", "GPU=inf", "GPU=nan"])
def test_bad_resources(text: str) -> None:
    with pytest.raises(click.BadParameter, match="NAME=AMOUNT"):
        Resources().convert(text, None, None)


def test_resources_given_twice_are_joined() -> None:
    assert merged(({"GPU": 1.0}, {"disk": 2.0, "GPU": 3.0})) == {"GPU": 3.0, "disk": 2.0}


def test_demo_in_one_process(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f(x): return x or 1\n")
    done = invoke("demo", "--serial", "--path", str(tmp_path))
    assert done.exit_code == 0
    assert "a.py" in done.output
    assert "no fabric" in done.output


def test_demo_without_files(tmp_path: Path) -> None:
    done = invoke("demo", "--serial", "--path", str(tmp_path))
    assert done.exit_code == 1
    assert f"no Python files below {tmp_path}" in done.output


def test_demo_options_that_contradict() -> None:
    assert invoke("demo", "--address", "tcp://x:1", "--slots", "2").exit_code == 2


def run_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def fail(**kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(group, "cli", fail)
    with pytest.raises(SystemExit) as caught:
        group.run()
    return int(caught.value.code or 0)


def test_our_errors_are_one_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, ConnectFailed("tcp://127.0.0.1:1", 5.0)) == 1
    text = capsys.readouterr().err
    assert text.startswith("zfabric: nothing answers at tcp://127.0.0.1:1 after 5 s")
    assert "Traceback" not in text


def test_ctrl_c_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InternalError):
        run_with(monkeypatch, InternalError("no such state"))


def test_the_module_runs_like_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zfabric", "wrk"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "No such command 'wrk'" in done.stderr


def test_say_escapes_what_the_stream_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\udcffb")
    assert capsys.readouterr().out == "a\\udcffb\n"


INFO = {
    "workers": [
        {"name": "w" * 40, "host": "h" * 40, "slots": 4, "running": 3, "done": 1_000_000,
         "bytes": 5e9},
    ],
    "clients": 2, "bytes_in": 1e6, "bytes_out": 2e6, "uptime_s": 3725.0,
    "tasks": {"waiting": 1, "ready": 2, "running": 3, "finished": 4, "failed": 0},
}  # fmt: skip


def test_status_fits_80_columns() -> None:
    text = status.render("tcp://127.0.0.1:8787", INFO)
    assert max(map(len, text.splitlines())) <= 80
    assert "up 1:02:05" in text
    assert "5.0 GB" in text


def test_status_says_that_the_journal_cannot_be_written() -> None:
    trouble = "the journal j cannot be written: database or disk is full"
    text = status.render("tcp://127.0.0.1:8787", {**INFO, "journal": trouble})
    assert f"NO WORK IS TAKEN: {trouble}" in text
    for fine in ("on", "off"):
        text = status.render("tcp://127.0.0.1:8787", {**INFO, "journal": fine})
        assert "NO WORK" not in text


def test_status_says_that_a_workers_disk_takes_no_values() -> None:
    (worker, *_) = INFO["workers"]  # type: ignore[misc, attr-defined]
    text = status.render(
        "tcp://127.0.0.1:8787", {**INFO, "workers": [{**worker, "disk_fails": True}]}
    )
    assert f"{worker['name']}: THE DISK TAKES NO VALUES" in text
    assert "DISK" not in status.render("tcp://127.0.0.1:8787", INFO)


def test_status_without_workers_says_what_to_start() -> None:
    text = status.render("tcp://127.0.0.1:8787", {**INFO, "workers": []})
    assert "zfabric worker tcp://127.0.0.1:8787" in text
