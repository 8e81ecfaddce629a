"""Every error of the tree has fields, a sentence and the standard class that callers catch."""

from __future__ import annotations

import concurrent.futures
import pickle
from collections.abc import Iterator

import pytest

from zfabric import errors
from zfabric.errors import ZFabricError


def tree(kind: type[ZFabricError] = ZFabricError) -> Iterator[type[ZFabricError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


KINDS = list(dict.fromkeys(tree()))

SAMPLES = {"waited_s": 2.5, "attempts": ("on a: SIGSEGV", "on b: SIGKILL"), "story": ("a", "b")}


def built(kind: type[ZFabricError]) -> ZFabricError:
    return kind(**{name: SAMPLES.get(name, f"some {name}") for name in kind._fields})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_an_error_survives_pickling_with_its_fields(
    kind: type[ZFabricError], protocol: int
) -> None:
    error = built(kind)
    back = pickle.loads(pickle.dumps(error, protocol))
    assert type(back) is kind
    assert str(back) == str(error)
    for name in kind._fields:
        assert getattr(back, name) == getattr(error, name)
    twice = pickle.loads(pickle.dumps(back, protocol))
    assert str(twice) == str(error)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_explains_itself(kind: type[ZFabricError]) -> None:
    assert kind.__doc__
    assert "some message" in str(built(kind))


@pytest.mark.parametrize(
    ("kind", "standard"),
    [
        (errors.ConfigError, ValueError),
        (errors.UsageError, TypeError),
        (errors.ClientClosed, RuntimeError),
        (errors.TransportError, ConnectionError),
        (errors.ConnectFailed, ConnectionError),
        (errors.Refused, ConnectionError),
        (errors.Unserialisable, TypeError),
        (errors.ModuleMissing, ModuleNotFoundError),
        (errors.TaskCancelled, concurrent.futures.CancelledError),
        (errors.ResultTimeout, TimeoutError),
        (errors.FrameTooLarge, ValueError),
    ],
)
def test_who_catches_the_standard_class_catches_ours(
    kind: type[ZFabricError], standard: type[BaseException]
) -> None:
    with pytest.raises(standard):
        raise built(kind)


def test_the_sentences_say_what_to_do_next() -> None:
    assert "zfabric broker" in str(errors.ConnectFailed("tcp://x:1", 5.0))
    assert "port" in str(errors.AddressInUse("tcp://x:1"))
    text = str(errors.Unserialisable("args[1]['db']._lock", "_thread.lock"))
    assert "args[1]['db']._lock" in text and "_thread.lock" in text
    assert str(errors.InternalError("bug", ["first", "second"])).splitlines() == [
        "bug",
        "  first",
        "  second",
    ]


def test_a_missing_module_has_the_name_that_importers_look_for() -> None:
    error = pickle.loads(pickle.dumps(errors.ModuleMissing("foo.bar", "/home/me/foo/bar.py")))
    assert error.name == error.module == "foo.bar" and error.file == "/home/me/foo/bar.py"
    assert "module foo.bar (from /home/me/foo/bar.py)" in str(error)


def test_the_picture_at_the_head_of_the_file_is_complete() -> None:
    assert errors.__doc__ is not None
    missing = [kind.__name__ for kind in KINDS if kind.__name__ not in errors.__doc__]
    assert not missing


@pytest.mark.parametrize("path", ["result", "result['db']", "result.lock"])
def test_a_result_is_not_returned_rather_than_not_sent(path: str) -> None:
    text = str(errors.Unserialisable(path, "_thread.lock"))
    assert f"cannot return {path}" in text and "plain data" in text and "sent" not in text
    assert "Nothing was sent" in str(errors.Unserialisable("results", "_thread.lock"))
