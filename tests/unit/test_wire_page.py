"""docs/protocol.md tells what the code does: kinds, statuses, ways, header, refusals."""

from __future__ import annotations

import re
from pathlib import Path

from zfabric import messages as m
from zfabric import wire
from zfabric.config import DEFAULTS
from zfabric.core.table import MAX_STRIKES
from zfabric.wire.coding import _KINDS
from zfabric.wire.header import MAGIC, MAX_HEADER

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text()
BULK = {(m.Chunk, "data"), (m.Put, "data"), (m.Relay, "frames")}


def table(first_heading: str) -> list[list[str]]:
    """The cells of the table whose first column has this heading."""
    block = re.search(rf"^\| {first_heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert block, f"no table begins with {first_heading}"
    return [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in block[1].splitlines()
    ]


def test_the_kinds_are_those_of_the_code() -> None:
    shown = {int(number): (name, seq, body) for number, name, seq, _, body in table("number")}
    real = {}
    for number, kind in _KINDS.items():
        names = [name for name in kind.message._fields if (kind.message, name) not in BULK]
        assert len(names) == kind.n_fields
        sequenced = "yes" if kind.sequenced else "no"
        real[number] = (kind.message.__name__, sequenced, ", ".join(names))
    assert shown == real
    assert list(shown) == sorted(shown)


def test_numbers_are_in_their_ranges() -> None:
    for number, kind in _KINDS.items():
        if number < 60:
            assert kind.sequenced is (16 <= number < 48)


def test_who_sends_what_is_what_the_broker_takes() -> None:
    from zfabric.core.scheduler import _CLIENT_HANDLERS, _WORKER_HANDLERS

    shown = {name: way for _, name, _, way, _ in table("number")}
    both = {name for name, way in shown.items() if way == "peer → broker"} - {"Hello"}
    assert {name for name, way in shown.items() if way == "client → broker"} | both == {
        *(kind.__name__ for kind in _CLIENT_HANDLERS),
        "Acquire",  # not the scheduler's: core.locks takes these two
        "Unlock",
        "Query",  # core.desk
    }
    handled = {kind.__name__ for kind in _WORKER_HANDLERS}
    assert {name for name, way in shown.items() if way == "worker → broker"} | both == {
        *handled,
        "Explained",  # not the scheduler's: core.questions takes it
    }


def test_statuses_and_ways() -> None:
    for heading, n in (("status", m.N_STATUSES), ("way", 3)):
        rows = table(heading)
        assert [int(row[0]) for row in rows] == list(range(n))
        for number, name, _ in rows:
            assert getattr(m, name) == int(number)


def test_header() -> None:
    names = [row[1] for row in table("place")]
    assert names == ["magic", "version", "kind", "token", "epoch", "seq", "ack"]
    assert set(names) == {"magic", *wire.Header._fields}
    assert f"{MAGIC} (`0x{MAGIC:X}`)" in PAGE
    assert f"protocol version {wire.PROTOCOL}" in PAGE
    assert f"at most {MAX_HEADER} bytes" in PAGE


def test_refusals() -> None:
    core = ROOT / "zfabric" / "core"
    source = "".join(path.read_text() for path in core.glob("*.py"))
    used = set(re.findall(r'm\.Refuse\(\s*"(\w+)"', source))
    assert {row[0] for row in table("code")} == used


def test_figures() -> None:
    assert f"At most {DEFAULTS.window} messages" in PAGE
    assert f"the last {m.MAX_FUNCTIONS} functions" in PAGE
    assert MAX_STRIKES == 3 and "after three of them" in PAGE
    assert DEFAULTS.dead_s == 30 and "30 s of silence" in PAGE
    assert DEFAULTS.suspect_s == 5 and DEFAULTS.grace_s == 0.5 and DEFAULTS.beat_s == 1.0
