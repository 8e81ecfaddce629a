"""Settings: defaults < environment < arguments; anything odd is one clear error."""

from __future__ import annotations

from dataclasses import fields

import pytest

from zfabric.config import DEFAULTS, ENVIRONMENT_PREFIX, Settings
from zfabric.errors import ConfigError


def test_defaults_fit_together() -> None:
    DEFAULTS.check()
    assert Settings.load({}) == DEFAULTS


def test_the_environment_overlays_defaults_and_arguments_overlay_both() -> None:
    environ = {"ZFABRIC_DEAD_S": "60", "ZFABRIC_INLINE_LIMIT": "1024", "PATH": "/bin"}
    assert Settings.load(environ).dead_s == 60.0
    loaded = Settings.load(environ, inline_limit=2048, beat_s=None)
    assert (loaded.dead_s, loaded.inline_limit, loaded.beat_s) == (60.0, 2048, DEFAULTS.beat_s)


def test_the_process_environment_is_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZFABRIC_WINDOW", "17")
    assert Settings.load().window == 17


def test_addresses_and_debug_switches_are_no_settings() -> None:
    assert Settings.load({"ZFABRIC_ADDRESS": "tcp://x:1", "ZFABRIC_DEBUG": "1"}) == DEFAULTS


@pytest.mark.parametrize(
    ("environ", "arguments", "text"),
    [
        ({"ZFABRIC_DEADS": "1"}, {}, "did you mean ZFABRIC_DEAD_S"),
        ({}, {"inline_limits": 1}, "did you mean inline_limit"),
        ({}, {"qqq": 1}, "known: inline_limit"),
        ({"ZFABRIC_WINDOW": "many"}, {}, "not an integer"),
        ({"ZFABRIC_WINDOW": "1.5"}, {}, "not an integer"),
        ({"ZFABRIC_BEAT_S": "soon"}, {}, "not a number"),
        ({"ZFABRIC_WINDOW": "0"}, {}, "above 0"),
        ({}, {"beat_s": -1.0}, "above 0"),
        ({}, {"window": True}, "above 0"),
        ({}, {"window": "9"}, "above 0"),
        ({"ZFABRIC_BEAT_S": "nan"}, {}, "above 0"),
        ({"ZFABRIC_GRACE_S": "nan"}, {}, "above 0"),
        ({"ZFABRIC_DEAD_S": "inf"}, {}, "above 0"),
        ({}, {"window": 1.5}, "whole number"),
        ({}, {"inline_limit": 1 << 30}, "batch_bytes"),
        ({}, {"chunk": DEFAULTS.max_frame}, "max_frame"),
        ({}, {"suspect_s": 31.0}, "beat_s < suspect_s < dead_s"),
        ({}, {"beat_s": 5.0}, "beat_s < suspect_s < dead_s"),
    ],
)
def test_a_setting_that_cannot_work(
    environ: dict[str, str], arguments: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        Settings.load(environ, **arguments)


@pytest.mark.parametrize("field", fields(Settings), ids=lambda field: field.name)
def test_every_setting_can_be_set_from_the_environment(field: object) -> None:
    name = field.name  # type: ignore[attr-defined]
    text = str(getattr(DEFAULTS, name))
    assert Settings.load({ENVIRONMENT_PREFIX + name.upper(): text}) == DEFAULTS
