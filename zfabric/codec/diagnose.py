"""Which part of an object cannot be pickled, and how to get there.

Runs only after pickling has failed. Walks from the object into its parts and, at each level,
tries to pickle each part by itself; the first that fails is entered. The deepest failing part is
the culprit. Parts are what pickle would visit: items, attributes, slots, what `__reduce_ex__`
hands out, and for functions the closure, the defaults and the globals that the code names.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from zfabric.codec.references import here
from zfabric.errors import Unserialisable

MAX_DEPTH = 50
MAX_SECONDS = 2.0
"""The walk ends here with the deepest part found so far: a vague path beats a long wait."""

_Parts = Iterator[tuple[str, Any]]
_Found = tuple[str, Any, str]  # path, culprit, reason


def unserialisable(names: dict[str, object], cause: BaseException) -> Unserialisable:
    """The error that names the culprit in one of the objects. names: what each is called."""
    before = here.seen
    here.seen = {}  # futures inside are fine; what is wrong is something else
    try:
        walk = _Walk()
        for name, obj in names.items():
            found = walk.culprit(name, obj, 0)
            if found is not None:
                return Unserialisable(found[0], type_name(found[1]), found[2])
        if walk.suspect is not None:
            path, suspect, reason = walk.suspect
            return Unserialisable(path, type_name(suspect), reason)
    finally:
        here.seen = before
    # Each part passes by itself: the failure needs the whole, as nesting that is too deep does.
    name, obj = next(iter(names.items()))
    return Unserialisable(name, type_name(obj), _text(cause))


def type_name(obj: object) -> str:
    """A type's full name, without `builtins`."""
    kind = type(obj)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)


def _failure(obj: object) -> str | None:
    """Why the object cannot be pickled, or None if it can."""
    from zfabric.codec.serialise import PROTOCOL, by_value_pickler

    try:
        by_value_pickler()(_Nowhere(), PROTOCOL, buffer_callback=_drop).dump(obj)
    except Exception as exc:
        return _text(exc)
    return None


def _drop(buffer: Any) -> None:
    """Buffers are bytes: nothing to test, nothing to keep. None means out of band."""


class _Walk:
    """One search, depth first, each object once."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.deadline = time.monotonic() + MAX_SECONDS
        # The first object that fails, has no culprit below it, but leads back to one that is
        # being looked at: most likely it fails for what is elsewhere in that one.
        self.suspect: _Found | None = None

    def culprit(self, path: str, obj: Any, depth: int) -> _Found | None:
        """The deepest part that fails by itself, or None if the object is not to blame."""
        reason = _failure(obj)
        if reason is None:
            return None
        self.seen.add(id(obj))
        leads_back = False
        if depth < MAX_DEPTH:
            for step, part in _parts(obj):
                if time.monotonic() > self.deadline:
                    break
                if id(part) in self.seen:
                    leads_back = True
                    continue
                found = self.culprit(path + step, part, depth + 1)
                if found is not None:
                    return found
        if leads_back:
            self.suspect = self.suspect or (path, obj, reason)
            return None
        return path, obj, reason


def _parts(obj: Any) -> _Parts:
    """(step of the path, part), best known way first. Never raises."""
    ways = (_items, _function_parts, _attributes, _reduced)
    for way in ways:
        try:
            yield from way(obj)
        except Exception:
            # An object whose own hooks raise: the other ways may still lead on.
            continue


def _items(obj: Any) -> _Parts:
    if isinstance(obj, dict):
        for key, item in list(obj.items()):
            yield f"[{_key(key)}]", item
            yield f".key({_key(key)})", key
    elif isinstance(obj, list | tuple):
        names = getattr(type(obj), "_fields", None)
        for index, item in enumerate(obj):
            yield (f".{names[index]}" if names else f"[{index}]"), item
    elif isinstance(obj, set | frozenset):
        for item in list(obj):
            yield "{" + _key(item) + "}", item


def _function_parts(obj: Any) -> _Parts:
    if isinstance(obj, MethodType):
        yield ".__self__", obj.__self__
        yield ".__func__", obj.__func__
    elif isinstance(obj, functools.partial):
        yield ".func", obj.func
        for index, item in enumerate(obj.args):
            yield f".args[{index}]", item
        for name, item in obj.keywords.items():
            yield f".keywords[{name!r}]", item
    elif isinstance(obj, FunctionType):
        for name, cell in zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=False):
            try:
                yield f".__closure__[{name}]", cell.cell_contents
            except ValueError:
                continue  # not filled yet
        for index, item in enumerate(obj.__defaults__ or ()):
            yield f".__defaults__[{index}]", item
        for name, item in (obj.__kwdefaults__ or {}).items():
            yield f".__kwdefaults__[{name}]", item
        for name in sorted(names_in(obj.__code__)):
            if name in obj.__globals__:
                yield f".__globals__[{name}]", obj.__globals__[name]


def names_in(code: CodeType) -> set[str]:
    """Every name that a code object, or one inside of it, looks up: globals and attributes."""
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            names |= names_in(const)
    return names


def _attributes(obj: Any) -> _Parts:
    state = getattr(obj, "__dict__", None)
    for name, item in list(state.items()) if state else ():
        if isinstance(obj, type):
            item = getattr(item, "__func__", getattr(item, "fget", item))
        yield f".{name}", item
    for kind in type(obj).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(obj, name):
                yield f".{name}", getattr(obj, name)


def _reduced(obj: Any) -> _Parts:
    """What the object's own reduction hands to pickle, when nothing nearer was found."""
    if isinstance(obj, type | FunctionType):
        return
    reduced = obj.__reduce_ex__(5)
    if not isinstance(reduced, tuple):
        return
    for index, item in enumerate(reduced[1]):
        yield f".__reduce__[1][{index}]", item
    state = reduced[2] if len(reduced) > 2 else None
    if isinstance(state, dict):
        for name, item in state.items():
            yield f".{name}", item
    elif state is not None:
        yield ".__getstate__()", state
    for place in (3, 4):
        if len(reduced) > place and reduced[place] is not None:
            yield f".__reduce__[{place}]", list(reduced[place])


def _key(key: object) -> str:
    try:
        text = repr(key)
    except Exception:
        return f"<{type_name(key)}>"
    return text if len(text) <= 60 else text[:57] + "..."


def _text(exc: BaseException) -> str:
    if isinstance(exc, RecursionError) or isinstance(exc.__cause__, RecursionError):
        return "it is nested too deeply"
    try:
        return str(exc)[:300] or type(exc).__name__
    except Exception:
        return type(exc).__name__
