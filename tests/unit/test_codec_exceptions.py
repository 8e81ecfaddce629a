"""Errors keep their type, bring their traceback, and never break the one who carries them."""

from __future__ import annotations

import copyreg
import pickle
import threading
import traceback
from typing import Any

import pytest

from zfabric.codec import exceptions
from zfabric.codec.exceptions import RemoteTraceback, dump_exception, load_exception
from zfabric.errors import CodecError, KilledTask, TaskFailed


class NeedsTwo(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")
        self.a = a


class SaysHello(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(f"hello {name}")


class HasLock(Exception):
    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


class BadText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class BadReduce(Exception):
    def __reduce__(self) -> Any:
        raise ValueError("no")


class ExitsInReduce(Exception):
    def __reduce__(self) -> Any:
        raise SystemExit(3)


class FailsToLoad(Exception):
    def __reduce__(self) -> Any:
        return int, ("not a number",)


class LoadsAsOther(Exception):
    def __reduce__(self) -> Any:
        return int, ("5",)


def sent(exc: BaseException, **options: Any) -> BaseException:
    """The exception, raised here and loaded again."""
    try:
        raise exc
    except BaseException as caught:
        return load_exception(dump_exception(caught, **options))


def remote_text(exc: BaseException) -> str:
    while exc.__cause__ is not None:
        exc = exc.__cause__
    assert type(exc) is RemoteTraceback
    return exc.text


@pytest.mark.parametrize(
    ("exc", "text"),
    [
        (ValueError("v"), "v"),
        (KeyError("k"), "'k'"),
        (FileNotFoundError(2, "No such file", "/x"), "[Errno 2] No such file: '/x'"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), None),
        (KeyboardInterrupt(), ""),
        (SystemExit(3), "3"),
        (NeedsTwo(1, 2), "1 and 2"),
        (SaysHello("you"), "hello you"),
        (HasLock(), "locked"),
        (KilledTask("gone", attempts=("one", "two")), "gone"),
        (StopIteration(5), "5"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_type_and_the_text_are_kept(exc: BaseException, text: str | None) -> None:
    back = sent(exc)
    assert type(back) is type(exc)
    assert str(back) == (str(exc) if text is None else text)
    assert f"{type(exc).__name__}" in remote_text(back)
    assert __file__ in remote_text(back) and "in sent" in remote_text(back)


def test_attributes_and_args_are_kept() -> None:
    back = sent(NeedsTwo(1, 2))
    assert isinstance(back, NeedsTwo) and back.a == 1 and back.args == ("1 and 2",)
    back = sent(SystemExit(3))
    assert isinstance(back, SystemExit) and back.code == 3
    killed = sent(KilledTask("gone", attempts=("one",)))
    assert isinstance(killed, KilledTask) and killed.attempts == ("one",)


@pytest.mark.parametrize("kind", [BadReduce, ExitsInReduce, FailsToLoad, LoadsAsOther])
def test_what_does_not_travel_becomes_task_failed(kind: type[Exception]) -> None:
    back = sent(kind("why"))
    assert isinstance(back, TaskFailed)
    assert back.type_name.endswith(kind.__name__) and "why" in str(back)
    assert "in sent" in back.traceback and "in sent" in remote_text(back)


def test_text_hooks_that_raise() -> None:
    back = sent(BadText())
    assert type(back) is BadText
    assert "BadText" in remote_text(back)


def test_local_classes_travel() -> None:
    class Local(Exception):
        pass

    back = sent(Local("x"))
    assert type(back) is Local and back.args == ("x",)


def test_cause_context_and_notes() -> None:
    cause = ZeroDivisionError("zero")
    exc = KeyError("k")
    exc.add_note("look here")
    exc.__cause__ = cause
    back = sent(exc)
    assert type(back.__cause__) is ZeroDivisionError
    assert type(back.__cause__.__cause__) is RemoteTraceback
    assert back.__notes__ == ["look here"]
    text = remote_text(back)
    assert "zero" in text and "direct cause" in text and "look here" in text
    printed = "".join(traceback.format_exception(back))
    assert printed.index("RemoteTraceback") < printed.index("ZeroDivisionError: zero\n\nThe above")

    other = ValueError("v")
    other.__context__ = NeedsTwo(3, 4)
    back = sent(other)
    assert type(back.__context__) is NeedsTwo and "3 and 4" in remote_text(back)


def test_a_cause_that_does_not_travel_is_stood_in_for() -> None:
    exc = ValueError("v")
    exc.__cause__ = BadReduce("b")
    back = sent(exc)
    assert type(back) is ValueError and isinstance(back.__cause__, TaskFailed)
    assert back.__cause__.type_name.endswith("BadReduce")


def test_causes_in_a_ring_and_long_chains() -> None:
    a, b = ValueError("a"), KeyError("b")
    a.__cause__, b.__cause__ = b, a
    back = sent(a)
    assert type(back) is ValueError and type(back.__cause__) is KeyError
    assert back.__cause__.__cause__ is back
    last: BaseException = ValueError("0")
    for number in range(500):
        following = ValueError(str(number))
        following.__cause__ = last
        last = following
    back = sent(last)
    assert type(back) is ValueError and str(back) == "499"


def test_groups() -> None:
    inner = NeedsTwo(1, 2)
    inner.__cause__ = KeyError("deep")
    group = ExceptionGroup("several", [ValueError(1), inner, ExceptionGroup("x", [BadReduce("z")])])
    back = sent(group)
    assert type(back) is ExceptionGroup and back.message == "several"
    one, two, three = back.exceptions
    assert type(one) is ValueError and type(two) is NeedsTwo
    assert type(two.__cause__) is KeyError
    assert isinstance(three.exceptions[0], TaskFailed)
    assert "several" in remote_text(back)


def test_long_messages_are_cut_and_the_type_stays() -> None:
    blob = dump_exception(ValueError("x" * 5_000_000))
    assert len(blob) < exceptions.LIMIT
    back = load_exception(blob)
    assert type(back) is ValueError and "characters left out" in str(back)
    large = RuntimeError(bytes(1 << 20))
    blob = dump_exception(large)
    assert len(blob) < exceptions.LIMIT
    assert isinstance(load_exception(blob), TaskFailed)
    for limit in (0, 100, 2000, 20_000):
        blob = dump_exception(ValueError("x" * 100_000), limit)
        assert len(blob) < limit + 10_000
        assert "ValueError" in str(load_exception(blob)) or type(load_exception(blob)) is ValueError


def test_deep_recursion_is_short() -> None:
    def sink(n: int) -> None:
        sink(n + 1)

    try:
        sink(0)
    except RecursionError as exc:
        blob = dump_exception(exc)
    back = load_exception(blob)
    assert type(back) is RecursionError and len(remote_text(back)) < 5000


def test_our_own_frames_above_the_task_are_dropped() -> None:
    space: dict[str, Any] = {}
    slot = exceptions._OURS + "runtime/slot.py"
    exec(compile("def run(fn):\n    return fn()", slot, "exec"), space)

    def task() -> None:
        raise ValueError("from the task")

    try:
        space["run"](task)
    except ValueError as exc:
        exc.__traceback__ = exc.__traceback__.tb_next  # type: ignore[union-attr]
        text = exceptions.traceback_text(exc)
    assert "in task" in text and "slot.py" not in text and text.startswith("Traceback")


def test_where_it_happened_stands_first() -> None:
    back = sent(ValueError("v"), where="task f(3) on worker w1")
    assert remote_text(back).startswith("task f(3) on worker w1\nTraceback")


def test_an_exception_may_be_sent_on() -> None:
    once = sent(ValueError("v"))
    twice = sent(once)
    assert type(twice) is ValueError and type(twice.__cause__) is RemoteTraceback
    assert str(pickle.loads(pickle.dumps(RemoteTraceback("abc")))) == str(RemoteTraceback("abc"))


@pytest.mark.parametrize("blob", [b"", b"junk", pickle.dumps(5), pickle.dumps((1, 2))])
def test_broken_blobs(blob: bytes) -> None:
    assert isinstance(load_exception(blob), CodecError)


def test_reducers_that_others_registered_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tblib does, which Dask installs: exceptions put together without their `__init__`."""
    spoilt = {
        kind: lambda exc: (type(exc).__new__, (type(exc),)) for kind in (SystemExit, KeyError)
    }
    monkeypatch.setattr(copyreg, "dispatch_table", {**copyreg.dispatch_table, **spoilt})
    assert sent(SystemExit(3)).code == 3
    assert sent(KeyError("name")).args == ("name",)
