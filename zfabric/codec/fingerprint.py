"""Whether a function that travels by value would still make the same blob.

Pickling a closure takes 50 µs and more; looking whether anything it captured has changed takes
two. A fingerprint holds, for the function and for each function and class by value that it reaches,
the very objects that were captured: code, defaults, cells, the globals that the code names. It
holds while all of them are the same objects, *provided they are of kinds that cannot change
inside*. One list, array or open object among them and the fingerprint is not `steady`: then the
function is pickled again each time, since nothing cheap can tell whether it changed.

Functions and classes are remembered weakly, or two local functions that call one another would
keep themselves alive through our memory of them.

Names are taken from `co_names`, which has attributes as well as globals. A global that is named
like an attribute is watched for nothing; that costs 40 ns and never a wrong answer.
"""

from __future__ import annotations

import sys
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    ModuleType,
)
from typing import Any
from weakref import ref

from zfabric.codec.by_value import SPAWNED_MAIN, names_by_value
from zfabric.codec.diagnose import names_in

_ATOMS = frozenset({int, float, bool, type(None), str, bytes, complex, type(...), range, slice})

# Immutable types that live in modules we do not import for their sake.
_STEADY_TYPES = frozenset(
    {
        ("re", "Pattern"),
        ("decimal", "Decimal"),
        ("fractions", "Fraction"),
        ("uuid", "UUID"),
        ("datetime", "datetime"),
        ("datetime", "date"),
        ("datetime", "time"),
        ("datetime", "timedelta"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
    }
)

# Of a class, what Python or a decorator derives from the rest.
_DERIVED = frozenset(
    {"__dict__", "__weakref__", "__annotations__", "_abc_impl", "__dataclass_fields__"}
    | {"__dataclass_params__", "__annotations_cache__", "__annotate_func__"}
)

_MISSING: Any = object()
_PLAIN_DICT: dict[str, Any] = {}


class _FunctionRecord:
    """One function as it was. `values` are boxed: functions and classes as weak references."""

    __slots__ = ("cells", "code", "defaults", "function", "keywords", "names", "values", "extra")

    def __init__(self, function: FunctionType) -> None:
        self.function = ref(function)
        self.code = function.__code__
        self.defaults = function.__defaults__
        self.keywords = dict(function.__kwdefaults__ or _PLAIN_DICT)
        self.extra = {name: _box(item) for name, item in function.__dict__.items()}
        self.cells = [_box(_content(cell)) for cell in function.__closure__ or ()]
        self.names = tuple(_names(function.__code__))
        space = function.__globals__
        self.values = [_box(space.get(name, _MISSING)) for name in self.names]

    def holds(self, function: Any) -> bool:
        if function.__code__ is not self.code or function.__defaults__ is not self.defaults:
            return False
        space = function.__globals__
        for name, value in zip(self.names, self.values, strict=True):
            now = space.get(name, _MISSING)
            if now is not value and not (type(value) is ref and value() is now):
                return False
        if self.cells:
            for cell, value in zip(function.__closure__ or (), self.cells, strict=True):
                now = _content(cell)
                if now is not value and not (type(value) is ref and value() is now):
                    return False
        keywords = function.__kwdefaults__
        if (keywords or self.keywords) and not _same_items(keywords or {}, self.keywords):
            return False
        return not (self.extra or function.__dict__) or _same_items(function.__dict__, self.extra)


class _ClassRecord:
    """One class by value as it was: its own dictionary, item by item."""

    __slots__ = ("bases", "function", "items")

    def __init__(self, kind: type) -> None:
        self.function = ref(kind)
        self.bases = kind.__bases__
        self.items = {name: _box(item) for name, item in vars(kind).items()}

    def holds(self, kind: Any) -> bool:
        return kind.__bases__ == self.bases and _same_items(vars(kind), self.items)


class Fingerprint:
    """What a function had captured. `modules` are the names of modules that it refers to."""

    __slots__ = ("modules", "records", "steady")

    def __init__(self) -> None:
        self.steady = True
        self.modules: set[str] = set()
        self.records: list[_FunctionRecord | _ClassRecord] = []

    def holds_for(self, fn: Any) -> bool:
        """Would pickling `fn`, whose fingerprint this is, give the same again?"""
        records = self.records
        if not records[0].holds(fn):
            return False
        for record in records[1:]:
            part = record.function()
            if part is None or not record.holds(part):
                return False
        return True


def fingerprint(fn: Any) -> Fingerprint:
    """The fingerprint of any callable; steady only for plain functions with steady captures."""
    mark = Fingerprint()
    mark.steady = type(fn) is FunctionType
    seen: set[int] = set()
    waiting = [fn]
    while waiting:
        _visit(waiting.pop(), mark, seen, waiting)
    return mark


def _visit(item: Any, mark: Fingerprint, seen: set[int], waiting: list[Any]) -> None:
    kind = type(item)
    if kind in _ATOMS or item is _MISSING or id(item) in seen:
        return
    seen.add(id(item))
    if isinstance(item, ModuleType):
        mark.modules.add(item.__name__)
        if sys.modules.get(item.__name__) is not item or _is_by_value(item.__name__):
            mark.steady = False
    elif (address := importable_name(item)) is not None:
        mark.modules.add(address[0])
    elif kind is FunctionType:
        mark.records.append(_FunctionRecord(item))
        space = item.__globals__
        waiting.extend(space.get(name, _MISSING) for name in _names(item.__code__))
        waiting.extend(_content(cell) for cell in item.__closure__ or ())
        waiting.extend(item.__defaults__ or ())
        waiting.extend((item.__kwdefaults__ or _PLAIN_DICT).values())
        waiting.extend(item.__dict__.values())
    elif kind is tuple or kind is frozenset:
        # Functions inside would be held by us through the container, so only plain contents.
        if not all(type(part) in _ATOMS or type(part) is tuple for part in item):
            mark.steady = False
        waiting.extend(item)
    elif isinstance(item, type):
        mark.records.append(_ClassRecord(item))
        waiting.extend(item.__bases__)
        if type(item) is not type:
            waiting.append(type(item))
        waiting.extend(part for name, part in vars(item).items() if name not in _DERIVED)
    elif kind is staticmethod or kind is classmethod:
        waiting.append(item.__func__)
    elif kind is property:
        waiting.extend((item.fget, item.fset, item.fdel))
    elif kind is MemberDescriptorType or kind is GetSetDescriptorType:
        pass  # slots: as fixed as the class
    else:
        mark.modules.add(kind.__module__)
        if (kind.__module__, kind.__qualname__) not in _STEADY_TYPES:
            mark.steady = False


def importable_name(obj: Any) -> tuple[str, str] | None:
    """(module, qualified name) if another process can look the object up by them, else None.

    Never so for what is in `__main__` or in a module registered by value.
    """
    if not isinstance(obj, FunctionType | BuiltinFunctionType | type):
        return None
    module = getattr(obj, "__module__", None)
    if isinstance(obj, BuiltinFunctionType) and module is None:
        return None  # a method of some object: "abc".upper
    name = getattr(obj, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return None
    found: Any = sys.modules.get(module)
    if found is None or _is_by_value(module):
        return None
    for part in name.split("."):
        found = getattr(found, part, _MISSING)
        if found is _MISSING:
            return None
    return (module, name) if found is obj else None


def origin(module: str) -> str | None:
    """The file of a module that a worker may lack: None for the standard library."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in ("__main__", SPAWNED_MAIN):
        return None
    file = getattr(sys.modules.get(module), "__file__", None)
    return file if isinstance(file, str) else None


def _is_by_value(module: str) -> bool:
    names = names_by_value()
    return bool(names) and any(module == name or module.startswith(name + ".") for name in names)


def _box(item: Any) -> Any:
    return ref(item) if isinstance(item, FunctionType | type) else item


def _same_items(now: Any, then: dict[str, Any]) -> bool:
    if len(now) != len(then):
        return False
    for name, value in then.items():
        item = now.get(name, _MISSING)
        if item is not value and not (type(value) is ref and value() is item):
            return False
    return True


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING  # not filled yet


def _names(code: CodeType) -> tuple[str, ...]:
    return tuple(sorted(names_in(code)))
