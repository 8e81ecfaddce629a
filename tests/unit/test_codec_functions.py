"""Functions travel once, and again when something that they captured has changed."""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import math
import operator
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zfabric.codec import functions
from zfabric.codec.functions import dump_function, largest_captures, load_function
from zfabric.errors import CodecError, Unserialisable, UsageError


def in_main(source: str) -> dict[str, Any]:
    """The globals of a script that was run: its functions and classes travel by value."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "script.py", "exec"), space)
    return space


class Counter:
    def __init__(self, start: int) -> None:
        self.n = start

    def __call__(self, x: int) -> int:
        return self.n + x

    def add(self, x: int) -> int:
        return self.n + x


@pytest.mark.parametrize(
    ("fn", "args", "answer", "name"),
    [
        (pow, (2, 3), 8, "pow"),
        (json.dumps, ([1],), "[1]", "dumps"),
        (int, ("7",), 7, "int"),
        (math.sqrt, (9,), 3.0, "sqrt"),
        (str.upper, ("a",), "A", "str.upper"),
        ("abc".startswith, ("a",), True, "str.startswith"),
        (np.add, (1, 2), 3, "add"),
        (operator.itemgetter(1), ([4, 5],), 5, "itemgetter"),
        (functools.partial(pow, 2), (5,), 32, "pow"),
        (Counter, (1,), None, "Counter"),
        (Counter(4), (3,), 7, "Counter"),
        (Counter(5).add, (3,), 8, "Counter.add"),
        (lambda x: x + 1, (1,), 2, "<lambda>"),
    ],
)
def test_any_callable_travels(fn: Any, args: Any, answer: Any, name: str) -> None:
    dumped = dump_function(fn)
    assert dumped.name == name
    assert 0 <= dumped.id < 1 << 63
    assert dump_function(fn) == dumped
    back = load_function(dumped.blob)(*args)
    assert answer is None or back == answer


def test_importable_functions_are_remembered_as_their_address() -> None:
    assert dump_function(json.loads) is dump_function(json.loads)
    assert load_function(dump_function(json.loads).blob) is json.loads
    assert b"json" in dump_function(json.loads).blob
    assert len(dump_function(json.loads).blob) < 100


SCRIPT = """
import math
BASE, TABLE = 10, [1]
class Point:
    scale = 2
    def __init__(self, x): self.x = x
    @property
    def far(self): return self.x * self.scale
    @staticmethod
    def zero(): return 0
def helper(x): return x + BASE
def steady(x, y=1): return math.floor(x) + helper(y)
def uses_class(x): return Point(x).far
def uses_list(x): return TABLE[0] + x
def even(n): return n == 0 or odd(n - 1)
def odd(n): return n != 0 and even(n - 1)
def keyword(x, *, k=1): return x + k
"""


def test_a_function_by_value_is_remembered_while_nothing_changed() -> None:
    space = in_main(SCRIPT)
    for name in ("steady", "uses_class", "even", "keyword", "helper"):
        assert dump_function(space[name]) is dump_function(space[name]), name
    assert load_function(dump_function(space["even"]).blob)(10) is True


@pytest.mark.parametrize(
    ("name", "change", "before", "after"),
    [
        ("helper", "BASE = 20", 11, 21),
        ("steady", "BASE = 20", 12, 22),
        ("steady", "def helper(x): return 100", 12, 101),
        ("steady", "math = type('m', (), {'floor': staticmethod(lambda x: 5)})", 12, 16),
        ("steady", "steady.__defaults__ = (3,)", 12, 14),
        ("steady", "steady.__code__ = helper.__code__", 12, 11),
        ("uses_class", "Point.scale = 3", 2, 3),
        ("uses_class", "Point.far = property(lambda self: 77)", 2, 77),
        ("uses_class", "class Point:\n def __init__(self, x): self.far = 9", 2, 9),
        ("uses_list", "TABLE[0] = 5", 2, 6),
        ("uses_list", "TABLE = (7,)", 2, 8),
        ("keyword", "keyword.__kwdefaults__['k'] = 6", 2, 7),
        ("even", "def odd(n): return 'changed'", False, "changed"),
        ("helper", "def sum2(x): return 0\nBASE = -1", 11, 0),
    ],
)
def test_a_change_is_seen(name: str, change: str, before: Any, after: Any) -> None:
    space = in_main(SCRIPT)
    fn = space[name]
    first = dump_function(fn)
    assert load_function(first.blob)(1) == before
    exec(change, space)
    second = dump_function(fn)
    assert load_function(second.blob)(1) == after
    assert second.id != first.id


def test_closure_cells_are_watched() -> None:
    def make(n: int) -> Any:
        def get(x: int) -> int:
            return n + x

        def put(value: int) -> None:
            nonlocal n
            n = value

        return get, put

    get, put = make(1)
    assert dump_function(get) is dump_function(get)
    put(5)
    assert load_function(dump_function(get).blob)(1) == 6


def test_a_shadowed_builtin_is_seen() -> None:
    space = in_main("def f(x): return len(x)")
    first = dump_function(space["f"])
    exec("def len(x): return -1", space)
    assert load_function(first.blob)("abc") == 3
    assert load_function(dump_function(space["f"]).blob)("abc") == -1


def test_decorated_functions_travel() -> None:
    space = in_main(
        "import functools\n"
        "def twice(f):\n"
        "    @functools.wraps(f)\n"
        "    def inner(x): return f(f(x))\n"
        "    return inner\n"
        "@twice\n"
        "def add(x): return x + 1\n"
    )
    assert load_function(dump_function(space["add"]).blob)(1) == 3
    assert dump_function(space["add"]) is dump_function(space["add"])


def test_forgotten_functions_leave_nothing_behind() -> None:
    def make() -> Any:
        def ping(n: int) -> Any:
            return pong(n)

        def pong(n: int) -> Any:
            return ping(n) if n else 0

        return ping

    gc.collect()  # functions of earlier tests
    held = len(functions._by_value)
    fn = make()
    dump_function(fn)
    assert len(functions._by_value) == held + 1
    gone = weakref.ref(fn)
    del fn
    gc.collect()
    assert gone() is None and len(functions._by_value) == held


def test_mutable_captures_and_instances_are_dumped_anew() -> None:
    counter = Counter(1)
    first, method = dump_function(counter), dump_function(counter.add)
    counter.n = 2
    assert load_function(dump_function(counter).blob)(1) == 3
    assert load_function(dump_function(counter.add).blob)(1) == 3
    assert dump_function(counter).id != first.id and dump_function(counter.add).id != method.id


def test_what_is_no_function() -> None:
    with pytest.raises(UsageError, match="instead of submit"):
        dump_function(5)  # type: ignore[arg-type]


def test_the_path_into_a_closure() -> None:
    lock = threading.Lock()

    def task() -> object:
        return lock

    with pytest.raises(Unserialisable, match=r"task\.__closure__\[lock\]") as caught:
        dump_function(task)
    assert caught.value.type_name == "_thread.lock"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that is imported here and nowhere else."""
    file = tmp_path / "zf_only_here.py"
    file.write_text("K = 3\ndef f(x): return x + K\nclass C:\n    def m(self): return 1\n")
    spec = importlib.util.spec_from_file_location("zf_only_here", file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "zf_only_here", made)
    spec.loader.exec_module(made)
    return made


