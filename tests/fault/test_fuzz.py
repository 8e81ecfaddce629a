"""A little of the fuzz; `make faults` runs a million inputs."""

from __future__ import annotations

import pytest

from zfabric.testing.fuzz.__main__ import main
from zfabric.testing.fuzz.inputs import Inputs, examples
from zfabric.testing.fuzz.machine import MachineFuzz


def test_nothing_escapes(capsys: pytest.CaptureFixture[str], leaves_nothing: None) -> None:
    assert main(["-n", "6000"]) == 0
    out = capsys.readouterr().out
    assert "none escaped" in out
    assert "tasks ran" in out


def test_a_seed_says_it_all() -> None:
    def first(seed: int) -> list[object]:
        inputs = Inputs(seed, per_kind=2)
        return [(inputs.message(), inputs.body()) for _ in range(300)]

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_every_kind_of_message_is_among_the_examples() -> None:
    from zfabric.testing.strategies import BY_KIND

    assert {type(message) for message in examples(2)} == set(BY_KIND)


def test_the_fuzz_sees_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz = MachineFuzz(0)

    def broken(*_: object) -> None:
        raise KeyError("escaped")

    monkeypatch.setattr(fuzz.machine.scheduler, "on_message", broken)
    with pytest.raises(KeyError):
        for _ in range(2000):
            fuzz.step()
