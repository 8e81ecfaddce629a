"""Functions travel once: as a blob with an id, known to a worker by that id from then on.

A function that can be imported travels as its address (module, name, file of origin, so that a
worker without the module can say what is missing). Any other, from `__main__`, a notebook, a
closure, travels by value: a cloudpickle stream and the files of the modules it refers to.

`dump_function` is called for every submit, so both kinds are remembered. For a function by value
that is only right while nothing it captured has changed; `fingerprint.py` decides that.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from hashlib import blake2b
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import ref

from zfabric.codec.fingerprint import Fingerprint, fingerprint, importable_name, origin
from zfabric.codec.serialise import PROTOCOL, Buffer, dumps, nbytes_of, pickle_by_value, unreadable
from zfabric.errors import CodecError, ModuleMissing, UsageError
from zfabric.ids import FunctionId


class DumpedFunction(NamedTuple):
    """A function ready to travel."""

    id: FunctionId
    name: str
    blob: bytes


class _Remembered(NamedTuple):
    function: ref[Any]
    fingerprint: Fingerprint
    dumped: DumpedFunction


# By identity of the function. Importable ones are held, as their modules hold them anyway;
# the others weakly: an entry goes when its function does.
_importable: dict[int, tuple[Any, DumpedFunction]] = {}
_by_value: dict[int, _Remembered] = {}


def dump_function(fn: Callable[..., Any]) -> DumpedFunction:
    """(id, name, blob) of a callable, as it is now: changed globals or cells give a new blob.

    Raises Unserialisable with the path to what cannot travel
    (`task.__closure__[lock]`), UsageError if `fn` is not callable.
    """
    key = id(fn)
    held = _importable.get(key)
    if held is not None:
        return held[1]
    remembered = _by_value.get(key)
    if remembered is not None and remembered.function() is fn:
        if remembered.fingerprint.holds_for(fn):
            return remembered.dumped
    return _dump(fn)


def _dump(fn: Callable[..., Any]) -> DumpedFunction:
    if not callable(fn):
        raise UsageError(
            f"an object of type {type(fn).__name__} was given where a function belongs; "
            "write submit(f, x) instead of submit(f(x))"
        )
    name = name_of(fn)
    address = importable_name(fn)
    if address is not None:
        module, qualname = address
        dumped = _with_id(name, pickle.dumps((module, qualname, origin(module) or ""), PROTOCOL))
        _importable[id(fn)] = (fn, dumped)
        return dumped
    mark = fingerprint(fn)
    try:
        stream = pickle_by_value(fn)
    except (UsageError, MemoryError):
        raise
    except Exception as exc:
        from zfabric.codec.diagnose import unserialisable

        raise unserialisable({name: fn}, exc) from exc
    origins = {module: file for module in sorted(mark.modules) if (file := origin(module))}
    dumped = _with_id(name, pickle.dumps([stream, origins], PROTOCOL))
    if mark.steady:
        key = id(fn)
        try:
            alive = ref(fn, lambda gone: _forget(key, gone))
        except TypeError:
            return dumped  # cannot be watched, so its id cannot be trusted later
        _by_value[key] = _Remembered(alive, mark, dumped)
    return dumped


def _forget(key: int, gone: ref[Any]) -> None:
    remembered = _by_value.get(key)
    if remembered is not None and remembered.function is gone:
        _by_value.pop(key, None)


def _with_id(name: str, blob: bytes) -> DumpedFunction:
    number = int.from_bytes(blake2b(blob).digest()[:8], "little") >> 1
    return DumpedFunction(FunctionId(number), name, blob)


def name_of(fn: Any) -> str:
    """What people call it: for logs, errors and progress bars."""
    for _ in range(10):
        inner = getattr(fn, "func", None)  # functools.partial
        if inner is None or hasattr(fn, "__qualname__"):
            break
        fn = inner
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    return name if isinstance(name, str) else type(fn).__qualname__


def load_function(blob: Buffer) -> Callable[..., Any]:
    """The callable. Raises CodecError; if a module is missing here, ModuleMissing, whose text
    says which, from where it came, and what to do."""
    try:
        packed = pickle.loads(blob)
        if type(packed) is tuple:
            module, qualname, file = packed
        else:
            stream, origins = packed
    except Exception as exc:
        raise CodecError(f"the received function could not be loaded: {exc}") from exc
    if type(packed) is tuple:
        return _import(module, qualname, file)
    try:
        function: Callable[..., Any] = pickle.loads(stream)
    except ModuleNotFoundError as exc:
        raise _missing(exc.name or str(exc), origins) from exc
    except Exception as exc:
        raise unreadable(exc) from exc
    return function


def _import(module: str, qualname: str, file: str) -> Callable[..., Any]:
    try:
        __import__(module)
    except ModuleNotFoundError as exc:
        missing = exc.name or module
        raise _missing(missing, {module: file} if file else {}) from exc
    except Exception as exc:
        raise CodecError(
            f"importing module {module}, which has {qualname}, failed on the worker: "
            f"{type(exc).__name__}: {exc}"
        ) from exc
    found: Any = sys.modules[module]
    try:
        for part in qualname.split("."):
            found = getattr(found, part)
    except AttributeError as exc:
        here = getattr(sys.modules[module], "__file__", None) or "built in"
        there = f", not the one sent from {file}" if file and file != here else ""
        raise CodecError(
            f"module {module} on the worker ({here}) has no {qualname}: "
            f"it is another version{there}; install the same version on both sides"
        ) from exc
    function: Callable[..., Any] = found
    return function


def _missing(module: str, origins: dict[str, str]) -> ModuleMissing:
    file, name = "", module
    while name and not file:
        file = origins.get(name, "")
        name = name.rpartition(".")[0]
    source = f" (from {file})" if file else ""
    return ModuleMissing(
        module,
        file,
        f"module {module}{source} is not on the worker; install it there, or define the function "
        "in the script or notebook itself so that it travels with the task, or call "
        f"zfabric.register_by_value({module}) before submitting, which sends the module's "
        "functions and classes along",
    )


def register_by_value(module: ModuleType) -> None:
    """Send the functions and classes of `module` (and of its submodules) by value from now on.

    For modules that the workers do not have, such as the one being worked on.
    """
    import cloudpickle

    if not isinstance(module, ModuleType):
        raise UsageError(
            f"register_by_value() takes a module, not {type(module).__name__}: import it first"
        )
    cloudpickle.register_pickle_by_value(module)
    _importable.clear()
    _by_value.clear()


def unregister_by_value(module: ModuleType) -> None:
    """Undo `register_by_value`: send addresses again. Unknown modules are ignored."""
    import cloudpickle

    if module.__name__ in cloudpickle.list_registry_pickle_by_value():
        cloudpickle.unregister_pickle_by_value(module)
    _importable.clear()
    _by_value.clear()


def largest_captures(fn: Callable[..., Any], count: int = 3) -> list[tuple[str, int]]:
    """What a function drags along: (name, bytes), largest first, at most `count`.

    Looks at the closure, the globals that the code names, defaults, the arguments of a partial
    and the object of a bound method. For messages: it pickles what it measures.
    """
    from zfabric.codec.diagnose import names_in

    found: dict[str, Any] = {}
    for _ in range(10):
        inner = getattr(fn, "func", None)
        if inner is None:
            break
        found.update({f"argument {n}": item for n, item in enumerate(getattr(fn, "args", ()))})
        found.update(getattr(fn, "keywords", {}))
        fn = inner
    if isinstance(fn, MethodType):
        found["self"] = fn.__self__
        fn = fn.__func__
    if isinstance(fn, FunctionType) and importable_name(fn) is None:
        code = fn.__code__
        names = code.co_varnames[: code.co_argcount]
        defaults = fn.__defaults__ or ()
        found.update(zip(names[len(names) - len(defaults) :], defaults, strict=True))
        found.update(fn.__kwdefaults__ or {})
        spaces = fn.__globals__
        found.update({name: spaces[name] for name in names_in(code) if name in spaces})
        for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=False):
            try:
                found[name] = cell.cell_contents
            except ValueError:
                continue
    sizes = [(name, _size(item)) for name, item in found.items() if item is not fn]
    return sorted(sizes, key=lambda pair: -pair[1])[:count]


def _size(item: Any) -> int:
    if isinstance(item, ModuleType) or importable_name(item) is not None:
        return 0
    try:
        return nbytes_of(dumps(item))
    except Exception:
        return 0  # cannot travel at all: another message's business