LOADER = """
import sys
from zfabric.codec.functions import load_function
try:
    print(load_function(sys.stdin.buffer.read())(1))
except Exception as exc:
    print(type(exc).__name__, exc)
"""


def elsewhere(blob: bytes) -> str:
    """What another process says when it loads and calls the function with 1."""
    done = subprocess.run([sys.executable, "-c", LOADER], input=blob, capture_output=True)
    return done.stdout.decode() + done.stderr.decode()


def test_a_missing_module_is_named_with_its_origin(module: types.ModuleType) -> None:
    said = elsewhere(dump_function(module.f).blob)
    assert said.startswith("ModuleMissing module")
    assert f"module zf_only_here (from {module.__file__}) is not on the worker" in said
    assert "install it there" in said and "register_by_value(zf_only_here)" in said
    space = in_main("import zf_only_here\ndef g(x): return zf_only_here.f(x)")
    said = elsewhere(dump_function(space["g"]).blob)
    assert f"module zf_only_here (from {module.__file__}) is not on the worker" in said


def test_modules_registered_by_value_travel(module: types.ModuleType) -> None:
    from zfabric.codec.arguments import dump_call

    dump_function(module.f)
    functions.register_by_value(module)
    try:
        assert elsewhere(dump_function(module.f).blob).strip() == "4"
        assert dump_function(module.f) is dump_function(module.f)
        blob = dump_call((module.C(),), {})[0][0]
        assert b"_make_skel" in bytes(blob) or b"_make_skeleton_class" in bytes(blob)
    finally:
        functions.unregister_by_value(module)
    assert "is not on the worker" in elsewhere(dump_function(module.f).blob)
    with pytest.raises(UsageError, match="import it first"):
        functions.register_by_value("zf_only_here")  # type: ignore[arg-type]


def test_another_version_of_a_module_is_told(module: types.ModuleType) -> None:
    dumped = dump_function(module.f)
    del module.f
    with pytest.raises(CodecError, match=r"zf_only_here on the worker .* has no f"):
        load_function(dumped.blob)


@pytest.mark.parametrize("blob", [b"", b"junk", b"\x80\x05N.", b"\x80\x05]."])
def test_broken_blobs(blob: bytes) -> None:
    with pytest.raises(CodecError):
        load_function(blob)


def test_largest_captures() -> None:
    big, small = np.zeros(1 << 20), [1, 2]
    text = "x" * 3000

    def task(x: int, extra: bytes = bytes(5000)) -> object:
        return big, small, json, text

    found = largest_captures(task, count=3)
    assert [name for name, _ in found] == ["big", "extra", "text"]
    assert found[0][1] >= big.nbytes
    partial = functools.partial(task, 1, extra=bytes(9 << 20))
    assert largest_captures(partial)[0][0] in ("extra", "big")
    assert largest_captures(json.dumps) == []
    holder = Counter(bytes(1 << 20))  # type: ignore[arg-type]
    assert largest_captures(holder.add)[0][0] == "self"
